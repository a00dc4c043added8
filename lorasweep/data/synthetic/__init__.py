"""Generators of data whose true distribution is known.

Refuses to know what is trained on them.
"""

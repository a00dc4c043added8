"""Generators of data whose true distribution is known.

Refuses to know models and training.
"""

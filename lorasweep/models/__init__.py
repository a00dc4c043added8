"""A base model: found, loaded, checked, its matrices named.

Refuses to know how it is trained and on what.
"""

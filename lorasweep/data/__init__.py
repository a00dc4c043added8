"""Examples, in batches.

Refuses to know models and methods.
"""

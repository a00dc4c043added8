"""Load data sets, and lay out their examples in batches.

Refuses to know models and methods.
"""

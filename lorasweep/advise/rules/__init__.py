"""One rule per module: compute a part of the advice from a customer, a model and known figures.

The rules do not read tables or write pages.
"""

"""Read a table of customers, advise each customer, and measure data sets.

This package imports neither torch nor Hydra, and of `analysis` only the law of learning rates
(rates.py). It reads kept results as files.
"""

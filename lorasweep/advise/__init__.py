"""Read a table of customers, advise each customer, and measure data sets.

This package imports neither torch nor Hydra nor `analysis`. It reads kept results as files.
"""

"""Read a table of customers, advise each customer, measure data sets, and build adapters.

This package imports neither torch nor Hydra nor `analysis`. It reads kept results as files, and
gets models as arguments.
"""

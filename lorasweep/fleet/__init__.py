"""Build an adapter for each customer of a table: runs, choice, folders, cards, serving.

This package imports neither torch nor Hydra nor `analysis`. It gets models as arguments.
"""

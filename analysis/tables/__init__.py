"""The commands `fit` (with its flags) and `html` on a table made by any program.

The package knows no sweeps or claims, and prints nothing.
"""

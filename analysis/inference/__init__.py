"""Estimates with intervals, seeds, meta-analysis, and the decision rule.

The package knows no tables, curves or fits.
"""

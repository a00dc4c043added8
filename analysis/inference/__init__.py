"""Estimates with intervals, seeds, meta-analysis, and the decision rule.

Knows no tables, curves or fits.
"""

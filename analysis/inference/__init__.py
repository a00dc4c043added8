"""Estimates with intervals, seeds, meta-analysis, and the decision rule.

Refuses to know tables, curves and fits.
"""

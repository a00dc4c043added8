"""Estimates with intervals, meta-analysis and the decision rule; no tables, curves or fits."""

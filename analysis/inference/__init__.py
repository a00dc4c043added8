"""Estimates with intervals, seeds, meta-analysis, and the decision rule.

Refuses to know learning rates and claims.
"""

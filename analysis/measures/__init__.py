"""Measure quantities on fitted LR curves, such as rho and ratios; suggest a sweep's next runs.

This package imports no question and does not depend on the wording of claims.
"""

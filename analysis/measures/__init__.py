"""Quantities measured on fitted curves: rho, ratios, laws; a sweep's power and its next runs.

Knows no question and no claim's wording.
"""

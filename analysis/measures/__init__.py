"""Quantities measured on fitted curves: rho, ratios, laws; a sweep's next runs.

Knows no question and no claim's wording.
"""

"""What is measured on fitted curves: rho, ratios, laws; the power of a sweep and its next runs.

Refuses to know which question asks for it.
"""

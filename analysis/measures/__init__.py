"""What is measured of fitted curves: rho, ratios, laws.

Refuses to know which question asks for it.
"""

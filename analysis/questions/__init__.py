"""Questions: each module declares the estimands, conditions and report sections of one question.

`base` is the scaffold that they share. This package does not render reports.
"""

"""One file per question, each a declaration of estimands, conditions and sections; the scaffold.

Knows nothing of how answers are shown.
"""

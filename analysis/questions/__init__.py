"""One file per question, and what they share.

Does not know how answers are shown.
"""

"""Tables of finished runs, from this project or others, and the curves in them.

Knows no statistics.
"""

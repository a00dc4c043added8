"""Where a result came from, and its mirror elsewhere.

Refuses to know how it was trained.
"""

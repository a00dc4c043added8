"""Tables of finished runs, ours and anyone's, and the curves in them.

Refuses to know statistics.
"""

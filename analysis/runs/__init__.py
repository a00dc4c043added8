"""Tables of finished runs, ours and anyone's, and the learning curves in them.

Refuses to know statistics.
"""

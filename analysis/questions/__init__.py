"""One file per question, or a room with a `question.py` where it needs several; what they share.

Does not know how answers are shown.
"""

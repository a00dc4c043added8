"""One file a question, and the scaffold that they share.

Refuses to know how an answer is shown.
"""

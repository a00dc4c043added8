"""How the best learning rates compare: the answer in numbers, and the question that reports it.

Knows no other question.
"""

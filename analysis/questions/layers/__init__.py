"""Which layers to adapt: the comparisons on one task, and the verdicts over tasks.

Knows no other question.
"""

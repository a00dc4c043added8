"""Time a fleet against what would train the same adapters today, and its memory against the plan.

Refuses to know how anything is trained: it writes tables and rows, and times commands.
"""

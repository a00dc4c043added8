"""What is optimised, one file an objective.

Refuses to know the loop.
"""

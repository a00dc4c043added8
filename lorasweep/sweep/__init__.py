"""A sweep: a question, its claims with margins, and the runs that answer it.

Refuses to know files, costs and torch.
"""

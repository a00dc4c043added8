"""A sweep: a question, its claims with margins, and the runs that answer it.

This package must not depend on files, costs and torch.
"""

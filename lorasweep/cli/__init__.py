"""What each action of the command line does, and what people see of it.

Refuses to know torch, and how runs are trained.
"""

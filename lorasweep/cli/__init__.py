"""The actions of the command line, and their output.

Refuses to know torch, and how runs are trained.
"""

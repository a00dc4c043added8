"""The best learning rate of one curve: its likelihood, shape and posterior.

Refuses to know arms and claims.
"""

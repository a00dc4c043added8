"""Train packs in worker processes on this machine, or in jobs of a cluster.

Refuses to know models and methods.
"""

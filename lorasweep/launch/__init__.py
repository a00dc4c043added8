"""Gets packs trained: worker processes here, or jobs of a cluster.

Refuses to know models and methods.
"""

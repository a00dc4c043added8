"""The run folder: records, claims, checkpoints and results.

Refuses to know launchers and models.
"""

"""The run folder: what was recorded, who works on it, what a run goes on from.

Refuses to know launchers and models.
"""

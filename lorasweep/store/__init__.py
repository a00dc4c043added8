"""The run folder: records, claims, checkpoints and results.

This package must not depend on launchers and models.
"""

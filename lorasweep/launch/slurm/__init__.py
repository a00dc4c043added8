"""Train runs in jobs of a Slurm cluster.

This package must not depend on what a run trains.
"""

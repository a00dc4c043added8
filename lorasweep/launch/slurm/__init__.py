"""Train runs in jobs of a Slurm cluster.

Refuses to know what a run trains.
"""

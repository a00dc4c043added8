"""Train runs in jobs of a Slurm cluster, whatever a run trains."""

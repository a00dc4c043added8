"""The run folder: records, claims, checkpoints and results; knows no launchers and no models."""

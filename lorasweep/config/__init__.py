"""Turn YAML files and the command line into one checked Request.

No other package imports Hydra.
"""

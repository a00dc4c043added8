"""Turn YAML files and the command line into one checked Request.

The only room that imports Hydra.
"""

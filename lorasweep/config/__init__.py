"""Turn YAML files and the command line into one checked Request; no other package imports Hydra."""

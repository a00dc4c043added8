"""YAML files and the command line become one checked Request.

The only room that imports Hydra.
"""

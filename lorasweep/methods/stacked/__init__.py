"""Modules that hold the adapters of a whole pack side by side.

Refuses to know where in a model they sit.
"""

"""The training loop of a pack and what it is made of.

Refuses to know the store, the launcher and configuration files.
"""

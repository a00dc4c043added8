"""The training loop of a pack, and its parts.

Refuses to know the store, the launcher and configuration files.
"""

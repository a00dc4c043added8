"""The training loop of a pack, its optimizer, sampling and objectives.

Refuses to know the store, the launcher and configuration files.
"""

"""The training objectives, one file each.

Refuses to know the loop.
"""

"""Objectives: what is optimised, one file each.

Refuses to know the loop.
"""

"""Find, load and check base models, and run them.

Refuses to know how they are trained and on what.
"""

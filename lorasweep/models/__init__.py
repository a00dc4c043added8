"""Find, load and check base models, compute their forward passes, and spread them over processes.

Refuses to know how and on what they are trained.
"""

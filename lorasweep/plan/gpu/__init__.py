"""Runs on GPUs whose data sheet is known: memory, time, where they fit, what a sweep takes.

Refuses to know torch and this machine; hardware is an argument.
"""

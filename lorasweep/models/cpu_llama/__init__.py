"""Llama's forward and backward pass written by hand for CPUs.

Refuses to know anything but a batch and the weights.
"""

"""Llama's forward and backward pass, hand-written for CPUs.

Refuses to know anything but a batch and the weights.
"""

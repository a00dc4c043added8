"""Plan a sweep: find missing runs, group them into packs, estimate the cost on given hardware.

This package does not import torch. Only detect.py inspects this machine, and returns a Hardware.
"""

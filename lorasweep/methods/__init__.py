"""The fine-tuning methods, one file each.

Refuses to know the training loop, data and files.
"""

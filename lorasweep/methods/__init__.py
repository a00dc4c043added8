"""The fine-tuning methods, one file each.

Must not import the training loop, data or the run folder.
"""

"""The adapters of a pack, stacked in tensors: their modules, norms and export.

Refuses to know the training loop.
"""

"""The training loop of a pack, its optimizer, sampling and objectives.

Must not import the launcher or configuration; of the store only `checkpoint`.
"""

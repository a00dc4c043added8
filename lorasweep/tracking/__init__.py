"""Record where a result came from, and copy results to Weights & Biases.

Refuses to know how it was trained.
"""

"""Record where a result came from, and copy results to Weights & Biases.

This package must not depend on how runs are trained.
"""

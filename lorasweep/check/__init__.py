"""Measure one machine with a GPU, and compare it with the plan (action=check_gpu).

Knows the plan and the training loop. Must not import customers, config or cli.
"""

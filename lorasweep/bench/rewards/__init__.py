"""Rewarded runs against TRL's GRPO trainer, and what a pack changes in what its runs draw.

Refuses to judge: it writes what was measured, with its errors.
"""

"""LoRA or full fine-tuning, for a table of customers: every number has its reason.

Refuses to know torch, Hydra and the analysis: kept answers are read as files, models are handed in.
"""

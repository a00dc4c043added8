"""Where LoRA has no regret: data of known novelty, regret over rank, room by three counts.

Knows no other question.
"""

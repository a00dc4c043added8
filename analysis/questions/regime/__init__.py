"""Where LoRA gives up nothing: the cells of known novelty, the law of the needed rank, verdicts.

Knows no other question.
"""

"""Settings that we recommend where nothing is known of a task; each with what supports it.

`tune`, `advise` and `fleet` read them; README.md repeats them, and a test compares them.
"""

METHOD = "lora"
RANK = 16
"""For supervised learning; `advise` raises it for many rows, and has a rule for RL."""
RANKS = (RANK, 64)
"""Ranks that `tune` compares: both match full fine-tuning on SmolLM2."""
LAYERS = "attention+mlp"
"""The unembedding made no difference in supervised learning, and costs rank 1 reward in RL."""
ALPHA = 32
BATCH = {"sft": 32, "rl": 512}
"""For sft the study's smallest; for RL, in episodes, tinker-cookbook's smallest for maths."""
UPDATES = {"sft": 100, "rl": 50}
"""Smallest sufficient number of updates. For sft: tinker-cookbook, docs/sl-hyperparams.mdx, which
asks for 1,000 where possible. For RL: GRPO runs reached the plateau of full fine-tuning (zhu)."""
SCHEDULE = "constant"
"""The only one that `tune` and `rate` cover. Otherwise: the one that will be trained with."""
SUPPORT = {
    "METHOD": ("regime-small: real_16", "regime-tiny: low"),
    "RANK": ("regime-small: real_16", "regime-tiny: low"),
    "RANKS": ("regime-small: real_16", "regime-small: real"),
    "LAYERS": ("layers-tiny: mlp_is_enough", "rl_unembedding-tiny: unembedding"),
    "ALPHA": ("ties-small: alpha", "quadrature-tiny: moving"),
    "BATCH": ("batch_size-tiny: below_32", "batch_size-tiny: small_best"),
    "SCHEDULE": ("quadrature-tiny: carried",),
}
"""Setting -> claims in analysis/results/rows.csv (SWEEP-SCALE: CLAIM), SUPPORTED in one condition
or more. UPDATES has published sources only."""

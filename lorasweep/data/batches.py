"""Examples -> padded arrays. Shapes: B sequences, T tokens, P places where a loss-bearing token is predicted.

Rows are padded on the right and attention is causal, so no real token sees a pad: results do not depend on
the padding, and no attention mask is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorasweep.data import Example

PAD_TO = 16
"""T is a multiple of this: with equal ranks a pack is then bit for bit the run alone (recipes: measured)."""


@dataclass(frozen=True)
class Batch:
    """tokens_BT int64; places_BP int64, positions whose logits are needed; targets_BP int64; weight_BP float32."""

    tokens_BT: np.ndarray
    places_BP: np.ndarray
    targets_BP: np.ndarray
    weight_BP: np.ndarray
    n_tokens: int
    """Real tokens, pads left out."""

    @property
    def n_loss(self) -> int:
        """Loss-bearing tokens."""
        return int(self.weight_BP.sum())


def collate(examples: Sequence[Example]) -> Batch:
    """Pad examples into one batch."""
    length = max(len(e.tokens) for e in examples)
    length = -(-length // PAD_TO) * PAD_TO
    counts = [int(e.loss.sum()) for e in examples]
    shape = (len(examples), max(counts))
    tokens = np.zeros((len(examples), length), dtype=np.int64)
    places, targets = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    weight = np.zeros(shape, dtype=np.float32)
    for row, (example, n) in enumerate(zip(examples, counts)):
        tokens[row, : len(example.tokens)] = example.tokens
        at = np.flatnonzero(example.loss)
        places[row, :n] = at - 1  # the logits at t-1 predict token t
        targets[row, :n] = example.tokens[at]
        weight[row, :n] = 1.0
    return Batch(tokens, places, targets, weight, sum(len(e.tokens) for e in examples))


def eval_batches(examples: Sequence[Example], n_tokens: int) -> list[Batch]:
    """Group examples of like length into batches of about `n_tokens` padded tokens; the order is fixed."""
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].tokens), i))
    batches, group = [], []
    for i in order:
        longest = len(examples[i].tokens)
        if group and (len(group) + 1) * longest > n_tokens:
            batches.append(collate([examples[j] for j in group]))
            group = []
        group.append(i)
    batches.append(collate([examples[j] for j in group]))
    return batches

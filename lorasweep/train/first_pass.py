"""The losses of a run's batches under the base, before any update."""

from typing import NamedTuple

import torch

from lorasweep.data.examples import Data
from lorasweep.models.load import Base
from lorasweep.spec.run import RunSpec
from lorasweep.train.objectives.sft import SupervisedFineTuning


class Batch(NamedTuple):
    """The rows of one update."""

    nats: float
    """Summed NLL of the loss tokens."""
    tokens: int
    """Number of loss tokens."""


@torch.no_grad()
def first_pass(
    spec: RunSpec, base: Base, data: Data, micro_batch_size: int | None = None
) -> list[Batch]:
    """Return the loss of every batch of a supervised run under the base."""
    objective = SupervisedFineTuning({spec.id: data}, spec.precision, micro_batch_size)
    found = []
    for step in range(spec.steps):
        parts = objective.batches(base.model, step, [spec])
        nats = sum(float(objective.loss(base.model, part).double().sum()) for part in parts)
        found.append(Batch(nats, sum(part.n_loss for part in parts)))
    return found

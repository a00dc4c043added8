"""What rows cost a base that learns nothing: the losses of a run's batches, before any update."""

from typing import NamedTuple

import torch

from lorasweep.data.examples import Data
from lorasweep.models.load import Base
from lorasweep.spec.run import RunSpec
from lorasweep.train.objectives.sft import SupervisedFineTuning


class Batch(NamedTuple):
    """One update's rows."""

    nats: float
    """Summed NLL of their loss tokens."""
    tokens: int
    """Loss tokens."""


@torch.no_grad()
def first_pass(
    spec: RunSpec, base: Base, data: Data, micro_batch_size: int | None = None
) -> list[Batch]:
    """Return the loss of every batch of a run under the base, by the objective of the run."""
    objective = SupervisedFineTuning({spec.id: data}, spec.precision, micro_batch_size)
    found = []
    for step in range(spec.steps):
        parts = objective.batches(base.model, step, [spec])
        nats = sum(float(objective.loss(base.model, part).double().sum()) for part in parts)
        found.append(Batch(nats, sum(part.n_loss for part in parts)))
    return found

"""What the trainer computes for given answers, under a base and under an adapter trained on it."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import numpy as np
import torch

from lorasweep.data.batches import collate
from lorasweep.data.examples import Example
from lorasweep.models.forward import frozen_in_bf16
from lorasweep.models.load import Base
from lorasweep.models.targets import find_targets
from lorasweep.spec.run import RunSpec
from lorasweep.train.loop import load_weights
from lorasweep.train.objectives.nll import token_log_p


@torch.no_grad()
def log_p(
    base: Base,
    run: RunSpec,
    rows: Sequence[Example],
    weights: Mapping[str, torch.Tensor] | None = None,
) -> np.ndarray:
    """Return log p of the loss tokens of rows, float64 [loss tokens], in nats.

    `weights`: the tensors that a LoRA run kept (store/checkpoint.load_weights); None: the base.
    """
    model, method = base.model, run.method
    with ExitStack() as at_end:
        if weights is not None:
            targets = find_targets(model, run.model, method.target_layers())
            adapter = method.attach(model, targets, [method], [run.seed])
            at_end.callback(adapter.detach)
            load_weights(adapter, [weights])
        at_end.enter_context(frozen_in_bf16(model, run.precision))
        found = [token_log_p(model, collate([row]), run.precision)[0] for row in rows]
    values = [f[: int(row.loss.sum())].double().cpu().numpy() for f, row in zip(found, rows)]
    return np.concatenate([np.zeros(0), *values])

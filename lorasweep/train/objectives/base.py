"""The interface of an objective to the training loop. Shapes: N runs of the pack, in order."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lorasweep.data.examples import Batch, Data, Example
from lorasweep.errors import DataError
from lorasweep.models.forward import check_rows_stay_apart
from lorasweep.models.load import Base
from lorasweep.models.sharding import Mesh
from lorasweep.spec.metric import Metric
from lorasweep.spec.run import RunSpec
from lorasweep.train.events import Record

DIVERGENCE_RULE = 2
"""Version of the divergence rule, stored in every result. Results without a version were judged by
rule 1, for which the base was measured on held-out rows only."""


class Objective:
    """A training objective: its loss, its held-out measures, and its divergence rule.

    `runs`: those still in the pack; in `evaluate` and `at_end`, those to measure. For an update the
    loop calls `batches`, then `loss` of each batch. It divides each run's summed loss by the run's
    summed `weights`. So a mean over tokens does not depend on the micro-batches. In batches N
    counts groups of runs, see `groups`; it is the number of runs after the first update.
    """

    metric: Metric

    def __init__(
        self,
        data: Mapping[str, Data],
        precision: str,
        micro_batch_size: int | None = None,
        join_rows: bool = False,
        forward_parts: int = 1,
    ) -> None:
        """Set up the objective; for `join_rows` and `forward_parts` see Exec.

        `data`: run id -> the run's data set. `micro_batch_size`: sequences (rows or completions)
        per run and forward pass with gradients; None: all of an update.
        """
        self._data, self._precision, self._micro_batch_size = data, precision, micro_batch_size
        self._join_rows, self._forward_parts, self._mesh = join_rows, forward_parts, Mesh()

    def groups(self, step: int, runs: Sequence[RunSpec]) -> list[int]:
        """Return the group of each run, numbered by the first runs, which alone are in the batches.

        Runs of a group have the same gradient at update `step`.
        """
        return list(range(len(runs)))

    def start(self, base: Base, runs: Sequence[RunSpec]) -> list[Record]:
        """Return each run's measures, the metric included, under the base without adapters."""
        self._mesh = base.mesh
        if self._join_rows:
            check_rows_stay_apart(base.model, self._precision)
        return []

    def batches(self, model: nn.Module, step: int, runs: Sequence[RunSpec]) -> Sequence[Batch]:
        """Return the micro-batches of update `step` (0-based). May sample from the model.

        All processes return the same list, whose length is a multiple of their number.
        """

    def weights(self, batch: Any) -> torch.Tensor:
        """Return each run's weight of a batch, [N]. It is known before the forward pass."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Return the summed loss of each run, [N], with gradient."""

    def metrics(self, losses: Sequence[float]) -> list[Record]:
        """Return the record of an update for each run, from the mean losses of the runs."""

    def diverged(self, run_id: str, loss: float) -> bool:
        """Note the mean loss of an update; return whether the run diverged. The loop checks NaN."""

    def evaluate(
        self, model: nn.Module, runs: Sequence[RunSpec], final: bool
    ) -> list[tuple[Record, int]]:
        """Return measures of runs by name, the metric included, and the number of held-out items.

        On all items if `final`, else on a part. The model has only the adapters of these runs.
        """

    def at_end(self, model: nn.Module, runs: Sequence[RunSpec]) -> list[Record]:
        """Return more measures of finished runs; the model has only the adapters of these runs."""
        return [{} for _ in runs]

    def facts(self, run: RunSpec) -> Record:
        """Return the facts that the result of this run contains, finished or diverged."""
        data = self._data[run.id]
        commit = {"data_commit": data.commit} if data.commit else {}
        counts = {"n_test": len(data.test), "n_train": data.n_train}
        return {**counts, "data_sha256": data.sha256, **commit}

    def state(self, run_id: str) -> dict[str, Any]:
        """Return a run's state for its checkpoint, as JSON values, beside the keys of the loop."""
        return {"data_sha256": self._data[run_id].sha256}

    def load_state(self, run_id: str, state: dict[str, Any]) -> None:
        """Restore the values of `state`; DataError: the run resumes with other data."""
        then, now = state["data_sha256"], self._data[run_id].sha256
        if then != now:
            raise DataError(
                f"run {run_id} was started on other data (fingerprint {then}) than are there now "
                f"({now}). Restore those data, or delete the folder {run_id} in the run folder, "
                "which starts the run from the beginning."
            )

    def curve_rows(self, run: RunSpec) -> Sequence[Example]:
        """Return the held-out rows of evaluations before the end: validation or first test rows."""
        data = self._data[run.id]
        return data.validation or data.test[: run.dataset.n_test_curve or None]

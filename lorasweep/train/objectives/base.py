"""The interface of an objective, as the training loop uses it.

Shapes: N members of the pack, in the order of `members`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from lorasweep.errors import DataError
from lorasweep.spec.metric import Metric
from lorasweep.spec.run import RunSpec
from lorasweep.train.events import Record

if TYPE_CHECKING:
    from torch import nn

    from lorasweep.models.load import Base


DATA_SHA256 = "data_sha256"
"""Key of the data's fingerprint in results and checkpoints."""
DIVERGENCE_RULE = 2
"""Version of the rule by which runs are called diverged, which every result records. Results
without one were judged by rule 1, which compared with the base on held-out rows only."""


class MicroBatch(Protocol):
    """The input of one forward pass: a part of an update's examples, for all members."""

    @property
    def tokens_N(self) -> Sequence[int]:
        """Tokens of each member, without padding."""

    @property
    def laid_out(self) -> int:
        """Tokens of one member, with padding."""


BatchT = TypeVar("BatchT", bound=MicroBatch)


@dataclass(frozen=True)
class Evaluation:
    """Held-out measures of one member."""

    measures: Record
    """Name -> value, including the metric."""
    n_items: int
    """Number of held-out items."""


class Objective(Protocol[BatchT]):
    """What is optimised, and how it is measured.

    `members` are those still in the pack, and where something is measured, those that it is
    measured of.

    An update calls batches, then for each batch loss and its gradient, divided by the member's
    weight in the whole update. So a mean over tokens does not depend on the micro-batches.
    """

    metric: Metric

    def start(self, base: "Base", members: Sequence[RunSpec]) -> list[Record]:
        """Return each member's measures before training, including the metric.

        `base` has nothing attached yet.
        """

    def batches(self, model: "nn.Module", step: int, members: Sequence[RunSpec]) -> list[BatchT]:
        """Return update `step`'s micro-batches (0-based). May sample from the model.

        Of several processes (base.mesh in `start`) all get the same list, and each takes every
        size-th one: its length is a multiple of their number.
        """

    def weights(self, batch: BatchT) -> torch.Tensor:
        """Return the weight of each member's summed loss in `batch`, [N], e.g. its loss tokens.

        It is known before the forward pass, so that gradients need no rescaling afterwards.
        """

    def loss(self, model: "nn.Module", batch: BatchT) -> torch.Tensor:
        """Return the summed loss of each member, [N], with gradient."""

    def metrics(self, losses: Sequence[float]) -> list[Record]:
        """Return what to record of an update, from each member's mean loss."""

    def diverged(self, run: str, loss: float) -> bool:
        """Note a run's mean loss at this update; return whether the run has diverged.

        The loop itself checks that losses and gradients are finite.
        """

    def evaluate(
        self, model: "nn.Module", members: Sequence[RunSpec], final: bool
    ) -> list[Evaluation]:
        """Measure these members on held-out items: on all of them if `final`, else on a part.

        The model has these members only, and in `at_end` those that have finished.
        """

    def at_end(self, model: "nn.Module", members: Sequence[RunSpec]) -> list[Record]:
        """Return additional measures of members that have finished."""

    def facts(self, member: RunSpec) -> Record:
        """Return what every result of this member contains, finished or diverged."""

    def state(self, run: str) -> dict[str, Any]:
        """Return a run's state for its checkpoint, as JSON values.

        The keys step, layout, curve, tokens and best are reserved for the loop.
        """

    def load_state(self, run: str, state: dict[str, Any]) -> None:
        """Restore the values of `state`; the dict also holds those of the loop."""


def refuse_other_data(run: str, then: str | None, now: str | None) -> None:
    """Check that a run goes on with the data that it was started on, by their fingerprints.

    Raises:
        DataError: they are others.
    """
    if then != now:
        raise DataError(
            f"run {run} was started on other data (fingerprint {then}) than are there now ({now}). "
            f"Get those data back, or delete the folder {run} in the run folder, which starts the "
            "run anew."
        )

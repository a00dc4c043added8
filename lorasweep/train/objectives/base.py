"""What the training loop asks of an objective.

Shapes: N members of the pack, in the order of `members`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from lorasweep.spec.metric import Metric
from lorasweep.spec.run import RunSpec
from lorasweep.train.events import Record

if TYPE_CHECKING:
    from torch import nn

    from lorasweep.models.load import Base


class MicroBatch(Protocol):
    """A part of one update's examples, of all members: what a forward pass takes."""

    @property
    def tokens_N(self) -> Sequence[int]:
        """Real tokens of each member, padding left out."""

    @property
    def laid_out(self) -> int:
        """Tokens of one member, padding included."""


BatchT = TypeVar("BatchT", bound=MicroBatch)


@dataclass(frozen=True)
class Evaluation:
    """Held-out measures of one member."""

    measures: Record
    """Name -> value; the metric's among them."""
    n_items: int
    """Held-out items that they are taken over."""


class Objective(Protocol[BatchT]):
    """What is optimised, and how it is measured. `members` are always those still in the pack.

    An update goes: batches, then for each of them loss and its gradient, divided by the member's
    weight in the whole update. So a mean over tokens does not depend on the micro-batches.
    """

    metric: Metric

    def start(self, base: "Base", members: Sequence[RunSpec]) -> list[float]:
        """Return each member's metric before training. `base` has nothing attached yet."""

    def batches(self, model: "nn.Module", step: int, members: Sequence[RunSpec]) -> list[BatchT]:
        """Return update `step`'s micro-batches (0-based). May sample from the model."""

    def weights(self, batch: BatchT) -> torch.Tensor:
        """Return what each member's summed loss in `batch` counts, [N], e.g. its loss-bearing
        tokens. Known before any forward pass, so no gradient has to be rescaled after it."""

    def loss(self, model: "nn.Module", batch: BatchT) -> torch.Tensor:
        """Return the summed loss of each member, [N], with its gradient."""

    def metrics(self, losses: Sequence[float]) -> list[Record]:
        """Return what is recorded of an update, from each member's mean loss."""

    def diverged(self, run: str, loss: float) -> bool:
        """Take note of a run's mean loss at this update; return whether it is beyond recovery.

        Losses and gradients that are not finite are the loop's to notice.
        """

    def evaluate(
        self, model: "nn.Module", members: Sequence[RunSpec], final: bool
    ) -> list[Evaluation]:
        """Measure every member on held-out items: final: on all of them, as at a run's end."""

    def at_end(self, model: "nn.Module", members: Sequence[RunSpec]) -> list[Record]:
        """Return further measures of each member, taken only when one of them is finished."""

    def facts(self, member: RunSpec) -> Record:
        """Return what every result of this member says, finished or diverged."""

    def state(self, run: str) -> dict[str, Any]:
        """Return a run's own state for its checkpoint: plain values for JSON.

        They lie beside the loop's own: step, layout, curve and tokens are taken.
        """

    def load_state(self, run: str, state: dict[str, Any]) -> None:
        """Take up the state that `state` gave (among the loop's own values)."""

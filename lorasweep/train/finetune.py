"""Train a pack with the objective that its runs name."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lorasweep.data.examples import Data
from lorasweep.models.load import Base
from lorasweep.spec.run import RunSpec
from lorasweep.store.checkpoint import State
from lorasweep.train.events import Event
from lorasweep.train.loop import train
from lorasweep.train.objectives.base import Objective
from lorasweep.train.objectives.policy_gradient import PolicyGradient
from lorasweep.train.objectives.sft import SupervisedFineTuning

OBJECTIVES: dict[str, Callable[..., Objective[Any]]] = {
    "sft": SupervisedFineTuning,
    "policy_gradient": PolicyGradient,
}


def finetune(
    pack: Sequence[RunSpec],
    base: Base,
    data: Data | Mapping[str, Data],
    micro_batch_size: int | None = None,
    resume: dict[str, State] | None = None,
    join_rows: bool = False,
    forward_parts: int = 1,
) -> Iterator[Event]:
    """Train the runs of `pack` together and yield an Event per update.

    `data`: one data set for all, or run id -> data set. `micro_batch_size`: sequences per member
    and forward pass of the learner; None: all of an update. `resume`: run id -> state from an
    event's snapshot(). `join_rows`, `forward_parts`: see Exec.
    """
    by_run = {s.id: data for s in pack} if isinstance(data, Data) else data
    objective = OBJECTIVES[pack[0].objective](
        by_run, pack[0].precision, micro_batch_size, join_rows, forward_parts
    )
    return train(pack, base, objective, resume)

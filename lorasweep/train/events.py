"""What a trainer reports: one Event an update. Standard library only."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lorasweep.store.checkpoint import State

Record = dict[str, Any]


@dataclass
class Event:
    """What one update brought. Keys are run ids; `ended` gives 'done' or 'diverged' and the final
    measures."""

    step: int
    records: dict[str, Record]
    ended: dict[str, tuple[str, Record]]
    snapshot: Callable[[], dict[str, State]]
    """Call before asking for the next event: the state of every member still in the pack."""
    backend: str = ""
    """The forward passes and the device that computed it."""

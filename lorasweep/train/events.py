"""What a trainer reports: one Event per update. Standard library only."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lorasweep.store.checkpoint import State

Record = dict[str, Any]


@dataclass
class Event:
    """The outcome of one update. Keys are run ids."""

    step: int
    records: dict[str, Record]
    ended: dict[str, tuple[str, Record]]
    """Runs that ended: 'done' or 'diverged', and their results."""
    snapshot: Callable[[], dict[str, State]]
    """Returns the state of every member still in the pack. Valid until the next event."""
    backend: str = ""
    """Implementation and device, such as 'cpu_llama on cpu'."""
    dropped: set[str] = field(default_factory=set)
    """Runs that the caller no longer wants, which it adds: the next update is made without them."""

"""Events, which the training loop yields once per update, and the phases in which errors occur."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lorasweep.store.checkpoint import State

Record = dict[str, Any]
LEARNING, SAMPLING, EVALUATION = "learning", "sampling", "evaluation"
"""Phases of training."""


class Phase(NamedTuple):
    """Where in training an error was raised; whether Exec.forward_parts can reduce its memory."""

    name: str = LEARNING
    divisible: bool = False


@contextmanager
def phase(name: str, divisible: bool = False) -> Iterator[None]:
    """Mark errors with the phase in which they are raised: the innermost of nested phases."""
    try:
        yield
    except Exception as error:
        error.__dict__.setdefault("phase", Phase(name, divisible))
        raise


def phase_of(error: BaseException) -> Phase:
    """Return the phase in which an error was raised; learning if the error has no mark."""
    found = getattr(error, "phase", None)
    return found if isinstance(found, Phase) else Phase()


@dataclass
class Event:
    """The outcome of one update of a pack. The keys of all dicts are run ids."""

    step: int
    records: dict[str, Record]
    ended: dict[str, tuple[str, Record]]
    """For the runs that ended: 'done' or 'diverged', and the result."""
    snapshot: Callable[[], dict[str, State]]
    """Returns the state of every run still in the pack; valid until the next event."""
    backend: str = ""
    """Implementation and device, such as 'transformers on cpu'."""
    dropped: set[str] = field(default_factory=set)
    """Runs to drop before the next update: the caller adds their ids."""

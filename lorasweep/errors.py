"""The errors that are shown to the user as one message, without a traceback.

Each message says what was given, what is allowed, and what to type next. Any other exception is a
bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class LorasweepError(Exception):
    """Root of all errors that are shown to the user as one message."""


class SpecError(LorasweepError, ValueError):
    """A configuration, sweep or run specification that is not valid."""


class NotAtScale(SpecError):
    """A sweep that is not asked at the chosen scale."""


class StoreError(LorasweepError):
    """A run folder that cannot be read or written, or belongs to another version."""


class DataError(LorasweepError, ValueError):
    """A data set that is missing, or a row in it that cannot be used."""


class ModelError(LorasweepError, ValueError):
    """Weights that are missing, or an architecture that cannot be adapted."""


class TrainingError(LorasweepError):
    """A run that failed by accident (out of memory, killed). It can be tried again."""


class ClusterError(LorasweepError):
    """A cluster that is missing, cannot do what was requested, or refused a job."""


class GaveUp(ClusterError):
    """A sweep that was submitted again and again without finishing any run."""


def unknown(kind: str, given: str, allowed: Iterable[str]) -> str:
    """Write the message for an unknown name, with the nearest name and the whole list."""
    names = sorted(allowed)
    near = difflib.get_close_matches(given, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{kind} {given!r} not found.{hint} Available: {', '.join(names) or '(none)'}."

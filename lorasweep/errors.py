"""The errors that a user can cause or must read.

Each message says what was given, what is allowed, and what to type next. They reach the terminal
without a traceback; anything else that is raised is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class LorasweepError(Exception):
    """Root of all errors that are shown to the user as one message."""


class SpecError(LorasweepError, ValueError):
    """A configuration, sweep or run specification that cannot mean anything."""


class StoreError(LorasweepError):
    """A run folder that cannot be read or written, or belongs to another version."""


class DataError(LorasweepError, ValueError):
    """A data set that is missing, or a row in it that cannot be used."""


class ModelError(LorasweepError, ValueError):
    """Weights that are missing, or an architecture that cannot be adapted."""


class TrainingError(LorasweepError):
    """A run that failed by accident (out of memory, killed): an attempt may be made again."""


class ClusterError(LorasweepError):
    """A cluster that is not there, cannot do what was asked, or refused a job."""


class GaveUp(ClusterError):
    """A sweep whose jobs end without any run finished, round after round."""


def unknown(kind: str, given: str, allowed: Iterable[str]) -> str:
    """Say that `given` is no known `kind`, with the nearest name and the whole list."""
    names = sorted(allowed)
    near = difflib.get_close_matches(given, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{kind} {given!r} not found.{hint} Available: {', '.join(names) or '(none)'}."

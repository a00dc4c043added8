"""Errors that the user can correct: one message, without a traceback.

A message names the given value, the allowed values, and the command or setting that helps. Any
other exception is a bug.
"""

import difflib
import importlib.util
from collections.abc import Iterable


class LorasweepError(Exception):
    """An error that the user can correct."""


class SpecError(LorasweepError, ValueError):
    """A configuration, sweep or run that is not valid."""


class RankTooLarge(SpecError):
    """A rank above the smallest side of a matrix that it adapts."""


class NotAtScale(SpecError):
    """A sweep that does not have the chosen scale."""


class StoreError(LorasweepError):
    """A run folder that cannot be read or written, or belongs to another version."""


class DataError(LorasweepError, ValueError):
    """A data set that is missing, or a row in it that cannot be used."""


class ModelError(LorasweepError, ValueError):
    """Weights that are missing, or an architecture that cannot be adapted."""


class TrainingError(LorasweepError):
    """A training or measurement that failed, or a finished run that cannot be reproduced."""


class ClusterError(LorasweepError):
    """A cluster that is missing, cannot do what was requested, or refused a job."""


class GaveUp(ClusterError):
    """A sweep that was submitted several times without finishing any run."""


def check_installed(package: str, what: str) -> None:
    """Raise SpecError if a package is missing that `what` needs. Imports nothing.

    All packages are dependencies, but a compute node without a network may lack some.
    """
    if importlib.util.find_spec(package) is None:
        raise SpecError(
            f"{what} needs {package}, which is not installed: pip install {package} (for a machine "
            "without a network: make wheelhouse)."
        )


def unknown(kind: str, given: str, allowed: Iterable[str]) -> str:
    """Return the message for an unknown name, with the nearest name and all allowed ones."""
    names = sorted(allowed)
    near = difflib.get_close_matches(given, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{kind} {given!r} not found.{hint} Available: {', '.join(names) or '(none)'}."


def from_hub(what: str, place: str, error: Exception) -> str:
    """Return the message for something that the hub does not give; `what` begins with its kind."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    page = "datasets/" * what.startswith("dataset") + place.partition("@")[0]
    return (
        f"{what}: cannot load {place!r} from the hub ({said}). Correct name and revision, and a "
        "model needs a config.json. If it is gated or private, accept the terms at "
        f"https://huggingface.co/{page} and log in with `hf auth login` (or set HF_TOKEN). Without "
        "a network (or with HF_HUB_OFFLINE), give the same command with action=fetch on a machine "
        "that reaches the hub, or use local files."
    )

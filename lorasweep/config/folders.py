"""Folders of runs, reports, weights and data: from the command line, else from the environment."""

import dataclasses
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lorasweep.errors import SpecError
from lorasweep.spec.execution import Exec
from lorasweep.spec.values import problems_of

FOLDERS = ("runs", "reports", "models", "data")
"""Settings of folders are exec.runs_dir, ...; environment variables are LORASWEEP_RUNS, ..."""


def exec_of(values: dict[str, Any], given: Collection[str] = ()) -> Exec:
    """Return a checked Exec with absolute folders; SpecError: a setting is not valid.

    `given`: keys that the command line sets, which have precedence over environment variables.
    """
    values = dict(values)
    for problem in problems_of(Exec, values, "exec."):
        raise SpecError(problem)
    for problem in (exec_ := Exec(**values)).problems():
        raise SpecError(problem)
    folders: dict[str, Any] = {}
    for name in FOLDERS:
        value, default = getattr(exec_, f"{name}_dir"), getattr(Exec(), f"{name}_dir")
        set_to, many = os.environ.get(f"LORASWEEP_{name.upper()}"), isinstance(value, list)
        if value == default and set_to and f"exec.{name}_dir" not in given:
            value = set_to.split(os.pathsep) if many else set_to
        if not all(value if many else [value]):
            raise SpecError(f"exec.{name}_dir={value!r}: expected a folder; . is the current one.")
        paths = [str(Path(p).expanduser().absolute()) for p in (value if many else [value])]
        folders[f"{name}_dir"] = paths if many else paths[0]
    return dataclasses.replace(exec_, **folders)

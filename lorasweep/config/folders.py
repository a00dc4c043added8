"""Find the folders of configuration, runs, reports, weights and data."""

import dataclasses
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lorasweep.errors import SpecError
from lorasweep.spec.execution import Exec

ENVIRONMENT = {
    "runs_dir": "LORASWEEP_RUNS",
    "reports_dir": "LORASWEEP_REPORTS",
    "models_dir": "LORASWEEP_MODELS",
    "data_dir": "LORASWEEP_DATA",
}
"""Environment variables of folders; the command line has precedence."""


def conf_dir() -> Path:
    """Find the shipped configuration: beside the package in a checkout, inside it in a wheel."""
    here = Path(__file__).resolve().parents[1]
    # the checkout first: an editable install leaves an old copy in site-packages
    for path in (here.parent / "conf", here / "conf"):
        if (path / "config.yaml").is_file():
            return path
    raise SpecError(f"no configuration (conf/config.yaml) next to {here}. Reinstall lorasweep.")


def exec_of(values: dict[str, Any], given: Collection[str] = ()) -> Exec:
    """Return a checked Exec with absolute folders; SpecError: a setting is not valid.

    `given`: names of the folders that the command line sets.
    """
    exec_ = Exec(**values)
    for problem in exec_.problems():
        raise SpecError(problem)
    folders: dict[str, Any] = {}
    for name, variable in ENVIRONMENT.items():
        value, default = getattr(exec_, name), getattr(Exec(), name)
        set_to = os.environ.get(variable)
        if value == default and set_to and name not in given:
            value = set_to.split(os.pathsep) if isinstance(default, list) else set_to
        folders[name] = _absolute(value) if isinstance(value, str) else [*map(_absolute, value)]
    return dataclasses.replace(exec_, **folders)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())

"""Find the folders of configuration, runs, reports, weights and data."""

import dataclasses
import os
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
"""Environment variables for folders. The command line comes first."""


def conf_dir() -> Path:
    """Find the shipped configuration: one level up in a checkout, inside the package in a wheel.

    The checkout comes first: an editable install leaves an old copy in site-packages.
    """
    here = Path(__file__).resolve().parents[1]
    for path in (here.parent / "conf", here / "conf"):
        if (path / "config.yaml").is_file():
            return path
    raise SpecError(f"no configuration (conf/config.yaml) next to {here}. Reinstall lorasweep.")


def exec_of(values: dict[str, Any]) -> Exec:
    """Make an Exec with absolute folders, and check it.

    Raises:
        SpecError: a setting is not valid.
    """
    exec_ = Exec(**values)
    for problem in exec_.problems():
        raise SpecError(problem)
    folders: dict[str, Any] = {name: _folder(exec_, name) for name in ENVIRONMENT}
    return dataclasses.replace(exec_, **folders)


def _folder(exec_: Exec, name: str) -> str | list[str]:
    value, default = getattr(exec_, name), getattr(Exec(), name)
    from_environment = os.environ.get(ENVIRONMENT[name])
    if value == default and from_environment:
        value = from_environment
        if isinstance(default, list):
            value = from_environment.split(os.pathsep)
    return _absolute(value) if isinstance(value, str) else [_absolute(p) for p in value]


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())

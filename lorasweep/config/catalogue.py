"""Models, machines and serving profiles by name, from files that are read when first needed."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from lorasweep.fleet.serving import Profile
from lorasweep.plan import hardware
from lorasweep.plan.hardware import Hardware
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.values import build


def models(folders: Sequence[Path]) -> dict[str, Callable[[], ModelSpec]]:
    """Return functions that read models, by file name and by name on the hub, in lower case."""
    found: dict[str, Callable[[], ModelSpec]] = {}
    for path in _files(folders, "model"):
        read = cache(lambda path=path: build(ModelSpec, _plain(path)))
        found.setdefault(path.stem.lower(), read)
        location = str(_head(path).get("location", "")).lower()
        if "/" in location:
            found.setdefault(location, read)
    return found


def widths(folders: Sequence[Path]) -> dict[str, int]:
    """Return the hidden size of each model, by name."""
    return {p.stem: int(_head(p).get("hidden_size", 0)) for p in _files(folders, "model")}


def machines(folders: Sequence[Path]) -> dict[str, Callable[[], Hardware]]:
    """Return functions that read the files of machines, except this_machine, by lower-case name."""
    return {
        path.stem.lower(): cache(lambda path=path: hardware.from_plain(_plain(path)))
        for path in _files(folders, "hardware")
        if path.stem != "this_machine"
    }


def profiles(folders: Sequence[Path]) -> dict[str, Callable[[], Profile]]:
    """Return functions that read serving profiles, by file name."""
    return {
        path.stem: cache(lambda path=path: build(Profile, _plain(path)))
        for path in reversed(_files(folders, "serve"))
    }


def _files(folders: Sequence[Path], group: str) -> list[Path]:
    return [p for folder in folders for p in sorted((folder / group).glob("*.yaml"))]


def _plain(path: Path) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    assert isinstance(values, dict)
    return {str(k): v for k, v in values.items()}


def _head(path: Path) -> dict[str, Any]:
    """Read a file as plain YAML, ten times as fast as OmegaConf."""
    return yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}

"""The files of conf: models, machines and serving profiles, checked when they are first needed."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lorasweep.errors import SpecError
from lorasweep.fleet.serving import Profile
from lorasweep.plan.detect import Hardware, from_plain
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.values import build


def conf_dir() -> Path:
    """Find the shipped configuration: beside the package in a checkout, inside it in a wheel."""
    here = Path(__file__).resolve().parents[1]
    # the checkout first: an editable install leaves an old copy in site-packages
    for path in (here.parent / "conf", here / "conf"):
        if (path / "config.yaml").is_file():
            return path
    raise SpecError(f"no configuration (conf/config.yaml) next to {here}. Reinstall lorasweep.")


def models(folders: Sequence[Path]) -> dict[str, Callable[[], ModelSpec]]:
    """Return functions that make models, by file name and by name on the hub, in lower case."""
    found: dict[str, Callable[[], ModelSpec]] = {}
    for name, values in _read(folders, "model").items():
        location = str(values.get("location", "")).lower()
        for key in (name.lower(), *([location] if "/" in location else [])):
            found.setdefault(key, cache(partial(build, ModelSpec, values)))
    return found


def widths(folders: Sequence[Path]) -> dict[str, int]:
    """Return the hidden size of each model, by name."""
    return {name: v.get("hidden_size", 0) for name, v in _read(folders, "model").items()}


def machines(folders: Sequence[Path]) -> dict[str, Callable[[], Hardware]]:
    """Return functions that make the machines of files, by name in lower case."""
    found = _read(folders, "hardware")
    found.pop("this_machine", None)
    return {name.lower(): cache(partial(from_plain, v)) for name, v in found.items()}


def profiles(folders: Sequence[Path]) -> dict[str, Callable[[], Profile]]:
    """Return functions that make serving profiles, by file name."""
    found = _read(folders, "serve").items()
    return {name: cache(partial(build, Profile, values)) for name, values in found}


def _read(folders: Sequence[Path], group: str) -> dict[str, dict[str, Any]]:
    """Return the values of the files of a group, by file name."""
    paths = [p for folder in folders for p in sorted((folder / group).glob("*.yaml"))]
    return {p.stem: _plain(p) for p in reversed(paths)}


@cache
def _plain(path: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(path), resolve=True)

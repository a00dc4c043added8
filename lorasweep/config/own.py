"""Models and data sets of the user's own, by the name of a file, a folder or a place on the hub.

`model=` and `dataset=` take them beside the names of configuration files, which win.
"""

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.config_store import ConfigStore

from lorasweep.config.folders import exec_of
from lorasweep.errors import DataError, ModelError, SpecError, unknown
from lorasweep.models.describe import describe_model
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.values import fields
from lorasweep.sweep.grid import Point

GROUPS = ("model", "dataset")
FORM = ("format", "prompt_field", "completion_field", "mask", "render")
"""Fields of a data set that say how a row is read."""


class Own(NamedTuple):
    """A model or data set that no configuration file describes."""

    given: str
    spec: ModelSpec | DatasetSpec
    folder: str
    """Where it is found (exec.models_dir, exec.data_dir); empty on the hub."""
    option: str
    """Its name as an option of the group."""
    n_train: int
    """Number of training rows; 0 for a model."""


class Names:
    """The names of one command that are no configuration files; each is described once."""

    def __init__(self) -> None:
        self._known: dict[str, Own] = {}

    def option(
        self, group: str, given: str, options: Sequence[str], settings: Mapping[str, Any]
    ) -> str:
        """Return the option of a group with which a name is registered, after describing it once.

        Args:
            options: the names of configuration files.
            settings: what the command line sets, by key.

        Raises:
            SpecError: there is no such model or data set, or it cannot be used.
        """
        named = {f: str(settings[f"{group}.{f}"]) for f in FORM if f"{group}.{f}" in settings}
        key = json.dumps([group, given, named])
        if key not in self._known:
            models_dir = settings.get("exec.models_dir")
            spec, folder, n_train = _described(group, given, options, named, models_dir)
            same = [o for o in self._known.values() if _key(o.spec) == _key(spec)]
            other = [o.given for o in same if o.spec != spec]
            if other or spec.name in options:
                raise SpecError(
                    f"{group}={given}: {other[0] if other else 'a configuration file'} has the "
                    f"name {spec.name!r}, too, and results are kept by name. Rename one."
                )
            plain = re.sub(r"[^A-Za-z0-9_.-]", "-", spec.name)  # Hydra parses it unquoted
            option = f"{plain}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
            values = json.loads(json.dumps(dataclasses.asdict(spec)))
            node = {f.key: values[f.name] for f in fields(type(spec))}
            ConfigStore.instance().store(group=group, name=option, node=node)
            self._known[key] = Own(given, spec, folder, option, n_train)
        return self._known[key].option

    def of(self, points: Iterable[Point]) -> list[Own]:
        """Return the models and data sets of some runs that were described here."""
        wanted = {_key(part) for p in points for part in (p.spec.model, p.spec.dataset)}
        return [own for own in self._known.values() if _key(own.spec) in wanted]


def _key(spec: ModelSpec | DatasetSpec) -> tuple[type, str]:
    return type(spec), spec.name


def _described(
    group: str, given: str, options: Sequence[str], named: Mapping[str, str], models_dir: Any
) -> tuple[ModelSpec | DatasetSpec, str, int]:
    dirs: list[str] = []
    try:
        if group == "model":
            dirs = exec_of({} if models_dir is None else {"models_dir": models_dir}).models_dir
            return *describe_model(given, dirs), 0
        from lorasweep.fleet.rows import named_rows

        return named_rows(given, named)
    except (ModelError, DataError, OSError) as error:
        path = Path(given).expanduser()
        if any(p.exists() for p in (path, *(Path(d, given) for d in dirs))):
            raise SpecError(f"{group}={given}: {error}") from None
        beside = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")])
        raise SpecError(f"{unknown(group, given, [*options, *beside])} {error}") from None

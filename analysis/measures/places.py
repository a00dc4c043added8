"""The places of curves: base, data, setting, arm, rank, batch and updates of their runs."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.inference.where import Setting, Where
from analysis.measures.regret import novelty_of
from analysis.optimum.fit import Optimum
from analysis.runs.curves import full_names

COUNTS = {"rank": "rank", "batch_size": "batch_size", "steps": "updates"}
"""Column of runs -> field of a place that is a whole number."""


def settings_of(runs: pd.DataFrame) -> dict[tuple[str, str], Setting]:
    """Return (model, data set) -> its setting; empty if the runs have no specifications."""
    found = {}
    each = runs.drop_duplicates(["model", "dataset"]) if "spec" in runs else runs[:0]
    for model, name, spec in zip(each["model"], each["dataset"], each.get("spec", ())):
        dataset = json.loads(spec)["dataset"]
        new, is_made = novelty_of(dataset), dataset["source"] == "synthetic"
        found[model, name] = Setting.BEYOND if is_made else Setting.REAL
        if new is not None:
            found[model, name] = Setting.IN_REGIME if new.low else Setting.BEYOND
    return found


def setting_of(keys: Iterable[Mapping[str, Any]], known: Mapping[Any, Setting]) -> Setting:
    """Return the setting of curves with these keys: the last of theirs."""
    found = (known.get((k["model"], k["dataset"])) for k in keys)
    return max((s for s in found if s is not None), default=Setting.BEYOND)


def short_name(dataset: str) -> str:
    """Return a data set's name without its parameters."""
    return dataset.partition("(")[0]


def shared(keys: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return rank, batch size and updates of curves with these keys; None: several, or unknown."""
    found = {}
    for column, field in COUNTS.items():
        values = {int(v) for k in keys if (v := k.get(column)) == v is not None}
        found[field] = values.pop() if len(values) == 1 else None
    return found


def length_of(keys: Sequence[Mapping[str, Any]]) -> str:
    """Return the numbers of updates of curves with these keys, in words; empty if unknown."""
    ends = sorted({int(k["steps"]) for k in keys if "steps" in k})
    return " to ".join(str(n) for n in dict.fromkeys(ends[:1] + ends[-1:])) + " updates" * bool(
        ends
    )


def places_of(optima: Sequence[Optimum], runs: pd.DataFrame) -> dict[int, Where]:
    """Return id of an optimum -> the place of its curve, whose name is unique in its group."""
    known, groups = settings_of(runs), dict[str, list[Optimum]]()
    for o in optima:
        groups.setdefault(o.curve.group, []).append(o)
    found = {}
    for group, mine in groups.items():
        for o, arm in zip(mine, full_names([o.curve for o in mine])):
            key = o.curve.key
            at = (group, str(key["model"]), short_name(key["dataset"]), setting_of([key], known))
            alpha = key.get("alpha")
            found[id(o)] = Where(*at, arm, **shared([key]), alpha=alpha if alpha == alpha else None)
    return found

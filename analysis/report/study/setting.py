"""Where a verdict was measured: on data that LoRA can hold, on more, or on a real model.

Read from the data sets of the runs, never from a list of answers.
"""

import json
from enum import IntEnum
from functools import cache

import pandas as pd

from analysis.measures.regret import novelty_of


class Setting(IntEnum):
    """From the easiest to the hardest; a verdict over more than one has the hardest."""

    IN_REGIME = 0
    """Only rules of a synthetic language are new, which are few numbers."""
    BEYOND = 1
    """Lists are new too, or are all there is: exceptions, facts, exercises."""
    REAL = 2
    """A model and data that were not made by a program of this project."""


WORDS = {
    Setting.IN_REGIME: "in the regime",
    Setting.BEYOND: "beyond the regime",
    Setting.REAL: "on a real model",
}
GENERATED = "synthetic"
"""The source of a data set that is generated."""


def setting_of(runs: pd.DataFrame, group: str) -> Setting:
    """Return the setting of the runs that a verdict's group names; of all runs if it names none.

    A group of several tasks names each, with " and " between them.
    """
    if not len(runs):
        return Setting.BEYOND
    known = {
        (model, text): _read(text)
        for model, text in set(zip(runs["model"], map(_dataset, runs["spec"])))
    }
    named = [
        setting
        for (model, _), (setting, names) in known.items()
        for task in group.split(" and ")
        if any(task == (whole := f"{model}{n}") or task.startswith(f"{whole},") for n in names)
    ]
    return max(named or [setting for setting, _ in known.values()])


@cache
def _dataset(spec: str) -> str:
    return json.dumps(json.loads(spec)["dataset"])


@cache
def _read(text: str) -> tuple[Setting, tuple[str, ...]]:
    """Return a data set's setting, and what follows the model's name in a verdict's group."""
    dataset = json.loads(text)
    novelty = novelty_of(dataset)
    names = [f" on {dataset['name']}", f", {dataset['name']}"]
    if novelty is not None:
        names.append(f", {novelty.name}")
        return (Setting.IN_REGIME if novelty.low else Setting.BEYOND), tuple(names)
    return (Setting.BEYOND if dataset["source"] == GENERATED else Setting.REAL), tuple(names)

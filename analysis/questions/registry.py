"""Find a question by name, and analyse a table with it."""

import dataclasses
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from analysis.inference.decide import Gate, GateCode, remedy
from analysis.questions import arms, arms_report
from analysis.questions.base import Analysis, Question
from analysis.runs.table import TableError, as_losses


class UnknownQuestion(ValueError):
    """There is no question with this name; `known` lists those that exist."""

    def __init__(self, name: str, known: Sequence[str]):
        super().__init__(f"unknown analysis {name!r}; there are: {', '.join(known)}")
        self.known = known


ROOT = Path(__file__).parents[2]
SWEEPS = next((p for p in (ROOT / "sweeps", ROOT / "lorasweep/conf/sweep") if p.is_dir()), ROOT)
"""The shipped sweeps: of the repository, or of an installed package."""
OLDER_NAMES = {"rl_bits": "rl_unembedding"}
"""Analysis of reports from before version 0.3 -> its name today."""


def question_named(
    name: str, estimands: Mapping[str, Any] | None = None, variants: Mapping[str, Any] | None = None
) -> Question[Any]:
    """Return the question of a module of this package, or the one that a sweep's file declares.

    Args:
        name: a module, or a shipped sweep whose estimands and variants are used.
        estimands: a sweep's own; if there are any, they and `variants` declare the question.

    Raises:
        UnknownQuestion: there is no such question.
    """
    if estimands:
        return question_of(estimands, variants or {})
    modules = {p.stem for p in Path(__file__).parent.glob("*.py")}
    modules -= {"__init__", "base", "registry", "arms", "arms_report"}
    if name in modules:
        found: Question[Any] = importlib.import_module(f"analysis.questions.{name}").QUESTION
        return found
    declared = {p.stem: p for p in SWEEPS.glob("*.yaml") if "\nestimands:" in p.read_text()}
    name = OLDER_NAMES.get(name, name)
    if name not in declared:
        raise UnknownQuestion(name, sorted(modules | declared.keys()))
    content = yaml.safe_load(declared[name].read_text())
    return question_of(content["estimands"], content.get("variants") or {})


def question_of(said: Mapping[str, arms.Said], variants: Mapping[str, arms.Said]) -> Question[Any]:
    """Return the question that a sweep's `estimands` and `variants` declare.

    It is about learning rates themselves if published laws of their ratio are among its estimands.

    Raises:
        TableError: a key or name is not known.
    """
    if problem := next(arms.problems(said, variants), None):
        raise TableError(problem)
    found = {name: arms.on_task(name, s) for name, s in said.items() if "of" in s}
    for name, s in said.items():
        for key in s.keys() & arms.OVER_TASKS.keys():
            found[name] = arms.OVER_TASKS[key](name, s, found)
    of_rates = any(s.get("laws") for s in said.values())
    return Question(
        list(found.values()),
        lambda table: arms.conditions(table, said, variants, of_rates),
        arms_report.measures,
        arms_report.sections,
        ratios=lambda t: [(name, r) for _, name, r, _ in arms_report.against_full(t)],
        by_base=True,
        of_rates=of_rates,
    )


def question_for(asked: Mapping[str, Any]) -> Question[Any]:
    """Return the question of a report's question.json; see `question_named`."""
    return question_named(asked["analysis"], asked.get("estimands"), asked.get("variants"))


OLDER_KEYS = {"not_on": "except_models", "rivals": "alternatives", "stands": "not_withdrawn"}
OLDER_KEYS |= {"says": "text", "whose": "source", "beside": "note"}
"""Keys of claims in reports from before version 0.3 -> their names today."""


def read_question(folder: Path) -> dict[str, Any]:
    """Read question.json of a report; claims of older reports get today's keys."""
    found: dict[str, Any] = json.loads((folder / "question.json").read_text())
    for name, claim in found["claims"].items():
        planned = {"sd", "units"}  # are under `planning` now, which no analysis reads
        today = {OLDER_KEYS.get(k, k): v for k, v in claim.items() if k not in planned}
        found["claims"][name] = today
    return found


def analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None = None) -> Analysis:
    """Fit and judge a sweep's runs with the analysis that its question names.

    Args:
        table: one row per run; a metric that is better if higher is converted to a loss here.
        question: the sweep's question, as in question.json.
        kept: folder of kept results, for questions that also show other sweeps' answers.

    Raises:
        UnknownQuestion: there is no such analysis.
        TableError: the runs cannot be judged together.
    """
    found = question_for(question).analyse(as_losses(table), question, kept)
    verdicts = []
    for v in found.verdicts:
        claim = question["claims"][v.claim]
        why = (claim.get("exploratory") or {}).get(question.get("scale"), "")
        v = dataclasses.replace(v, exploratory=why)
        # A withdrawn question leaves claims UNDECIDED, except those marked `not_withdrawn`.
        if question.get("withdrawn") and not claim.get("not_withdrawn"):
            gates = (Gate(GateCode.WITHDRAWN, question["withdrawn"]), *v.gates)
            why, needed = "; ".join(g.sentence for g in gates), remedy(gates)
            v = dataclasses.replace(v, outcome="UNDECIDED", why=why, needed=needed)
            v = dataclasses.replace(v, gates=gates, missing=None)
        verdicts.append(v)
    return dataclasses.replace(found, verdicts=verdicts)

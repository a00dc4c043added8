"""Find a question by name, and analyse a table with it."""

import dataclasses
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.inference.gates import Gate, GateCode, remedy
from analysis.questions.base import Analysis, Question
from analysis.runs.metric import as_losses


class UnknownQuestion(ValueError):
    """There is no question with this name; `known` lists those that exist."""

    def __init__(self, name: str, known: Sequence[str]):
        super().__init__(f"unknown analysis {name!r}; there are: {', '.join(known)}")
        self.known = known


def question_named(name: str) -> Question[Any]:
    """Return the question that a module of this package declares.

    Raises:
        UnknownQuestion: there is no such question.
    """
    modules = {p.stem for p in Path(__file__).parent.glob("*.py")}
    names = sorted(modules - {"__init__", "base", "registry"})
    if name not in names:
        raise UnknownQuestion(name, names)
    found: Question[Any] = importlib.import_module(f"analysis.questions.{name}").QUESTION
    return found


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
    found = question_named(question["analysis"]).analyse(as_losses(table), question, kept)
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

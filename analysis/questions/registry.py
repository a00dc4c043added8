"""Find a question by name, and analyse a table with it."""

import dataclasses
import functools
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from analysis.inference.decide import Gate, GateCode, remedy
from analysis.questions import lengths
from analysis.questions.base import Analysis, Question
from analysis.questions.estimands import problems, question_of
from analysis.runs.table import TableError, as_losses

NAMES = (
    *("batch_size", "capacity", "invariance", "lr_scale", "quadrature"),
    *("rank", "recipes", "regime", "tune", "variants"),
)
QUESTIONS: dict[str, Question] = {
    **{n: importlib.import_module(f"analysis.questions.{n}").QUESTION for n in NAMES},
    **{"compute": lengths.COMPUTE, "short_runs": lengths.SHORT_RUNS},
}
"""`analysis` of a sweep's file -> its question; any other name is that of a shipped sweep."""
ROOT = Path(__file__).parents[2]
SWEEPS = next((p for p in (ROOT / "sweeps", ROOT / "lorasweep/conf/sweep") if p.is_dir()), ROOT)
"""The shipped sweeps: of the repository, or of an installed package."""


def question_named(
    name: str, estimands: Mapping[str, Any] | None = None, variants: Mapping[str, Any] | None = None
) -> Question:
    """Return the question of a module of this package, or the one that a sweep's file declares.

    Args:
        name: a key of QUESTIONS, or a shipped sweep whose estimands and variants are used.
        estimands: a sweep's own; if there are any, they and `variants` declare the question.

    Raises:
        TableError: there is no such question, or a key or name in it is not known.
    """
    if not estimands:
        if name in QUESTIONS:
            return QUESTIONS[name]
        declared = {p.stem for p in SWEEPS.glob("*.yaml") if "\nestimands:" in p.read_text()}
        if name not in declared:
            known = ", ".join(sorted([*QUESTIONS, *declared]))
            raise TableError(f"analysis: unknown {name!r}. Use one of: {known}.")
        content = shipped(name)
        estimands, variants = content["estimands"], content.get("variants")
    if problem := next(problems(estimands, variants or {}), None):
        raise TableError(problem)
    return question_of(estimands, variants or {})


@functools.cache
def shipped(name: str) -> dict[str, Any]:
    """Return the content of a shipped sweep's file; empty if there is no such file."""
    path = SWEEPS / f"{name}.yaml"
    return yaml.safe_load(path.read_text()) if path.is_file() else {}


def read_question(folder: Path) -> dict[str, Any]:
    """Read question.json of a report; TableError if it is broken."""
    try:
        found: dict[str, Any] = json.loads((folder / "question.json").read_text())
        _ = found["name"], found["scale"], found["claims"], found["analysis"], found["question"]
    except (ValueError, LookupError, TypeError) as error:
        raise TableError(f"{folder / 'question.json'} is broken: {error}") from None
    return found


def analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None = None) -> Analysis:
    """Fit and judge a sweep's runs with the analysis that its question names.

    Args:
        table: one row per run; a metric that is better if higher is converted to a loss here.
        question: the sweep's question, as in question.json.
        kept: folder of kept results, for questions that also show other sweeps' answers.

    Raises:
        TableError: there is no such analysis, or the runs cannot be judged together.
    """
    asked = question_named(
        question["analysis"], question.get("estimands"), question.get("variants")
    )
    found = asked.analyse(as_losses(table), question, kept)
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

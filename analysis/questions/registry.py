"""Find a question's module by name. This is the only dynamic import in `analysis`."""

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import pandas as pd

from analysis.inference.estimate import Verdict
from analysis.inference.gates import Gate, GateCode, remedy
from analysis.questions.base import Analysis, correct
from analysis.runs.metric import as_losses

SHARED = ("__init__", "base", "registry")
"""Modules of this package that are not questions."""
TASK = ("model", "dataset")
ONE_OF = {
    "batch_size": TASK,
    "capacity": ("model",),
    "compute": TASK,
    "invariance": TASK,
    "rank": TASK,
    "recipes": ("model",),
    "short_runs": TASK,
}
"""Questions whose `analyse` takes all runs to be of one model, or of one model and data set. The
others sort them themselves."""
ROOM = "question"
"""The module of a question that is a folder."""


class UnknownQuestion(ValueError):
    """There is no question with this name; `known` lists those that exist."""

    def __init__(self, name: str, known: Sequence[str]):
        super().__init__(f"unknown analysis {name!r}; there are: {', '.join(known)}")
        self.known = known


class Question(Protocol):
    """The interface of a question's module."""

    ESTIMANDS: Sequence[str]
    LOG_ESTIMANDS: Sequence[str]

    def analyse(self, table: pd.DataFrame, question: dict[str, Any], kept: Path | None) -> Analysis:
        """Fit and judge a sweep's runs."""


def _modules() -> dict[str, str]:
    """Map each question's name to its module's, within this package."""
    here = Path(__file__).parent
    files = {p.stem: p.stem for p in here.glob("*.py") if p.stem not in SHARED}
    return files | {p.parent.name: f"{p.parent.name}.{ROOM}" for p in here.glob(f"*/{ROOM}.py")}


def question_named(name: str) -> Question:
    """Return a question's module.

    Raises:
        UnknownQuestion: there is no such question.
    """
    modules = _modules()
    if name not in modules:
        raise UnknownQuestion(name, sorted(modules))
    return cast(Question, importlib.import_module(f"analysis.questions.{modules[name]}"))


def analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None = None) -> Analysis:
    """Fit and judge a sweep's runs with the analysis that its question names.

    One that takes all runs to be of one model or task is asked for each of those in the table.

    Args:
        table: one row per run; a metric of which more is better becomes a loss here.
        question: the sweep's question, as in question.json.
        kept: folder of kept results, for questions that also show other sweeps' answers.

    Raises:
        UnknownQuestion: there is no such analysis.
    """
    found = _analyse(as_losses(table), question, kept)
    return dataclasses.replace(found, verdicts=[_marked(v, question) for v in found.verdicts])


def _analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None) -> Analysis:
    module = question_named(question["analysis"])
    unit = ONE_OF.get(question["analysis"])
    tasks = unit and {
        " on ".join(names): runs for names, runs in table.groupby(list(unit), sort=False)
    }
    if not tasks or len(tasks) < 2:
        return module.analyse(table, question, kept)
    found = {name: module.analyse(runs, question, kept) for name, runs in tasks.items()}
    return _joined(found, question)


def _marked(v: Verdict, question: dict[str, Any]) -> Verdict:
    """Return a verdict that says what the sweep's file says of it: exploratory, or withdrawn.

    A withdrawn one is UNDECIDED, whatever was measured; a claim that `stands` is not withdrawn.
    """
    why = question["claims"][v.claim].get("exploratory") or {}
    v = dataclasses.replace(v, exploratory=why.get(question.get("scale"), ""))
    if not question.get("withdrawn") or question["claims"][v.claim].get("stands"):
        return v
    gates = (Gate(GateCode.WITHDRAWN, question["withdrawn"]), *v.gates)
    sentences = "; ".join(g.sentence for g in gates)
    return dataclasses.replace(
        v, outcome="UNDECIDED", why=sentences, gates=gates, needed=remedy(gates), missing=None
    )


def _joined(found: dict[str, Analysis], question: dict[str, Any]) -> Analysis:
    """Join the analyses of several tasks. Their primary claims are one family of hypotheses.

    A verdict that Holm's correction takes away within its task is taken away in the whole, too.
    """
    sections = []
    for k, (name, one) in enumerate(found.items()):
        for s in one.sections:
            figure = s.figure and f"{Path(s.figure).stem}_{k + 1}{Path(s.figure).suffix}"
            sections.append(dataclasses.replace(s, title=f"{s.title}: {name}", figure=figure))
    read = [one.measures.get("read", {}) for one in found.values()]
    common = {k: v for k, v in read[0].items() if all(r.get(k) == v for r in read)}
    measures = {
        name: {k: v for k, v in one.measures.items() if k != "read"} for name, one in found.items()
    }
    return Analysis(
        optima=[o for one in found.values() for o in one.optima],
        verdicts=correct([v for one in found.values() for v in one.verdicts], question),
        sections=sections,
        measures={"tasks": measures, "read": common},
        members={group: curves for one in found.values() for group, curves in one.members.items()},
        of_rates=any(one.of_rates for one in found.values()),
        ratios=[ratio for one in found.values() for ratio in one.ratios],
    )

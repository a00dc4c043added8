"""Find a question's module by name. This is the only dynamic import in `analysis`."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import pandas as pd

from analysis.questions.base import Analysis

SHARED = ("__init__", "base", "registry")
"""Modules of this package that are not questions."""
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

    Args:
        table: one row per run.
        question: the sweep's question, as in question.json.
        kept: folder of kept results, for questions that also show other sweeps' answers.

    Raises:
        UnknownQuestion: there is no such analysis.
    """
    return question_named(question["analysis"]).analyse(table, question, kept)

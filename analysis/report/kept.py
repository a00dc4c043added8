"""Render everything that is kept again from its tables: answers, the study page, the findings.

    python -m analysis study --write

Tables and questions are never changed: nothing is trained again.
"""

import json
from graphlib import TopologicalSorter
from pathlib import Path

from analysis.questions.registry import analyse, question_named
from analysis.report.report import write_answer
from analysis.report.study import page
from analysis.report.study.answers import read_answers
from analysis.runs.table import read


def in_order(kept: Path) -> list[Path]:
    """Return the folders of all kept answers; one that shows others' answers comes after them."""
    folders = sorted(p.parent for p in kept.glob("*/table.parquet"))
    question = {f: json.loads((f / "question.json").read_text()) for f in folders}
    shows = {f: question_named(question[f]["analysis"]).shows for f in folders}
    graph = {f: [g for g in folders if question[g]["name"] in shows[f]] for f in folders}
    return list(TopologicalSorter(graph).static_order())


def render(kept: Path) -> None:
    """Judge the kept tables again and write their results, reports and figures."""
    for folder in in_order(kept):
        table = read(folder / "table.parquet")
        question = json.loads((folder / "question.json").read_text())
        for figure in folder.glob("*.png"):
            figure.unlink()
        write_answer(analyse(table, question, kept), table, question, folder)


def render_all(kept: Path, front_page: Path) -> None:
    """Render the kept answers, the page over them, and the findings in the project's README."""
    render(kept)
    page.write(read_answers([kept]), kept / "README.md", True)
    front_page.write_text(page.readme(front_page.read_text(), kept))

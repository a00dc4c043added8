"""The findings on the project's front page, rendered from kept results.

python -m analysis study --write
"""

from collections.abc import Sequence
from pathlib import Path

from analysis.report.study.answers import Part, parts_of
from analysis.report.study.by_rank import lines_of
from analysis.report.study.findings import sentences
from analysis.report.study.page import FOREST, REGRET
from analysis.report.text import with_block

BEGIN, END = "<!-- answers: made by `python -m analysis study` -->", "<!-- end of answers -->"


def block(parts: Sequence[Part], root: str) -> list[str]:
    """Return the lines of the front page's block; links to figures begin with root."""
    out = [f"{k}. {sentence}" for k, sentence in enumerate(sentences(parts), 1)]
    figure = (
        f"![regret over rank, by condition]({root}{REGRET})"
        if lines_of(parts)
        else f"![the study's claims in units of their margins]({root}{FOREST})"
    )
    return [*out, "", figure]


def readme(text: str, kept: Path) -> str:
    """Return the project's README with its findings rendered again from the kept results."""
    return with_block(text, BEGIN, END, block(parts_of([kept]), "analysis/results/"))

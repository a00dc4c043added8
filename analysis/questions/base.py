"""What a sweep's analysis hands to its report: fitted optima, verdicts, and sections of tables and
figures.

Every `analysis/<name>.py` that a sweep names has ESTIMANDS, LOG_ESTIMANDS and `find(table,
question) -> Findings`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.inference.estimate import Verdict
from analysis.optimum.optimum import Optimum

Rows = list[list[str]]


@dataclass(frozen=True)
class Section:
    """A part of a report: lines of text, a table (its first row is the head), and a figure."""

    title: str
    rows: Rows = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    figure: str = ""
    """File name, in the report's folder."""
    draw: Callable[[Path], None] | None = None
    """Draws the figure to a path."""
    caption: str = ""


@dataclass(frozen=True)
class Findings:
    """All that a question's runs say."""

    optima: list[Optimum]
    verdicts: list[Verdict]
    sections: list[Section] = field(default_factory=list)
    measures: dict[str, Any] = field(default_factory=dict)
    """Plain values for results.json. `read`: estimand -> of which rank and after how many updates
    it was read, in words."""
    members: dict[str, list[Optimum]] = field(default_factory=dict)
    """The curves that a verdict's group rests on."""
    of_rates: bool = False
    """The claims are about best rates themselves, so that their errors say which runs would decide
    most."""
    ratios: list[tuple[str, str, Any]] = field(default_factory=list)
    """(group, name, LoRA / FullFT) for the interactive page."""

"""Tables and figures of kept results for the notebooks, which do not compute anything."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.measures import next_runs
from analysis.questions.base import Analysis
from analysis.questions.registry import analyse, read_question
from analysis.report import plots, report
from analysis.report.study.answers import claims_table, read_answers
from analysis.runs.table import read

RESULTS = Path(__file__).resolve().parents[1] / "results"


def kept(name: str) -> Path:
    """Return the folder of a kept result."""
    return RESULTS / name


def table(folder: Path | str) -> pd.DataFrame:
    """Read a result's runs: `folder` is a kept one, or a report's, such as reports/lr_ratio-tiny.

    Raises:
        TableError: there is no report in it.
    """
    return read(Path(folder) / "table.parquet")


def answer(folder: Path | str) -> Analysis:
    """Fit and judge a result's runs under its question. Raises TableError as `table` does."""
    return analyse(table(folder), read_question(Path(folder)), RESULTS)


def _frame(rows: Sequence[Sequence[str]]) -> pd.DataFrame:
    head, *rest = rows
    return pd.DataFrame(rest, columns=head)


def sentences(found: Analysis, folder: Path | str) -> Any:
    """Show the answer: yes, no or open for each primary claim, the number, and what to do."""
    from IPython.display import Markdown

    lines = report.answer_lines(found, read_question(Path(folder)), table(folder))
    return Markdown("\n\n".join(lines))


def optima(found: Analysis) -> pd.DataFrame:
    """Return one row per curve: the optimum, the low-regret band, the best loss."""
    return _frame(report.optima_rows(found.optima))


def verdicts(found: Analysis, folder: Path | str) -> pd.DataFrame:
    """Return one row per claim."""
    return _frame(report.verdict_rows(found.verdicts, read_question(Path(folder))))


def section(found: Analysis, title: str) -> pd.DataFrame:
    """Return the table of the report's first section whose title starts with `title`.

    Raises:
        KeyError: there is no such table; the message lists those that exist.
    """
    tables = {s.title: s.rows for s in found.sections if s.rows}
    if rows := next((rows for name, rows in tables.items() if name.startswith(title)), None):
        return _frame(rows)
    raise KeyError(f"no table {title!r}. There are: {', '.join(tables)}")


def suggestions(found: Analysis) -> pd.DataFrame:
    """Return one row per suggestion: learning rates and seeds likely to decide open claims."""
    head = ["model and data", "curve", "lr", "seeds", "why"]
    return _frame([head, *next_runs.rows(next_runs.suggest(found))])


def lr_against_nll(found: Analysis) -> Any:
    """Show NLL over learning rate with fits and intervals."""
    return _shown(plots.lr_against_nll, found.optima)


def learning_curves(runs: pd.DataFrame, found: Analysis) -> Any:
    """Show held-out NLL over updates."""
    return _shown(plots.learning, runs, found.optima)


def study() -> pd.DataFrame:
    """Return one row per claim of every kept result."""
    return _frame(claims_table(read_answers([RESULTS])))


def page(name: str) -> Any:
    """Show a kept page."""
    from IPython.display import Markdown

    return Markdown((RESULTS / name).read_text())


def _shown(draw: Callable[..., None], *values: Any) -> Any:
    from IPython.display import Image

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.png"
        draw(*values, path)
        return Image(path.read_bytes())

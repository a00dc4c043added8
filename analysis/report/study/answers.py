"""Read the sweeps' answers from their folders as rows, and name what is in them.

Nothing is judged again: all rows are made from results.json; see `analysis.measures.rows`.
"""

import functools
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.inference.decide import FAR, Verdict
from analysis.inference.estimate import with_interval
from analysis.measures.rows import Row, Setting, rows_of
from analysis.questions.base import NO_CELL
from analysis.questions.registry import read_question

ORDER = (
    *("regime", "lr_ratio", "lr_scale", "short_runs", "rank", "layers", "experts"),
    *("rl_bits", "rl", "rl_unembedding", "rl_matrices", "rl_layers"),
    *("batch_size", "large_batches", "capacity", "invariance", "compute", "recipes"),
)
"""The order of the study's questions; any others follow by name."""
NAMES = {
    "smollm2-135m-instruct": "SmolLM2",
    "gsm8k": "word problems",
    "skills": "exercises",
    "words": "exercises under new names, by rewards",
    "bandit_drawn": "hidden labels, by rewards",
}
"""Base model or data set -> its name in sentences, where that differs."""
TINIEST = 1e-6
"""A margin whose ends are both closer to 0 than this allows for rounding alone."""
SPANS = {"rank": "LoRA rank", "batch_size": "batch", "steps": "updates"}
WORDS = {
    Setting.IN_REGIME: "in the regime",
    Setting.BEYOND: "beyond the regime",
    Setting.REAL: "on a real model",
}


@dataclass(frozen=True)
class Answer:
    """One sweep's answer at one scale."""

    folder: Path
    results: dict[str, Any]
    question: dict[str, Any]

    @property
    def sweep(self) -> str:
        return self.results["sweep"]

    @property
    def scale(self) -> str:
        return self.results["scale"]

    @functools.cached_property
    def rows(self) -> list[Row]:
        """The rows of the answer, verdicts last."""
        return rows_of(self.results, self.question, self.runs)

    @property
    def judged(self) -> list[tuple[Row, Verdict]]:
        """The rows with verdicts."""
        return [(r, r.verdict) for r in self.rows if r.verdict]

    @property
    def single(self) -> list[tuple[Row, Verdict]]:
        """The verdicts on conditions that were run (a claim without any has the task NO_CELL)."""
        return [(r, v) for r, v in self.judged if r.task != NO_CELL]

    @property
    def exploratory(self) -> bool:
        """Whether all verdicts of the answer are exploratory."""
        return all(v.exploratory for _, v in self.judged)

    @functools.cached_property
    def runs(self) -> pd.DataFrame:
        """The table of the answer's runs."""
        return pd.read_parquet(self.folder / "table.parquet")

    @property
    def run_ids(self) -> set[str]:
        return set(self.runs.get("run_id", ()))

    @property
    def bases(self) -> list[str]:
        return sorted(self.runs["model"].unique())

    @property
    def updates(self) -> int:
        """Number of updates after which the answer was judged; runs may be longer."""
        return max((r.updates or 0 for r in self.rows if r.quantity == "best_lr"), default=0)

    @property
    def trained(self) -> str:
        """The runs in words: models with their size, data, ranks, batch, updates."""
        table = self.runs
        full = table[table["method"] == "fullft"]
        sizes = full.groupby("model")["n_trainable"].max() if "n_trainable" in full else {}
        millions = {m: f"{n / 1e6:{'.2g' if n < 1e8 else '.0f'}}M" for m, n in sizes.items()}
        models = [f"{m} ({millions[m]} parameters)" if m in millions else m for m in self.bases]
        names = f"{len(models)} bases" if len(models) > 3 else " and ".join(models)
        said = [f"{names} on {' and '.join(sorted(table['dataset'].unique()))}"]
        for column, what in SPANS.items():
            if table[column].notna().any():
                span = dict.fromkeys(f"{v:,g}" for v in (table[column].min(), table[column].max()))
                said.append(f"{what} {' to '.join(span)}")
        if table["steps"].nunique() == 1 and 0 < self.updates < table["steps"].max():
            said[-1] += f" (judged after {self.updates}, before the task was solved)"
        rows = self.results.get("held_out")
        return ", ".join([*said, *([f"held-out rows {rows}"] if rows else [])])


def read_answers(folders: Sequence[Path], names: Collection[str] | None = None) -> list[Answer]:
    """Read answers by name (None: all), in ORDER; of two with one name, the first folder's."""
    found: dict[str, Answer] = {}
    for root in folders:
        for path in sorted(root.glob("*/results.json")):
            if (names is None or path.parent.name in names) and path.parent.name not in found:
                try:
                    results, question = json.loads(path.read_text()), read_question(path.parent)
                    answer = Answer(path.parent, results, question)
                    _ = answer.scale, answer.rows  # reads all of its files
                    found[path.parent.name] = answer
                except (OSError, ValueError, LookupError) as error:  # the others still count
                    print(f"left out: {path.parent}: {error!r}", file=sys.stderr)

    def place(a: Answer) -> tuple[int, str, str]:
        known = ORDER.index(a.sweep) if a.sweep in ORDER else len(ORDER)
        return known, a.sweep, a.scale

    return sorted(found.values(), key=place)


def claims_table(answers: Sequence[Answer]) -> list[list[str]]:
    """Return the table of all claims for a terminal, one row per claim after the head."""
    rows = [
        ["claim", "scale", "expected", "measured [interval]", "verdict", "runs", "still needed"]
    ]
    for a in answers:
        many = len({r.task for r, _ in a.judged}) > 1
        for r, v in a.judged:
            where = f", {r.task}" if many else ""
            rows.append(
                [
                    f"{a.sweep}: {v.claim}{' (primary)' if v.primary else ''}{where}",
                    a.scale,
                    f"{v.expected:g}, within {within(v.margin)}",
                    with_interval(v.estimate),
                    v.shown,
                    str(a.results.get("runs", "-")),
                    v.needed or "-",
                ]
            )
    return rows


# ---------------------------------------------------------------- words


def where(r: Row) -> str:
    """Name the base, the data, the rank and the number of updates of a row."""
    one_set = r.setting == Setting.IN_REGIME and " on " in r.task
    data = "only rules new" if one_set else " and ".join(map(called, r.data.split(" and ")))
    more = "; ".join(filter(None, (data, r.at.partition(";")[0])))
    return f"{' and '.join(map(called, r.base.split(' and ')))} ({more})"


def listed(words: Sequence[str]) -> str:
    """Join words by commas and a last "and"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def called(name: str) -> str:
    """Return the name of a base model or data set in sentences."""
    return NAMES.get(name, name)


def within(margin: tuple[float, float]) -> str:
    """Return a claim's margin in words."""
    low, high = margin
    if -TINIEST < low < 0 < high < TINIEST:
        return "0, to rounding"
    if high >= FAR:
        return f"{low:g} and more"
    return f"up to {high:g}" if low <= -FAR else f"{low:g} to {high:g}"

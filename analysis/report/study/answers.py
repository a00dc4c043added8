"""Answers as they lie in their folders, and the table of every claim.

    python -m analysis study [--out FOLDER] [--json]

Read from results.json of kept results (analysis/results) and of your own reports. A verdict is the
one of its own report: primary claims are corrected for multiplicity within one question.
"""

import functools
import json
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.inference.design import FAR
from analysis.inference.estimate import Estimate, Verdict, with_interval
from analysis.inference.gates import gate_of
from analysis.report.report_page import command_of
from analysis.report.study.setting import Setting, setting_of

ORDER = (
    "regime",
    "lr_ratio",
    "lr_scale",
    "short_runs",
    "rank",
    "layers",
    "experts",
    "rl_bits",
    "rl",
    "batch_size",
    "large_batches",
    "capacity",
    "invariance",
    "compute",
    "recipes",
)
"""The order of the study's questions; any others follow by name."""
NO_CELL = "no cell"
"""The group of a verdict on a claim of which no data set was run."""


@dataclass(frozen=True)
class Part:
    """One sweep's answer at one scale."""

    folder: Path
    results: dict[str, Any]
    question: dict[str, Any]
    verdicts: list[Verdict]

    @property
    def name(self) -> str:
        """Name of the sweep and the scale, and a hash if its runs were changed."""
        return self.folder.name

    @property
    def command(self) -> str:
        """The command that makes this answer."""
        return command_of(self.question)

    def says(self, claim: str) -> str:
        """Return a claim's sentence."""
        return self.question["claims"].get(claim, {}).get("says") or claim.replace("_", " ")

    def word(self, claim: str, kind: str) -> str:
        """Return a claim's `whose`, `measure` or `beside` in the sweep's file; may be empty."""
        return self.question["claims"].get(claim, {}).get(kind) or ""

    def read(self, v: Verdict) -> str:
        """Describe the rank and number of updates at which a claim was measured; may be empty."""
        return (self.results.get("read") or {}).get(
            self.question["claims"].get(v.claim, {}).get("estimand"), ""
        )

    def curves(self, v: Verdict) -> list[dict[str, Any]]:
        """Return the curves of the group that a verdict is about."""
        found = []
        for c in self.results["curves"]:
            name = f"{c['model']} on {c['dataset']}"
            of_length = f"steps {c['steps']}" in v.group or "steps" not in v.group
            if of_length and (v.group == name or v.group.startswith(f"{name}, ")):
                found.append(c)
        return found

    def parameters_an_episode(self, v: Verdict) -> float | None:
        """Return the parameters of the lowest rank for each answer that its rewarded runs sample.

        None for a verdict about no such runs.
        """
        lora = [c for c in self.curves(v) if c["method"] == "lora"]
        lora = [c for c in lora if c.get("objective") == "policy_gradient"]
        if not lora:
            return None
        lowest = min(lora, key=lambda c: c["rank"])
        keys = ("model", "dataset", "steps", "batch_size", "method", "rank", "objective")
        of_curve = (self.runs[k] == lowest[k] for k in keys)
        runs = self.runs[functools.reduce(operator.and_, of_curve)]
        return float((runs["n_trainable"] / (runs["batch_size"] * runs["steps"])).mean())

    @property
    def single(self) -> list[Verdict]:
        """Return the verdicts on what was run."""
        return [v for v in self.verdicts if v.group != NO_CELL]

    def setting(self, group: str) -> Setting:
        """Return where a verdict's group was measured: in the regime, beyond it, or for real."""
        return setting_of(self.runs, group)

    @property
    def withdrawn(self) -> bool:
        """Whether the sweep's file says that this answer does not count."""
        return bool(self.question.get("withdrawn"))

    @property
    def exploratory(self) -> bool:
        """Whether all its verdicts are exploratory."""
        return all(v.exploratory for v in self.verdicts)

    @cached_property
    def runs(self) -> pd.DataFrame:
        """The runs, as in its table; no rows if it has none."""
        path = self.folder / "table.parquet"
        return pd.read_parquet(path) if path.is_file() else pd.DataFrame()

    @property
    def run_ids(self) -> set[str]:
        """Names of its runs."""
        return set(self.runs.get("run_id", ()))

    @property
    def bases(self) -> list[str]:
        """Names of the base models."""
        return sorted(self.runs["model"].unique()) if len(self.runs) else []

    @property
    def size(self) -> int:
        """Number of parameters of the largest base model."""
        return int(self.runs["n_trainable"].max()) if "n_trainable" in self.runs else 0

    @property
    def trained(self) -> str:
        """Description of the runs: models with their size, data, ranks, batch, updates."""
        table = self.runs
        if not len(table):
            return "-"
        full = table[table["method"] == "fullft"]
        sizes = full.groupby("model")["n_trainable"].max() if "n_trainable" in full else {}
        models = [
            f"{m} ({_millions(sizes[m])} parameters)" if m in sizes else m
            for m in sorted(table["model"].unique())
        ]
        names = f"{len(models)} bases" if len(models) > 3 else " and ".join(models)
        said = [f"{names} on {' and '.join(sorted(table['dataset'].unique()))}"]
        said += [
            f"{what} {_span(table[column])}"
            for column, what in SPANS.items()
            if table[column].notna().any()
        ]
        ends = {int(c["steps"]) for c in self.results.get("curves") or [] if c.get("steps")}
        if table["steps"].nunique() == 1 and ends and max(ends) < table["steps"].max():
            said[-1] += f" (judged after {max(ends)}, when the task was not over yet)"
        rows = self.results.get("held_out")
        return ", ".join([*said, *([f"held-out rows {rows}"] if rows else [])])


SPANS = {"rank": "LoRA rank", "batch_size": "batch", "steps": "updates"}


def _millions(n: float) -> str:
    return f"{n / 1e6:.2g}M" if n < 1e8 else f"{n / 1e6:.0f}M"


def _span(values: pd.Series) -> str:
    low, high = values.min(), values.max()
    return f"{low:,g}" if low == high else f"{low:,g} to {high:,g}"


def parts_of(folders: Sequence[Path], names: Collection[str] | None = None) -> list[Part]:
    """Read all answers below folders, in the order of the study's questions.

    If two folders have an answer of the same name, the first one's is used. `names`: the answers
    to read; None: all.
    """
    found: dict[str, Part] = {}
    for root in folders:
        for path in sorted(root.glob("*/results.json")):
            if names is not None and path.parent.name not in names:
                continue
            results = json.loads(path.read_text())
            question = json.loads((path.parent / "question.json").read_text())
            verdicts = [_verdict(v) for v in results["verdicts"]]
            found.setdefault(path.parent.name, Part(path.parent, results, question, verdicts))

    def place(part: Part) -> tuple[int, str, str]:
        sweep = part.results["sweep"]
        return (ORDER.index(sweep) if sweep in ORDER else len(ORDER), sweep, part.results["scale"])

    return sorted(found.values(), key=place)


def estimate_of(plain: dict[str, Any]) -> Estimate:
    """Read an estimate from results.json."""
    return Estimate(**{**plain, "flags": tuple(plain["flags"])})


def _verdict(plain: dict[str, Any]) -> Verdict:
    """Read a verdict from results.json, of which older ones hold no gates."""
    return Verdict(
        **{
            **plain,
            "estimate": estimate_of(plain["estimate"]),
            "margin": tuple(plain["margin"]),
            "gates": tuple(map(gate_of, plain.get("gates", ()))),
        }
    )


HEAD = ("claim", "scale", "expected", "measured [interval]", "verdict", "runs", "still needed")


def rows_of(parts: Sequence[Part], words: bool = False) -> list[list[str]]:
    """Return the table, one row per claim after the head.

    Args:
        words: give each claim's sentence, not only its name.
    """
    rows = [list(HEAD)]
    for part in parts:
        many = len({v.group for v in part.verdicts}) > 1
        for v in part.verdicts:
            where = f", {v.group}" if many else ""
            name = f"{part.results['sweep']}: {v.claim}"
            if words:
                marks = f"{part.word(v.claim, 'whose') or 'ours'}{', primary' if v.primary else ''}"
                text = f"{part.says(v.claim)}{where} (`{name}`, {marks})"
            else:
                text = f"{name}{' (primary)' if v.primary else ''}{where}"
            rows.append(
                [
                    text,
                    part.results["scale"],
                    f"{v.expected:g}, within {within(v)}",
                    with_interval(v.estimate),
                    v.shown,
                    str(part.results.get("runs", "-")),
                    v.needed or "-",
                ]
            )
    return rows


def within(v: Verdict) -> str:
    """Return a claim's margin in words."""
    low, high = v.margin
    return (
        f"{low:g} and more"
        if high >= FAR
        else f"up to {high:g}"
        if low <= -FAR
        else f"{low:g} to {high:g}"
    )

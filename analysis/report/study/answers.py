"""Read the sweeps' answers from their folders, classify their settings, average them over bases.

Nothing is judged again: all verdicts are read from results.json.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from analysis.inference.decide import scale_of
from analysis.inference.design import FAR
from analysis.inference.estimate import AT_LEAST, Estimate, Verdict, exp_of, with_interval
from analysis.inference.gates import gate_of
from analysis.inference.meta import random_effects
from analysis.measures.regret import novelty_of
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
    "mlp": "the MLP",
    "gsm8k": "word problems",
    "skills": "exercises",
    "words": "exercises under new names, by rewards",
    "bandit_drawn": "hidden labels, by rewards",
}
"""Base model, layer set or data set -> its name in sentences, where that differs."""
TINIEST = 1e-6
"""A margin whose ends are both closer to 0 than this allows for rounding alone."""
SPANS = {"rank": "LoRA rank", "batch_size": "batch", "steps": "updates"}


class Setting(IntEnum):
    """Where a verdict was measured. If there are several settings, the last of them counts."""

    IN_REGIME = 0
    """Only rules of a synthetic language are new: few numbers to learn."""
    BEYOND = 1
    """Lists to memorise are new as well, or alone: exceptions, facts, exercises."""
    REAL = 2
    """A model and data that were not made by a program of this project."""


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
    verdicts: list[Verdict]

    @property
    def sweep(self) -> str:
        return self.results["sweep"]

    def says(self, claim: str) -> str:
        """Return a claim's sentence."""
        return self.word(claim, "text") or claim.replace("_", " ")

    def word(self, claim: str, kind: str) -> str:
        """Return a text field of a claim: `text`, `source`, `measure` or `note`; may be empty."""
        return self.question["claims"].get(claim, {}).get(kind) or ""

    def read(self, v: Verdict) -> str:
        """Describe the rank and number of updates at which a claim was measured; may be empty."""
        estimand = self.question["claims"].get(v.claim, {}).get("estimand")
        return (self.results.get("read") or {}).get(estimand, "")

    def curves(self, v: Verdict) -> list[dict[str, Any]]:
        """Return the curves of a verdict's group."""
        return [
            c
            for c in self.results["curves"]
            if f"{v.group}, ".startswith(f"{c['model']} on {c['dataset']}, ")
            if re.search(rf"\bsteps {c['steps']}\b", v.group) or "steps" not in v.group
        ]

    def base(self, group: str) -> str:
        """Return the base model that the name of a group begins with."""
        named = (b for b in self.bases if group.startswith((f"{b},", f"{b} on ")))
        return next(named, group.partition(",")[0])

    def width(self, group: str) -> int:
        """Return the hidden size of a group's base model; of the widest one if it is unknown."""
        mine = self.runs["model"] == self.base(group)
        return int(self.runs[mine if mine.any() else slice(None)]["hidden_size"].max())

    def where(self, v: Verdict, rank: Callable[[Sequence[float]], float] = max) -> str:
        """Name the base, the data, the rank and the number of updates of a verdict."""
        curves = self.curves(v)
        if not curves:
            cells = self.results["cells"] if self.sweep == "regime" else []
            length = [f"{c['updates']} updates" for c in cells if c["cell"] == v.group]
            read = re.sub(
                r"rank of ([\d.]+) of the width",
                lambda m: f"rank {float(m[1]) * self.width(v.group):g}",
                self.read(v),
            )
            more = ", ".join(filter(None, [read, *length]))
            return f"{v.group} ({more})" if more else v.group
        data = (
            "only rules new"
            if self.setting(v.group) == Setting.IN_REGIME
            else called(str(curves[0]["dataset"]).partition("(")[0])
        )
        read = self.read(v).partition(";")[0]
        read = re.sub(r"\bto update (\d+)", r"after \1 updates", read)
        if "update" not in read:
            known = [c["rank"] for c in curves if c["rank"] is not None]
            one = f"rank {rank(known):g}" if known else ""
            ranks = self._compared(v) or one
            read = ", ".join(filter(None, [ranks, f"{int(curves[0]['steps'])} updates"]))
        return f"{called(curves[0]['model'])} ({data}; {read})"

    def _compared(self, v: Verdict) -> str:
        """Return the layer sets that a verdict of `layers` compares, with their ranks, or ''."""
        if self.sweep != "layers" or v.group not in (pairs := self.results.get("ranks", {})):
            return ""
        first = self.question["claims"][v.claim]["estimand"].partition("_")[0]
        by_arm = pairs[v.group][first]
        if len(set(by_arm.values())) == 1:
            return f"rank {max(by_arm.values())}"
        return listed([f"{called(layers)} at rank {rank}" for layers, rank in by_arm.items()])

    def parameters_an_episode(self, v: Verdict) -> float | None:
        """Return the lowest rank's parameters per sampled completion; None without RL of LoRA."""
        lora = [c for c in self.curves(v) if c["method"] == "lora"]
        lora = [c for c in lora if c.get("objective") == "policy_gradient"]
        if not lora:
            return None
        lowest = min(lora, key=lambda c: c["rank"])
        keys = ["model", "dataset", "steps", "batch_size", "method", "rank", "objective"]
        runs = self.runs.merge(pd.DataFrame([{k: lowest[k] for k in keys}]), on=keys)
        return float((runs["n_trainable"] / (runs["batch_size"] * runs["steps"])).mean())

    @property
    def single(self) -> list[Verdict]:
        """The verdicts on conditions that were run (a claim without any has the group NO_CELL)."""
        return [v for v in self.verdicts if v.group != NO_CELL]

    @property
    def exploratory(self) -> bool:
        """Whether all verdicts of the answer are exploratory."""
        return all(v.exploratory for v in self.verdicts)

    def setting(self, group: str) -> Setting:
        """Return the setting of a verdict's group; of all runs if the group names no data set.

        The name of a group of several tasks joins their names by " and ".
        """
        if not len(self.runs):
            return Setting.BEYOND
        found = [
            setting
            for model, (setting, names) in self._settings
            for task in group.split(" and ")
            if any(task == model + n or task.startswith(f"{model}{n},") for n in names)
        ]
        return max(found or [setting for _, (setting, _) in self._settings])

    @functools.cached_property
    def _settings(self) -> list[tuple[str, tuple[Setting, tuple[str, ...]]]]:
        """The setting of each model and data set, and the names of the data set in groups."""
        datasets = self.runs["spec"].map(lambda spec: json.dumps(json.loads(spec)["dataset"]))
        found = []
        for model, text in set(zip(self.runs["model"], datasets)):
            dataset = json.loads(text)
            novelty = novelty_of(dataset)
            names: tuple[str, ...] = (f" on {dataset['name']}", f", {dataset['name']}")
            setting = Setting.BEYOND if dataset["source"] == "synthetic" else Setting.REAL
            if novelty is not None:
                setting = Setting.IN_REGIME if novelty.low else Setting.BEYOND
                names = (*names, f", {novelty.name}")
            found.append((model, (setting, names)))
        return found

    @functools.cached_property
    def runs(self) -> pd.DataFrame:
        """The table of the answer's runs; empty if the folder has no table."""
        path = self.folder / "table.parquet"
        return pd.read_parquet(path) if path.is_file() else pd.DataFrame()

    @property
    def run_ids(self) -> set[str]:
        return set(self.runs.get("run_id", ()))

    @property
    def bases(self) -> list[str]:
        return sorted(self.runs["model"].unique()) if len(self.runs) else []

    @property
    def size(self) -> int:
        """Number of parameters of the largest base model."""
        return int(self.runs["n_trainable"].max()) if "n_trainable" in self.runs else 0

    @property
    def trained(self) -> str:
        """The runs in words: models with their size, data, ranks, batch, updates."""
        table = self.runs
        if not len(table):
            return "-"
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
        ends = {int(c["steps"]) for c in self.results.get("curves") or [] if c.get("steps")}
        if table["steps"].nunique() == 1 and ends and max(ends) < table["steps"].max():
            said[-1] += f" (judged after {max(ends)}, before the task was solved)"
        rows = self.results.get("held_out")
        return ", ".join([*said, *([f"held-out rows {rows}"] if rows else [])])


# ---------------------------------------------------------------- read


def read_answers(folders: Sequence[Path], names: Collection[str] | None = None) -> list[Answer]:
    """Read answers by name (None: all), in ORDER; of two with one name, the first folder's."""
    found: dict[str, Answer] = {}
    for root in folders:
        for path in sorted(root.glob("*/results.json")):
            if names is not None and path.parent.name not in names:
                continue
            results = json.loads(path.read_text())
            question = read_question(path.parent)
            verdicts = [verdict_of(plain) for plain in results["verdicts"]]
            found.setdefault(path.parent.name, Answer(path.parent, results, question, verdicts))

    def place(a: Answer) -> tuple[int, str, str]:
        known = ORDER.index(a.sweep) if a.sweep in ORDER else len(ORDER)
        return known, a.sweep, a.results["scale"]

    return sorted(found.values(), key=place)


def estimate_of(plain: dict[str, Any]) -> Estimate:
    """Read an estimate from results.json."""
    return Estimate(**{**plain, "flags": tuple(plain["flags"])})


def verdict_of(plain: dict[str, Any]) -> Verdict:
    """Read a verdict from results.json; older results have no gates."""
    gates = tuple(map(gate_of, plain.get("gates", ())))
    known = {"estimate": estimate_of(plain["estimate"]), "margin": tuple(plain["margin"])}
    return Verdict(**{**plain, **known, "gates": gates})


def rows_of(answers: Sequence[Answer]) -> list[list[str]]:
    """Return the table of all claims for a terminal, one row per claim after the head."""
    rows = [
        ["claim", "scale", "expected", "measured [interval]", "verdict", "runs", "still needed"]
    ]
    for a in answers:
        many = len({v.group for v in a.verdicts}) > 1
        for v in a.verdicts:
            where = f", {v.group}" if many else ""
            rows.append(
                [
                    f"{a.sweep}: {v.claim}{' (primary)' if v.primary else ''}{where}",
                    a.results["scale"],
                    f"{v.expected:g}, within {within(v.margin)}",
                    with_interval(v.estimate),
                    v.shown,
                    str(a.results.get("runs", "-")),
                    v.needed or "-",
                ]
            )
    return rows


def listed(words: Sequence[str]) -> str:
    """Join words by commas and a last "and"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def called(name: str) -> str:
    """Return the name of a base model, layer set or data set in sentences."""
    return NAMES.get(name, name)


def within(margin: tuple[float, float]) -> str:
    """Return a claim's margin in words."""
    low, high = margin
    if -TINIEST < low < 0 < high < TINIEST:
        return "0, to rounding"
    if high >= FAR:
        return f"{low:g} and more"
    return f"up to {high:g}" if low <= -FAR else f"{low:g} to {high:g}"


# ---------------------------------------------------------------- averages over bases

MIN_BASES = 3
"""With two bases, the random-effects interval has one degree of freedom and is too wide."""


@dataclass(frozen=True)
class Pooled:
    """The average of one claim's estimates over bases."""

    bases: tuple[str, ...]
    estimate: Estimate
    """No value if fewer than MIN_BASES bases remain."""
    one: tuple[Answer, Verdict]
    """One of the averaged verdicts, with the answer that it is from."""
    left_out: tuple[str, ...] = ()
    """Bases of which every verdict on the claim has a gate."""


def pooled(answers: Sequence[Answer]) -> list[Pooled]:
    """Average every claim that has intervals on MIN_BASES bases of one scale and one setting.

    The average is a random-effects mean over bases, without gated estimates. Of several answers on
    one base, the one with the most runs counts. Exploratory and confirmatory verdicts are never
    mixed. The level is the highest level of the single intervals, because of interim analyses.
    Standard errors are half-widths over the Normal quantile. With few seeds the half-widths are
    Student's, so these errors are rather too large.
    """
    found: dict[tuple, dict[str, tuple[Answer, Verdict]]] = {}
    for a in sorted(answers, key=lambda a: -int(a.results.get("runs", 0))):
        claims = [v.claim for v in a.verdicts]
        for v in a.verdicts:
            e, to = v.estimate, scale_of(v.log)
            # A bound, or an exact count, has no error that could be averaged.
            unknown = e.value is None or not e.has_interval() or AT_LEAST in e.flags
            if unknown or not -math.inf < to(e.interval[0]) < to(e.interval[1]):
                continue
            if claims.count(v.claim) == 1 and len(a.bases) == 1:
                scale, setting = a.results["scale"].partition("_")[0], a.setting(v.group)
                key = (a.sweep, v.claim, scale, setting, bool(v.exploratory))
                mine, base = found.setdefault(key, {}), a.bases[0]
                if base not in mine or (mine[base][1].gates and not v.gates):
                    mine[base] = (a, v)
    out = []
    for by_base in (mine for mine in found.values() if len(mine) >= MIN_BASES):
        judged = {base: one for base, one in by_base.items() if not one[1].gates}
        left_out = tuple(sorted(by_base.keys() - judged.keys()))
        bases, one = tuple(sorted(judged)), next(iter((judged or by_base).values()))
        if len(judged) < MIN_BASES:
            out.append(Pooled(bases, Estimate(None), one, left_out))
            continue
        to, estimates = scale_of(one[1].log), [v.estimate for _, v in judged.values()]
        level = max(e.level for e in estimates)
        widths = [to(e.interval[1]) - to(e.interval[0]) for e in estimates]
        errors = [
            width / 2 / float(stats.norm.ppf(0.5 + e.level / 2))
            for width, e in zip(widths, estimates)
        ]
        over = random_effects([to(float(e.value or 0.0)) for e in estimates], errors, level)
        estimate = Estimate(over.mean, over.low, over.high, over.k, level=level)
        out.append(Pooled(bases, exp_of(estimate) if one[1].log else estimate, one, left_out))
    return out

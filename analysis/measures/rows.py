"""Flat rows: one for each judged claim, and one for each quantity measured on a curve or condition.

Pages, figures, findings, the ledger and the adviser read these rows. No other module of the report
interprets the keys of results.json, from which the rows are made.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.decide import Verdict, gate_of
from analysis.inference.estimate import Estimate
from analysis.measures.regret import novelty_of
from analysis.runs.curves import LrCurve, full_names
from analysis.runs.table import CURVE_KEYS


class Setting(IntEnum):
    """Where a row was measured. If there are several settings, the last of them counts."""

    IN_REGIME = 0
    """Only rules of a synthetic language are new: few numbers to learn."""
    BEYOND = 1
    """Lists to memorise are new as well, or alone: exceptions, facts, exercises."""
    REAL = 2
    """A model and data that were not made by a program of this project."""


@dataclass(frozen=True)
class Row:
    """A measured quantity; with `verdict`, the judged claim about it."""

    sweep: str
    scale: str
    task: str
    """The condition, as the question names it."""
    base: str
    """Base model; several are joined by " and "."""
    data: str
    """Data set of the condition, or what is new in it."""
    setting: Setting
    quantity: str
    """Estimand of a claim; otherwise a name such as best_lr or regret_percent."""
    estimate: Estimate
    arm: str = ""
    """Name of the curve, unique in its task; empty: not of one curve."""
    rank: int | None = None
    batch_size: int | None = None
    updates: int | None = None
    alpha: float | None = None
    at: str = ""
    """Rank and number of updates of a claim's quantity in words; empty: not known."""
    verdict: Verdict | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)
    """The claim as in question.json: its text, source, measure and note."""

    @property
    def claim(self) -> str:
        """Name of the claim; empty without a verdict."""
        return self.verdict.claim if self.verdict else ""

    @property
    def says(self) -> str:
        """The claim's sentence."""
        return self.asked.get("text") or self.claim.replace("_", " ")

    def plain(self) -> dict[str, Any]:
        """Return the row's cells, by column, with six digits; None: not known."""
        e, v = self.estimate, self.verdict
        known = {k: getattr(self, k) for k in COLUMNS if hasattr(self, k)}
        known |= {k: getattr(e, k) for k in ("value", "low", "high", "level")}
        known |= {"setting": self.setting.name, "flags": " ".join(e.flags)}
        if v is not None:
            known |= {k: getattr(v, k) for k in ("expected", "primary", "exploratory")}
            known |= {"outcome": v.not_asked or v.outcome}
            known |= {"margin_low": v.margin[0], "margin_high": v.margin[1]}
            known |= {"source": self.asked.get("source"), "why": v.why, "needed": v.needed}
            known |= {"gates": " ".join(g.code.name for g in v.gates)}
        digits = {k: f"{v:.6g}" for k, v in known.items() if isinstance(v, float)}
        return {k: digits.get(k, known.get(k)) for k in COLUMNS}


COLUMNS = (
    *("sweep", "scale", "base", "data", "setting", "task", "arm", "rank", "batch_size", "updates"),
    *("alpha", "at", "quantity", "value", "low", "high", "level", "flags", "claim", "source"),
    *("primary", "expected", "margin_low", "margin_high", "outcome", "gates", "exploratory"),
    *("why", "needed"),
)
"""Columns of a table of rows. `gates`, `flags`: names with spaces between them."""


def csv_of(rows: Iterable[Row]) -> str:
    """Return rows as a table in CSV; a cell that is not known is empty."""
    table = pd.DataFrame([r.plain() for r in rows], columns=COLUMNS, dtype=object)
    return table.to_csv(index=False, lineterminator="\n")


def pick(rows: Iterable[Row], quantity: str = "", **values: Any) -> list[Row]:
    """Return the rows of a quantity (empty: any) with the given values of attributes."""
    wanted = {**({"quantity": quantity} if quantity else {}), **values}
    return [r for r in rows if all(getattr(r, k) == v for k, v in wanted.items())]


def estimate_of(plain: Mapping[str, Any] | None) -> Estimate:
    """Read an estimate from results.json."""
    return Estimate(**{**plain, "flags": tuple(plain["flags"])}) if plain else Estimate(None)


def rows_of(
    results: Mapping[str, Any], question: Mapping[str, Any], runs: pd.DataFrame
) -> list[Row]:
    """Return the rows of an answer: of its curves, its other measurements, and its verdicts.

    `results`: results.json. `question`: question.json, with today's keys. `runs`: the table of
    runs; without columns, settings and parameters are not known.
    """
    made = _Maker(results, question, runs)
    return [*made.of_curves(), *made.of_conditions(), *made.of_verdicts()]


class _Maker:
    def __init__(
        self, results: Mapping[str, Any], question: Mapping[str, Any], runs: pd.DataFrame
    ) -> None:
        self.results, self.question, self.runs = results, question, runs
        self.bases = sorted({*runs.get("model", ()), *(c["base"] for c in self.cells("base"))})
        self.settings = _settings(runs)
        none = np.empty(0)
        keys = [{k: c[k] for k in CURVE_KEYS if k in c} for c in results["curves"]]
        curves = [LrCurve(key, none, none, none, none, none, math.nan, math.nan) for key in keys]
        names: dict[int, str] = {}  # by method, rank and the settings that differ in the group
        for group in {c.group for c in curves}:
            mine = [k for k, c in enumerate(curves) if c.group == group]
            names |= zip(mine, full_names([curves[k] for k in mine]))
        self.curves = [(names[k], c) for k, c in enumerate(curves)]
        self.updates = {c["cell"]: c["updates"] for c in self.cells("updates")}

    def cells(self, key: str) -> list[dict[str, Any]]:
        """Return the question's conditions, if they have a key."""
        return [c for c in self.results.get("cells") or () if key in c]

    def row(self, task: str, quantity: str, e: Estimate, **more: Any) -> Row:
        bases, data = _parts(task, self.bases)
        known = (self.results["sweep"], self.results["scale"], task)
        base = " and ".join(bases or self.bases)
        return Row(*known, base, data, _setting(task, self.settings), quantity, e, **more)

    def place(self, k: int) -> dict[str, Any]:
        """Return the columns that name the k-th curve."""
        name, curve = self.curves[k]
        key = {n: None if v != v else v for n, v in curve.key.items()}
        whole = ("rank", "batch_size", "steps")
        rank, batch, steps = (None if (v := key.get(n)) is None else int(v) for n in whole)
        place = {"arm": name, "rank": rank, "batch_size": batch, "updates": steps}
        return {**place, "alpha": key.get("alpha")}

    def of_curves(self) -> Iterator[Row]:
        for k, c in enumerate(self.results["curves"]):
            place, task = self.place(k), self.curves[k][1].group
            best = Estimate(c["best_lr"], c["low"], c["high"], c["n"], tuple(c["flags"]))
            yield self.row(task, "best_lr", best, **place)
            yield self.row(task, "best_loss", Estimate(c["best_nll"]), **place)
            if c["band"]:
                yield self.row(task, "lr_band", Estimate(None, *c["band"]), **place)
            rewarded = c["method"] == "lora" and c.get("objective") == "policy_gradient"
            if rewarded and "n_trainable" in self.runs:
                names = ("model", "dataset", "steps", "batch_size", "method", "rank")
                keys = [k for k in (*names, "objective", "layers") if k in self.runs and k in c]
                mine = self.runs.merge(pd.DataFrame([{k: c[k] for k in keys}]), on=keys)
                each = mine["n_trainable"] / (mine["batch_size"] * mine["steps"])
                ratio = Estimate(float(each.mean()))
                yield self.row(task, "parameters_an_episode", ratio, **place)
        for r in self.results.get("ratios") or ():
            place = {"alpha": r["alpha"]} if r["at"] is None else self.place(r["at"])
            task = r["group"] if r["at"] is None else self.curves[r["at"]][1].group
            yield self.row(task, "lr_ratio", estimate_of(r["ratio"]), **place)
            gain = self._gain(task)
            for rule, nats in r["regrets"].items():
                yield self.row(task, f"nats lost at {rule}", Estimate(nats), **place)
                percent = None if nats is None or not gain else 100 * nats / gain
                yield self.row(task, f"% of the gain lost at {rule}", Estimate(percent), **place)

    def _gain(self, task: str) -> float | None:
        """Return how much full fine-tuning lowers the loss of the base model in a task, in nats."""
        for c, (_, curve) in zip(self.results["curves"], self.curves):
            known = c["best_nll"] is not None and "nll_start" in self.runs
            if curve.group == task and c["method"] == "fullft" and known:
                same = self.runs[["model", "dataset"]].eq([c["model"], c["dataset"]]).all(axis=1)
                return float(self.runs[same]["nll_start"].mean() - c["best_nll"])
        return None

    def of_conditions(self) -> Iterator[Row]:
        for c in self.cells("ranks"):
            place: dict[str, Any] = {"batch_size": c.get("batch_size"), "updates": c["updates"]}
            for count, bits in (c.get("bits") or {}).items():
                yield self.row(c["cell"], f"bits, {count}", Estimate(bits), **place)
                load = estimate_of(c["loads_needed"][count])
                yield self.row(c["cell"], f"load at the needed rank, {count}", load, **place)
            needed = estimate_of(c.get("rank_interpolated"))
            yield self.row(c["cell"], "needed_rank", needed, **place)
            for r in c["ranks"]:
                arm = {**place, "arm": f"lora r{r['rank']}", "rank": int(r["rank"])}
                for count, load in (r.get("loads") or {}).items():
                    yield self.row(c["cell"], f"load, {count}", Estimate(load), **arm)
                e = estimate_of(r["regret_percent"])
                yield self.row(c["cell"], "regret_percent", e, **arm)
                if early := r.get("gap_nats_first"):
                    ends = ("value", "low", "high")
                    share = {k: early[k] and 100 * early[k] / r["gain_nats"] for k in ends}
                    e = estimate_of({**early, **share})
                    yield self.row(c["cell"], "regret_percent_first", e, **arm)
        whole = next((v["group"] for v in self.results["verdicts"]), "")
        for r in self.results.get("regrets") or ():
            place = {k: r[k] for k in ("batch_size", "updates", "rank")}
            e = estimate_of(r["regret_percent"])
            name = f"lora r{r['rank']}" + (f", {r['schedule']}" if "schedule" in r else "")
            yield self.row(whole, "regret_percent", e, arm=name, **place)
            if r.get("since"):
                e, place["at"] = estimate_of(r["growth_percent"]), f"since {r['since']} updates"
                yield self.row(whole, "regret_growth_percent", e, arm=name, **place)
        for quantity in ("batch_effect", "batch_effect_at_equal_examples"):
            for rank, plain in (self.results.get(quantity) or {}).items():
                arm = {"arm": f"lora r{rank}", "rank": int(rank)}
                yield self.row(whole, quantity, estimate_of(plain), **arm)
        rules = {"errors": "rms_error", "carried": "carried_cost", "from_full": "cost_from_full"}
        for key, quantity in rules.items():
            for arm, plain in (self.results.get(key) or {}).items():
                yield self.row(whole, quantity, estimate_of(plain), arm=arm)
        for d in self.results.get("direct") or ():
            place, e = self._at(d["of"], d["group"]), estimate_of(d["speed"])
            yield self.row(d["group"], f"{d['of']}, counted directly", e, **place)
        for c in self.cells("law"):
            place = {"alpha": c["alpha"], "updates": c["steps"]}
            name = "measured_over_law" if c["b_ratio"] == 1 else "measured_over_law, A frozen"
            yield self.row(c["unit"], name, Estimate(c["ratio"] / c["law"]), **place)

    def of_verdicts(self) -> Iterator[Row]:
        for plain in self.results["verdicts"]:
            gates = tuple(map(gate_of, plain.get("gates", ())))  # older results have none
            read = {"estimate": estimate_of(plain["estimate"]), "margin": tuple(plain["margin"])}
            v = Verdict(**{**plain, **read, "gates": gates})
            asked = self.question["claims"].get(v.claim, {})
            quantity = asked.get("estimand", v.claim)
            place = self._at(quantity, v.group)
            yield self.row(v.group, quantity, v.estimate, **place, verdict=v, asked=asked)

    def _at(self, quantity: str, task: str) -> dict[str, Any]:
        """Return the rank and the number of updates of an estimand in a task, also in words."""
        said = (self.results.get("read") or {}).get(quantity, "")
        # The curves of a task, which may name less than a group, more, or several.
        tasks = [f"{p.partition(';')[0]}, " for p in task.split(" and ")]
        known = [c.key for _, c in self.curves if f"{c.group}, ".startswith(tuple(tasks))]
        every = (self.results.get("compared") or {}).get(task)  # without estimands that lack an arm
        compared = (every or {}).get(quantity, ())
        lora = [c for c in (self.results["curves"][k] for k in compared) if c["method"] == "lora"]
        arms = {c["layers"]: int(c["rank"]) for c in lora}
        if len(arms) < 2 <= len({int(c["rank"]) for c in lora}):  # ranks of one layer set
            arms = {}
        ranks = sorted({int(v) for k in known if (v := k.get("rank")) == v is not None})
        ranks = sorted(set(arms.values())) or (ranks if lora or every is None else [])
        of = [c["about"].get(quantity) for c in self.cells("about") if c["cell"] == task]
        ranks = [rank for rank in of if rank] or ranks
        said = said or "full fine-tuning" * (bool(compared) and not lora)
        lengths = {self.updates[task]} if task in self.updates else {int(k["steps"]) for k in known}
        if len(ranks) > 1 and arms:
            said = " and ".join(f"{arm} at rank {r}" for arm, r in arms.items())
        rank = ranks[0] if len(ranks) == 1 else None
        words = [said or (f"rank {rank}" if rank else "")]
        if lengths and not re.search("update|example", said):
            ends = dict.fromkeys((min(lengths), max(lengths)))
            words.append(f"{' to '.join(map(str, ends))} updates")
        sizes = {k["batch_size"] for k in known}
        batch = int(sizes.pop()) if len(sizes) == 1 else None
        updates = lengths.pop() if len(lengths) == 1 else None
        at = ", ".join(filter(None, words))
        return {"rank": rank, "updates": updates, "batch_size": batch, "at": at}


def _parts(task: str, bases: Sequence[str]) -> tuple[list[str], str]:
    """Return the base models that a task names, and its data sets (or what is new in them)."""
    found: dict[str, None] = {}
    data: dict[str, None] = {}
    for part in task.split(" and "):
        base = next((b for b in bases if part == b or part.startswith((f"{b},", f"{b} on "))), "")
        rest = part.removeprefix(base).removeprefix(" on ").removeprefix(", ")
        name = re.match(r"(\w+)(\(|, batch|, policy|$)", rest)
        found |= {base: None} if base else {}
        data[name[1] if name else rest] = None
    return list(found), " and ".join(data)


def _settings(runs: pd.DataFrame) -> list[tuple[str, Setting, tuple[str, ...]]]:
    """Return each model and data set of a table: its setting, and its names in tasks."""
    if "spec" not in runs:
        return []
    datasets = runs["spec"].map(lambda spec: json.dumps(json.loads(spec)["dataset"]))
    found = []
    for model, text in sorted(set(zip(runs["model"], datasets))):
        dataset = json.loads(text)
        novelty = novelty_of(dataset)
        names: tuple[str, ...] = (f" on {dataset['name']}", f", {dataset['name']}")
        setting = Setting.BEYOND if dataset["source"] == "synthetic" else Setting.REAL
        if novelty is not None:
            setting = Setting.IN_REGIME if novelty.low else Setting.BEYOND
            names = (*names, f", {novelty.name}")
        found.append((model, setting, names))
    return found


def _setting(task: str, known: Sequence[tuple[str, Setting, tuple[str, ...]]]) -> Setting:
    """Return the setting of a task; of all runs if it names no data set."""
    parts = task.split(" and ")
    found = [
        setting
        for model, setting, names in known
        for part in parts
        if any(part == model + n or part.startswith(f"{model}{n},") for n in names)
    ]
    return max(found or [setting for _, setting, _ in known], default=Setting.BEYOND)

"""Question: how many bits a LoRA parameter stores.

Every fact has exactly 16 bits. Bits stored = facts x symbols x (ln 16 - NLL per symbol on the
trained facts) / ln 2. They are divided by the adapter's effective parameters. Each number of facts
and exposures (how often training shows each fact) is at the best learning rate tried.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.decide import MIN_SEEDS, Gate, GateCode
from analysis.inference.estimate import AT_LEAST, Estimate, exactly, from_sample, rate
from analysis.inference.rows import Row
from analysis.questions import base
from analysis.runs.curves import lr_curves
from analysis.runs.table import TableError

SYMBOLS, VALUES, ROW = 4, 16, 8
"""Symbols per value, values per symbol, facts per row (lorasweep/data/synthetic/facts.py)."""
CONVERGED = 0.1
"""Bits stored count as converged if the last increase in exposures added at most this share."""
PLAUSIBLE = 0.9
"""The task is possible if full fine-tuning stores at least this share of the facts' bits."""


@dataclass(frozen=True)
class Load:
    """Runs with one number of facts and of exposures of each fact, at the best LR tried."""

    facts: int
    exposures: float
    method: str
    lr: float
    bits: list[float]
    """Bits stored, summed over all facts, by seed."""
    unseen: list[float]
    """Bits known per fact, for facts that were not trained on."""
    parameters: int
    at_edge: bool

    @property
    def load(self) -> float:
        """Bits to be stored / (2 bits x effective parameters)."""
        return 16 * self.facts / (2 * self.parameters)

    @property
    def share(self) -> float:
        """Share of the facts' bits that is stored."""
        return float(np.mean(self.bits) / (16 * self.facts))


def effective(spec: dict[str, Any]) -> int:
    """Return the number of effective parameters of a run: all trained weights of full fine-tuning.

    With LoRA it is r (m + n) - r^2 per matrix, the dimension of the set of m x n matrices of rank
    r: r^2 parameters of A and B are redundant.
    """
    m, method = spec["model"], spec["method"]
    h, f, v = m["hidden_size"], m["mlp_size"], m["vocab_size"]
    q, kv = m["n_heads"] * m["head_size"], m["n_kv_heads"] * m["head_size"]
    shapes = {
        "attention": [(h, q), (h, kv), (h, kv), (q, h)],
        "mlp": [(h, f), (h, f), (f, h)],
        "unembedding": [(h, v)],
    }
    total = 0
    for layer_set in method["layers"].split("+") if method["layers"] != "all" else shapes:
        count = 1 if layer_set == "unembedding" else m["n_layers"]
        for a, b in shapes[layer_set]:
            r = method.get("rank") or 0
            total += count * (r * (a + b) - r * r if method["name"] == "lora" else a * b)
    return total


def bits(nll: float, facts: float = 1.0) -> float:
    """Return the bits known about `facts` facts, given the NLL per symbol in nats."""
    return facts * SYMBOLS * (math.log(VALUES) - nll) / math.log(2)


def loads_of(table: pd.DataFrame) -> list[Load]:
    """Split a table into loads, each at the best LR of the seed that ran at the most LRs."""
    facts = [int(json.loads(text)["dataset"]["knobs"]["facts"]) for text in table["spec"]]
    exposures = table["steps"] * table["batch_size"] * ROW / facts
    runs = table.assign(facts=facts, exposures=exposures)
    found = []
    for (method, n, times), part in runs.groupby(["method", "facts", "exposures"]):
        done = part[part["status"] == "done"]
        if not len(done):
            continue
        first = done[done["seed"] == done["seed"].value_counts().index[0]]
        best = first.loc[first["test_nll"].idxmin()]
        lr, at = float(best["lr"]), done[done["lr"] == best["lr"]]
        stored = [bits(v, n) for v in at["test_nll"]]
        unseen = [bits(v) for v in at["retain_nll"].dropna()]
        size, at_edge = effective(json.loads(best["spec"])), lr in (part.lr.min(), part.lr.max())
        found.append(Load(int(n), float(times), method, lr, stored, unseen, size, at_edge))
    return found


@dataclass(frozen=True)
class Facts(base.Condition):
    """All runs of one model, as `loads`."""

    loads: list[Load]
    data = "facts of 16 bits"

    @property
    def of_lora(self) -> list[Load]:
        return [c for c in self.loads if c.method == "lora"]

    @property
    def seeds(self) -> int:
        return min((len(c.bits) for c in self.of_lora), default=0)

    @property
    def at_100(self) -> list[Load]:
        """LoRA's loads with about 100 exposures of each fact."""
        return [v for v in self.of_lora if 70 <= v.exposures <= 140]

    def gates(self, loads: Sequence[Load], grown: bool = False) -> list[Gate]:
        """List the gates of the load with the most bits per parameter, and of the task.

        `grown`: also whether more exposures would store more bits.
        """
        stored = [c.share for c in self.loads if c.method == "fullft"]
        gates = [] if stored else base.missing("fullft to certify the task")
        if stored and max(stored) < PLAUSIBLE:
            share = f"{max(stored):.0%} of the bits, {PLAUSIBLE:.0%} needed"
            gates.append(Gate(GateCode.TASK, f"full fine-tuning stores {share}"))
        best = _fullest(loads)
        place = f"{best.facts} facts x {best.exposures:.0f}: "
        if len(best.bits) < MIN_SEEDS:
            gates.append(Gate(GateCode.FEW_SEEDS, len(best.bits), place))
        if best.at_edge:
            gates.append(Gate(GateCode.FLAGGED, place=place, flags=("at_edge",)))
        same = (c for c in loads if c.facts == best.facts)
        fewer = (c for c in same if c.exposures < best.exposures)
        if grown and (before := max(fewer, key=lambda c: c.exposures, default=None)):
            gain = 1 - np.mean(before.bits) / np.mean(best.bits)
            if gain > CONVERGED:
                why = f"exposures still add {gain:.0%} to {before.exposures:.0f}"
                gates.append(Gate(GateCode.NOT_CONVERGED, f"{best.exposures:.0f} {why}"))
        return gates


def _fullest(loads: Sequence[Load]) -> Load:
    return max(loads, key=lambda c: np.mean(c.bits) / c.parameters)


def most(loads: Sequence[Load]) -> Estimate | None:
    """Return the most bits per parameter over loads, as a geometric mean over seeds."""
    if not loads:
        return None
    best = _fullest(loads)
    return from_sample([max(b, 1e-9) / best.parameters for b in best.bits], log=True)


def conditions(table: pd.DataFrame) -> list[Facts]:
    """Return the one condition of a model; TableError if curves of a method differ in rank, etc."""
    base.check_same(lr_curves(table), "dataset", "steps")
    if any(json.loads(text)["dataset"]["location"] != "facts" for text in table["spec"]):
        raise TableError("capacity counts the bits of facts: it needs dataset=facts.")
    return [Facts(f"{table['model'].iloc[0]}, {Facts.data}", table, [], loads_of(table))]


ESTIMANDS = [
    base.Estimand(
        "bits_per_parameter",
        lambda c: most(c.of_lora),
        lambda c: c.gates(c.of_lora, grown=True),
        absent="lora",
        log=True,
    ),
    base.Estimand(
        "bits_at_100",
        lambda c: most(c.at_100),
        lambda c: c.gates(c.at_100),
        absent="about 100 exposures",
        log=True,
    ),
    base.Estimand(
        "unseen_bits",
        lambda c: (
            exactly(max(u), len(u)) if (u := [b for v in c.loads for b in v.unseen]) else None
        ),
        absent="unseen facts",
    ),
]


def report(asked: base.Asked, c: Facts) -> tuple[list[Row], list[base.Section]]:
    """Return the bits stored at every load, and their figure."""
    rows: list[list[Any]] = []
    for v in c.loads:
        lr = rate(v.lr) + (" (edge)" if v.at_edge else "")
        per_parameter, unseen = np.mean(v.bits) / v.parameters, max(v.unseen, default=None)
        stored = [from_sample(v.bits), f"{v.share:.0%}", per_parameter, unseen]
        rows.append([v.method, v.facts, v.load, v.exposures, lr, *stored])

    by_load: dict[str, dict[float, Estimate]] = {}
    for v in sorted(c.of_lora, key=lambda v: (round(v.exposures, -1), v.load)):
        # At an edge of the LRs tried, an LR beyond the edge may store more bits.
        flags = (AT_LEAST,) if v.at_edge else ()
        e = from_sample([b / v.parameters for b in v.bits], flags=flags)
        by_load.setdefault(f"{round(v.exposures, -1):g} exposures", {})[v.load] = e
    margins = {v["estimand"]: tuple(v["margin"]) for v in asked["claims"].values()}
    look: dict[str, Any] = {"lines": {"2 bits": 2.0}, "ticks": None, "y_range": (-0.3, 2.9)}
    y, look["band"] = "bits stored / effective parameter", margins.get("bits_per_parameter")
    load = "bits to store / (2 bits x parameters)"
    panels = [base.panel_over(load, "by load", y, by_load, **look)]
    head = (
        "arm | facts | load at 2 bits | exposures | best LR tried | bits stored [95%] | of all | "
        "bits / parameter | bits known of unseen facts"
    )
    text = [
        *(f"Effective parameters of the adapter: {v.parameters:,}." for v in c.of_lora[:1]),
        "A model that is sure of a wrong value has a high NLL, so the bits known of facts that "
        "it was never trained on are below 0. Verdicts use the geometric mean over seeds. An "
        "update shows 128 facts: with few facts, each comes more than once in an update, and many "
        "exposures take few updates.",
    ]
    caption = "bits stored per parameter, over load"
    loads = base.Section.of("Loads", head, rows, text, "capacity.png", panels, caption)
    return [], [loads]


QUESTION = base.Question(ESTIMANDS, conditions, report, split_by=("model",))

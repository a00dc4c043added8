"""Question: how many bits a LoRA parameter stores.

Every fact has exactly 16 bits. Bits stored = facts x symbols x (ln 16 - NLL on the trained facts) /
ln 2. They are divided by the adapter's effective parameters, r (m + n) - r^2 per matrix: the
dimension of the set of m x n matrices of rank r (r^2 parameters of A and B are redundant). Each
cell (facts, exposures) is at the best rate tried.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.estimate import AT_LEAST, Estimate, exactly, number, rate, with_interval
from analysis.inference.gates import MIN_SEEDS, Gate, GateCode
from analysis.inference.seeds import from_sample
from analysis.questions.base import (
    Analysis,
    Panel,
    Section,
    Series,
    claims_about,
    correct,
    judge_claims,
)

ESTIMANDS = ("bits_per_parameter", "bits_at_100", "unseen_bits")
LOG_ESTIMANDS = ("bits_per_parameter", "bits_at_100")
SYMBOLS, VALUES, ROW = 4, 16, 8
"""Symbols per value, values per symbol, facts per row (lorasweep/data/synthetic/facts.py)."""
CONVERGED = 0.1
"""The bits stored count as converged if the last increase in exposures adds at most this share."""
PLAUSIBLE = 0.9
"""Full fine-tuning must store at least this share of the facts' bits: else the task itself is
impossible."""


@dataclass(frozen=True)
class Cell:
    """A number of facts and of exposures of each, at the best rate tried."""

    facts: int
    exposures: float
    method: str
    lr: float
    bits: list[float]
    """Bits stored of all facts together, by seed."""
    unseen: list[float]
    """Bits per fact that the model appears to know of facts it was never trained on."""
    parameters: int
    at_edge: bool


def effective(spec: dict[str, Any]) -> int:
    """Return the effective parameters of a run.

    r (m + n) - r^2 per matrix with LoRA, all weights with full fine-tuning.
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


def cells_of(table: pd.DataFrame) -> list[Cell]:
    """Split a table into cells, each at the best rate of the seed that ran at the most rates."""
    specs = [json.loads(t) for t in table["spec"]]
    facts = [int(s["dataset"]["knobs"]["facts"]) for s in specs]
    runs = table.assign(
        facts=facts,
        effective=[effective(s) for s in specs],
        exposures=table["steps"] * table["batch_size"] * ROW / facts,
    )
    found = []
    for (method, n, exposures), part in runs.groupby(["method", "facts", "exposures"]):
        done = part[part["status"] == "done"]
        if not len(done):
            continue
        first = done[done["seed"] == done["seed"].value_counts().index[0]]
        best = first.loc[first["test_nll"].idxmin()]
        at = done[done["lr"] == best["lr"]]
        rates = sorted(part["lr"].unique())
        found.append(
            Cell(
                int(n),
                float(exposures),
                method,
                float(best["lr"]),
                [bits(v, n) for v in at["test_nll"]],
                [bits(v) for v in at["retain_nll"].dropna()],
                int(best["effective"]),
                best["lr"] in (rates[0], rates[-1]),
            )
        )
    return found


HEAD = (
    "arm",
    "facts",
    "load at 2 bits",
    "exposures",
    "best LR tried",
    "bits stored [95%]",
    "of all",
    "bits / parameter",
    "bits known of unseen facts",
)


def analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None = None) -> Analysis:
    """Judge the most bits per parameter, overall and at about 100 exposures, and the checks.

    The checks: full fine-tuning can store the facts, and nothing is known of unseen facts.
    """
    cells = cells_of(table)
    lora = [c for c in cells if c.method == "lora"]
    group = f"{table['model'].iloc[0]}, facts of 16 bits"
    gates = _certificate(cells)
    most, open_ = _most(lora)
    hundred, _ = _most([c for c in lora if 70 <= c.exposures <= 140])
    at_100 = [] if hundred.value is not None else [Gate(GateCode.MISSING, "about 100 exposures")]
    unseen = [b for c in cells for b in c.unseen]
    leak = exactly(max(unseen), len(unseen)) if unseen else Estimate(None)
    measured = {
        "bits_per_parameter": (most, [*gates, *open_]),
        "bits_at_100": (hundred, [*gates, *at_100]),
        "unseen_bits": (leak, [] if unseen else [Gate(GateCode.MISSING, "unseen facts")]),
    }
    seeds = min((len(c.bits) for c in lora), default=0)
    verdicts = correct(judge_claims(question, measured, LOG_ESTIMANDS, group, seeds), question)
    fields = ("method", "facts", "exposures", "lr", "bits", "parameters")
    measures = {"cells": [{k: getattr(c, k) for k in fields} for c in cells]}
    claims = claims_about(question, "bits_per_parameter")["claims"].values()
    margin = next((tuple(c["margin"]) for c in claims), None)
    return Analysis([], verdicts, [_section(cells, lora, margin)], measures)


def _certificate(cells: list[Cell]) -> list[Gate]:
    """Return gates if an arm is missing or full fine-tuning cannot store the facts either."""
    gates = [] if any(c.method == "lora" for c in cells) else [Gate(GateCode.MISSING, "lora")]
    stored = [np.mean(c.bits) / (16 * c.facts) for c in cells if c.method == "fullft"]
    if not stored:
        gates.append(Gate(GateCode.MISSING, "fullft to certify the task"))
    elif max(stored) < PLAUSIBLE:
        share, needed = f"{max(stored):.0%}", f"{PLAUSIBLE:.0%}"
        why = f"full fine-tuning stores {share} of the bits, {needed} needed"
        gates.append(Gate(GateCode.TASK, why))
    return gates


def _section(cells: list[Cell], lora: list[Cell], margin: tuple[float, float] | None) -> Section:
    rows = [list(HEAD)]
    for c in cells:
        rows.append(
            [
                c.method,
                str(c.facts),
                number(_load(c)),
                number(c.exposures),
                rate(c.lr) + (" (edge)" if c.at_edge else ""),
                with_interval(from_sample(c.bits)),
                f"{np.mean(c.bits) / (16 * c.facts):.0%}",
                number(float(np.mean(c.bits)) / c.parameters),
                number(max(c.unseen)) if c.unseen else "-",
            ]
        )
    text = [f"Effective parameters of the adapter: {lora[0].parameters:,}."] if lora else []
    text.append(
        "A model that is sure of a wrong value has a high NLL, so the bits known of facts that "
        "it was never trained on are below 0. Verdicts use the geometric mean over seeds. An "
        "update shows 128 facts: with few facts, each comes more than once in an update, and many "
        "exposures take few updates."
    )
    caption = "bits stored a parameter, over load and exposures"
    return Section("Cells", rows, text, "capacity.png", _panels(lora, margin), caption)


def _load(c: Cell) -> float:
    """Return the load: bits to be stored / (2 bits x effective parameters)."""
    return 16 * c.facts / (2 * c.parameters)


def _most(cells: list[Cell]) -> tuple[Estimate, list[Gate]]:
    """Return the most bits per parameter over all loads, and the gates on that cell.

    The gates: too few seeds, the best rate at an edge, or exposures that still add bits.
    """
    if not cells:
        return Estimate(None), [Gate(GateCode.MISSING, "lora")]
    best = max(cells, key=lambda c: np.mean(c.bits) / c.parameters)
    gates, place = [], f"{best.facts} facts x {best.exposures:.0f}: "
    if len(best.bits) < MIN_SEEDS:
        gates.append(Gate(GateCode.FEW_SEEDS, len(best.bits), place))
    if best.at_edge:
        gates.append(Gate(GateCode.FLAGGED, place=place, flags=("at_edge",)))
    fewer = [c for c in cells if c.facts == best.facts and c.exposures < best.exposures]
    if fewer:
        before = max(fewer, key=lambda c: c.exposures)
        gain = 1 - np.mean(before.bits) / np.mean(best.bits)
        if gain > CONVERGED:
            why = f"{best.exposures:.0f} exposures still add {gain:.0%} to {before.exposures:.0f}"
            gates.append(Gate(GateCode.NOT_CONVERGED, why))
    value = from_sample([max(b, 1e-9) / best.parameters for b in best.bits], log=True)
    return value, gates


def _panels(cells: list[Cell], margin: tuple[float, float] | None) -> list[Panel]:
    def line(label: str, mine: list[Cell], x: list[float]) -> Series:
        # At an edge of the rates tried, more bits may be stored beyond it.
        flags = [(AT_LEAST,) if c.at_edge else () for c in mine]
        shares = [[b / c.parameters for b in c.bits] for c in mine]
        return Series.of(label, x, [from_sample(v, flags=f) for v, f in zip(shares, flags)])

    by_exposure, by_load = [], []
    for n in sorted({c.facts for c in cells}):
        mine = sorted((c for c in cells if c.facts == n), key=lambda c: c.exposures)
        label = f"{n} facts, load {_load(mine[0]):.2g}"
        by_exposure.append(line(label, mine, [c.exposures for c in mine]))
    for e in sorted({round(c.exposures, -1) for c in cells}):
        mine = sorted((c for c in cells if round(c.exposures, -1) == e), key=lambda c: c.facts)
        if len(mine) > 1:
            by_load.append(line(f"{e:g} exposures", mine, [_load(c) for c in mine]))
    y = "bits stored / effective parameter"
    look: dict[str, Any] = {"log_x": True, "lines": {"2 bits": 2.0}, "y_range": (-0.3, 2.9)}
    load = "bits to store / (2 bits x parameters)"
    return [
        Panel("by exposures", "exposures of each fact", y, by_exposure, band=margin, **look),
        Panel("by load", load, y, by_load, band=margin, **look),
    ]

"""Question: by which reading of its rank does LoRA on experts match full fine-tuning.

Curves differ in the rank that an expert gets, in its alpha, and in whether the experts of a layer
share a factor. Each is at its own best rate, and losses are paired by seed.
"""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, Verdict, number, rate, signed, with_interval
from analysis.inference.gates import Gate, GateCode
from analysis.measures.at_best import over_seeds
from analysis.measures.ratio import ratio_of
from analysis.measures.regret import ALLOWED, Gap, gaps_of
from analysis.optimum.fit import fit_all
from analysis.optimum.optimum import Optimum
from analysis.questions.base import (
    Analysis,
    Measured,
    Panel,
    Rows,
    Section,
    Series,
    correct,
    fewest_seeds,
    full_of,
    gates_on,
    gates_on_gap,
    judge_claims,
    lora_of,
)
from analysis.runs.lr_curves import lr_curves, runs_of
from analysis.runs.table import TableError

READINGS = {
    "active": "rank / active experts",
    "all": "rank / all experts",
    "whole": "the whole rank",
    "shared": "the whole rank, one factor shared",
    "divided_alpha": "rank / active experts, alpha divided too",
}
JUDGED = ("active", "all", "whole", "shared")
DIVIDED, RATIO = "divided_over_allowed", "lr_ratio"
RATES = {"rate_of_whole": "whole", "rate_of_divided_alpha": "divided_alpha"}
"""Estimand -> the reading whose best rate is divided by that of rank / active experts."""
ESTIMANDS = (*(f"over_allowed_{r}" for r in JUDGED), DIVIDED, RATIO, *RATES)
LOG_ESTIMANDS = (RATIO, *RATES)
MATRICES = 3
"""Of an expert: gate, up and down. Each has one side of the hidden size."""


@dataclass(frozen=True)
class Cell:
    """The curves of one model and data set."""

    full: Optimum | None
    lora: dict[str, Optimum]
    """By reading."""
    gaps: dict[str, Gap]
    optima: list[Optimum]
    runs: pd.DataFrame


def analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None = None) -> Analysis:
    """Judge every claim on each model and data set, and show what each reading trains."""
    optima = fit_all(lr_curves(table))
    cells = {
        group: _cell(table, [o for o in optima if o.curve.group == group])
        for group in dict.fromkeys(o.curve.group for o in optima)
    }
    verdicts: list[Verdict] = []
    members: dict[str, list[Optimum]] = {}
    for group, cell in cells.items():
        members[group] = [o for o in (cell.full, *cell.lora.values()) if o is not None]
        seeds = fewest_seeds(members[group])
        verdicts += judge_claims(question, _measured(cell), LOG_ESTIMANDS, group, seeds)
    sections = [s for group, cell in cells.items() for s in _sections(group, cell)]
    measures = {"cells": {group: _plain(cell) for group, cell in cells.items()}}
    ratios = [
        (group, READINGS[r], ratio_of([o], cell.full))
        for group, cell in cells.items()
        if cell.full is not None
        for r, o in cell.lora.items()
    ]
    return Analysis(optima, correct(verdicts, question), sections, measures, members, False, ratios)


def _cell(table: pd.DataFrame, optima: list[Optimum]) -> Cell:
    """Sort a group's curves by reading.

    Raises:
        TableError: two curves have one reading.
    """
    whole = [o for o in optima if o.curve.key.get("scope") != "matrices"]
    full, lora = full_of(whole), {}
    for o in lora_of(optima):
        reading = _reading(o)
        if reading in lora:
            raise TableError(
                f"{o.curve.group}: two curves of the reading {READINGS[reading]!r}. Compare one "
                "rank, and one other alpha, at a time."
            )
        lora[reading] = o
    lora = {r: lora[r] for r in READINGS if r in lora}
    runs = pd.concat([runs_of(table, o.curve) for o in optima])
    gaps = [] if full is None else gaps_of(runs, [full, *lora.values()])
    return Cell(full, lora, dict(zip(lora, gaps)), optima, runs)


def _reading(o: Optimum) -> str:
    key = o.curve.key
    if key.get("expert_rank") not in ("active", "all", "whole"):
        raise TableError(
            f"{o.curve.group}: {o.curve.name} does not tell the rank of its experts (column "
            "expert_rank: active, all or whole). Ask this of a model with experts, and of its MLP."
        )
    if key["expert_alpha"] != key["alpha"]:
        return "divided_alpha"
    return "shared" if key["expert_outer"] == "shared" else str(key["expert_rank"])


# ---------------------------------------------------------------- estimands


def _measured(cell: Cell) -> Measured:
    found: Measured = {}
    for reading in JUDGED:
        gap = cell.gaps.get(reading)
        found[f"over_allowed_{reading}"] = (
            (Estimate(None), _missing(cell, reading))
            if gap is None
            else (gap.over_allowed(), gates_on_gap(gap))
        )
    found[DIVIDED] = _dividing(cell)
    found[RATIO] = _ratio(cell, "active", cell.full)
    for estimand, reading in RATES.items():
        found[estimand] = _ratio(cell, reading, cell.lora.get("active"))
    return found


def _missing(cell: Cell, *readings: str) -> list[Gate]:
    absent = [READINGS[r] for r in readings if r not in cell.lora]
    return [Gate(GateCode.MISSING, absent[0] if absent else "fullft")]


def _dividing(cell: Cell) -> tuple[Estimate, list[Gate]]:
    divided, whole = cell.gaps.get("active"), cell.gaps.get("whole")
    if divided is None or whole is None:
        return Estimate(None), _missing(cell, "active", "whole")
    lost = divided.nats.paired(whole.nats, lambda a, b: a - b)
    over = lost.paired(divided.gain, lambda nats, gain: nats - ALLOWED * gain)
    return over_seeds(over), distinct_gates(gates_on_gap(divided) + gates_on_gap(whole))


def distinct_gates(gates: Sequence[Gate]) -> list[Gate]:
    """Return the gates in order, without duplicates."""
    return list(dict.fromkeys(gates))


def _ratio(cell: Cell, reading: str, other: Optimum | None) -> tuple[Estimate, list[Gate]]:
    mine = cell.lora.get(reading)
    if mine is None or other is None:
        return Estimate(None), _missing(cell, reading, "active")
    return ratio_of([mine], other), gates_on([other, mine])


# ---------------------------------------------------------------- the report


def _sections(group: str, cell: Cell) -> list[Section]:
    rows: Rows = [
        [
            "reading",
            "trained parameters",
            "load",
            "best LR [95%]",
            "ratio to FullFT's [95%]",
            "gap (nats) [95%]",
            "regret, % of the gain [95%]",
        ]
    ]
    for reading, o in cell.lora.items():
        gap = cell.gaps.get(reading)
        ratio = Estimate(None) if cell.full is None else ratio_of([o], cell.full)
        trained = runs_of(cell.runs, o.curve)["n_trainable"].mean()
        rows.append(
            [
                READINGS[reading],
                f"{trained:,.0f}",
                number(gap.load if gap else None),
                with_interval(o.best_lr, rate),
                with_interval(ratio),
                with_interval(gap.mean(), signed) if gap else "-",
                with_interval(gap.percent()) if gap else "-",
            ]
        )
    regrets = [g.percent() for g in cell.gaps.values()]
    ticks = [(float(k), textwrap.fill(READINGS[r], 15)) for k, r in enumerate(cell.gaps)]
    series = [Series.of("", range(len(regrets)), regrets, style="o", colour=1)]
    title, band = "each at its own best rate", (-100 * ALLOWED, 100 * ALLOWED)
    panel = Panel(title, "", "regret, % of FullFT's gain", series, band=band, ticks=ticks)
    text = ["Load: bits of what is new over 2 bits for each trained parameter, where it is known."]
    return [
        Section(
            f"Readings of the rank, {group}",
            rows,
            text,
            "readings.png" if cell.gaps else "",
            [panel] if cell.gaps else [],
            "what each reading of the rank gives up",
        ),
        _counts(cell),
        _tokens(cell),
    ]


def _shape(cell: Cell, o: Optimum) -> tuple[dict[str, Any], dict[str, Any]]:
    spec = json.loads(runs_of(cell.runs, o.curve)["spec"].iloc[0])
    return spec["model"], spec["method"]


def _counts(cell: Cell) -> Section:
    """Count what is trained in the experts, beside a dense MLP as wide as the active ones."""
    rows: Rows = [
        [
            "reading",
            "rank of an expert",
            "trained in the experts",
            "per weight",
            "that a token uses",
        ]
    ]
    for reading, o in cell.lora.items():
        model, method = _shape(cell, o)
        h, i, layers = model["hidden_size"], model["mlp_size"], model["n_layers"]
        n, k = model["n_experts"], model["n_active_experts"]
        rank = (
            int(method["rank"]) // {"active": k, "all": n, "whole": 1}[o.curve.key["expert_rank"]]
        )
        per_rank = layers * MATRICES * rank
        own = o.curve.key["expert_outer"] == "own"
        whole, used = (per_rank * (count * i + (count if own else 1) * h) for count in (n, k))
        weights = layers * MATRICES * h * i
        rows.append(
            [READINGS[reading], str(rank), f"{whole:,}", number(whole / (n * weights)), f"{used:,}"]
        )
    if cell.lora:
        dense = layers * MATRICES * int(method["rank"]) * (h + k * i)
        ratio = number(dense / (k * weights))
        name = "a dense MLP as wide as the active experts"
        rows.append([name, str(method["rank"]), f"{dense:,}", ratio, f"{dense:,}"])
    text = [
        "Per weight: trained parameters over the weights of the experts. The study divides the "
        "rank to have the same ratio as in dense models."
    ]
    return Section("What is trained in the experts", rows, text)


def _tokens(cell: Cell) -> Section:
    """Show how unevenly tokens are spread over experts, whose adapters they train."""
    rows: Rows = [["curve", "layer", "fewest tokens of an expert", "most", "if all were equal"]]
    named = [("full fine-tuning", cell.full), *((READINGS[r], o) for r, o in cell.lora.items())]
    for name, o in named:
        counts = [] if o is None else _tokens_of(cell, o)
        for layer, shares in enumerate(counts):
            low, high, equal = (f"{v:.1%}" for v in (min(shares), max(shares), 1 / len(shares)))
            rows.append([name, str(layer), low, high, equal])
    text = ["Shares of a layer's training tokens, mean over the runs of a curve."]
    return Section("Tokens an expert", rows if len(rows) > 1 else [], text)


def _tokens_of(cell: Cell, o: Optimum) -> list[list[float]]:
    """Return each expert's share of the tokens, by layer; empty if it was not recorded."""
    results = [json.loads(text) for text in runs_of(cell.runs, o.curve)["result"]]
    known = [np.array(r["expert_tokens"], float) for r in results if r.get("expert_tokens")]
    if not known:
        return []
    return np.mean([k / k.sum(1, keepdims=True) for k in known], axis=0).tolist()


def _plain(cell: Cell) -> dict[str, Any]:
    return {
        reading: {
            "gap_nats": gap.mean().plain(),
            "regret_percent": gap.percent().plain(),
            "load": gap.load,
            "ratio": None if cell.full is None else ratio_of([gap.lora], cell.full).plain(),
            "token_shares": _tokens_of(cell, gap.lora),
        }
        for reading, gap in cell.gaps.items()
    }

"""Question: by which reading of its rank does LoRA on experts match full fine-tuning.

Curves differ in the rank that an expert gets, in its alpha, and in whether the experts of a layer
share a factor. Each is at its optimal learning rate, and losses are paired by seed.
"""

import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, number, rate, signed, with_interval
from analysis.inference.gates import Gate
from analysis.measures.at_best import over_seeds
from analysis.measures.ratio import ratio_of
from analysis.measures.regret import ALLOWED, Gap, gaps_of
from analysis.optimum.fit import fit_all
from analysis.optimum.optimum import Optimum
from analysis.questions import base
from analysis.runs.lr_curves import lr_curves, runs_of
from analysis.runs.table import TableError

READINGS = {
    "active": "rank / active experts",
    "all": "rank / all experts",
    "whole": "the whole rank",
    "shared": "the whole rank, one factor shared",
    "divided_alpha": "rank / active experts, alpha divided too",
}
MATRICES = 3
"""Of an expert: gate, up and down. Each has one side of the hidden size."""


@dataclass(frozen=True)
class Experts(base.Condition):
    """The curves of one model and data set."""

    whole: Optimum | None
    """Full fine-tuning of everything."""
    readings: dict[str, Optimum]
    """LoRA's curves by reading of the rank."""

    @property
    def rests(self) -> list[Optimum]:
        return [o for o in (self.whole, *self.readings.values()) if o is not None]

    @cached_property
    def gaps(self) -> dict[str, Gap]:
        """The gap to full fine-tuning by reading; empty without full fine-tuning."""
        gaps = [] if self.whole is None else gaps_of(self.runs, self.rests)
        return dict(zip(self.readings, gaps))

    def absent(self, *readings: str) -> str:
        """Name the first missing reading, or else full fine-tuning."""
        return next((READINGS[r] for r in readings if r not in self.readings), "fullft")

    def ratio(self, reading: str, other: Optimum | None) -> Estimate | None:
        """Return a reading's optimal learning rate over another curve's; None without either."""
        mine = self.readings.get(reading)
        return None if mine is None or other is None else ratio_of([mine], other)

    def settings(self, o: Optimum) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return a curve's model and method."""
        spec = json.loads(runs_of(self.runs, o.curve)["spec"].iloc[0])
        return spec["model"], spec["method"]

    def token_shares(self, o: Optimum) -> list[list[float]]:
        """Return each expert's share of the tokens, by layer; empty if it was not recorded."""
        results = [json.loads(text) for text in runs_of(self.runs, o.curve)["result"]]
        known = [np.array(r["expert_tokens"], float) for r in results if r.get("expert_tokens")]
        if not known:
            return []
        return np.mean([k / k.sum(1, keepdims=True) for k in known], axis=0).tolist()


def conditions(table: pd.DataFrame) -> list[Experts]:
    """Sort every model and data set's curves by reading.

    Raises:
        TableError: two curves have one reading.
    """
    optima, found = fit_all(lr_curves(table)), []
    for group in dict.fromkeys(o.curve.group for o in optima):
        mine = [o for o in optima if o.curve.group == group]
        full = base.full_of([o for o in mine if o.curve.key.get("scope") != "matrices"])
        lora: dict[str, Optimum] = {}
        for o in base.lora_of(mine):
            reading = _reading(o)
            if reading in lora:
                raise TableError(
                    f"{group}: two curves of the reading {READINGS[reading]!r}. Compare one rank, "
                    "and one other alpha, at a time."
                )
            lora[reading] = o
        runs = pd.concat([runs_of(table, o.curve) for o in mine])
        found.append(Experts(group, runs, mine, full, {r: lora[r] for r in READINGS if r in lora}))
    return found


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


def _over_allowed(reading: str) -> base.Estimand[Experts]:
    return base.Estimand(
        f"over_allowed_{reading}",
        lambda c: c.gaps[reading].over_allowed() if reading in c.gaps else None,
        lambda c: base.gates_on_gap(c.gaps[reading]),
        absent=lambda c: c.absent(reading),
    )


def _dividing(c: Experts) -> Estimate | None:
    """Return what dividing the rank loses minus what is allowed, in nats."""
    divided, whole = c.gaps.get("active"), c.gaps.get("whole")
    if divided is None or whole is None:
        return None
    lost = divided.nats.minus(whole.nats)
    return over_seeds(lost.paired(divided.gain, lambda nats, gain: nats - ALLOWED * gain))


def _gates_on_dividing(c: Experts) -> list[Gate]:
    both = [base.gates_on_gap(c.gaps[r]) for r in ("active", "whole")]
    return list(dict.fromkeys(gate for gates in both for gate in gates))


def _ratio(
    name: str, reading: str, other: Callable[[Experts], Optimum | None]
) -> base.Estimand[Experts]:
    """Return a reading's optimal learning rate over another curve's, as an estimand."""
    return base.Estimand(
        name,
        lambda c: c.ratio(reading, other(c)),
        lambda c: base.gates_on([o for o in (other(c), c.readings[reading]) if o]),
        absent=lambda c: c.absent(reading, "active"),
        log=True,
    )


# ---------------------------------------------------------------- the report


def sections(found: Sequence[Experts], asked: base.Asked) -> list[base.Section]:
    """Return for each model and data set the readings, what they train, and token counts."""
    return [s for c in found for s in (_readings(c), _counts(c), _tokens(c))]


def _readings(c: Experts) -> base.Section:
    head = ["reading", "trained parameters", "load", "best LR [95%]", "ratio to FullFT's [95%]"]
    rows: base.Rows = [[*head, "gap (nats) [95%]", "regret, % of the gain [95%]"]]
    for reading, o in c.readings.items():
        gap = c.gaps.get(reading)
        trained = runs_of(c.runs, o.curve)["n_trainable"].mean()
        load, lr = number(gap.load if gap else None), with_interval(o.best_lr, rate)
        ratio = with_interval(c.ratio(reading, c.whole) or base.UNKNOWN)
        nats = with_interval(gap.mean(), signed) if gap else "-"
        percent = with_interval(gap.percent()) if gap else "-"
        rows.append([READINGS[reading], f"{trained:,.0f}", load, lr, ratio, nats, percent])
    regrets = [g.percent() for g in c.gaps.values()]
    ticks = [(float(k), textwrap.fill(READINGS[r], 15)) for k, r in enumerate(c.gaps)]
    series = [base.Series.of("", range(len(regrets)), regrets, style="o", colour=1)]
    heading, band = "each at its optimal LR", (-100 * ALLOWED, 100 * ALLOWED)
    panel = base.Panel(heading, "", "regret, % of FullFT's gain", series, band=band, ticks=ticks)
    text = ["Load: bits of what is new over 2 bits for each trained parameter, where it is known."]
    return base.Section(
        f"Readings of the rank, {c.name}",
        rows,
        text,
        "readings.png" if c.gaps else "",
        [panel] if c.gaps else [],
        "regret of each reading of the rank",
    )


def _counts(c: Experts) -> base.Section:
    """Count what is trained in the experts, and in a dense MLP as wide as the active ones."""
    head = ["reading", "rank of an expert", "trained in the experts", "per weight"]
    rows: base.Rows = [[*head, "that a token uses"]]
    for reading, o in c.readings.items():
        model, method = c.settings(o)
        h, i, layers = model["hidden_size"], model["mlp_size"], model["n_layers"]
        n, k = model["n_experts"], model["n_active_experts"]
        divisor = {"active": k, "all": n, "whole": 1}[o.curve.key["expert_rank"]]
        rank = int(method["rank"]) // divisor
        per_rank = layers * MATRICES * rank
        own = o.curve.key["expert_outer"] == "own"
        whole, used = (per_rank * (count * i + (count if own else 1) * h) for count in (n, k))
        weights = layers * MATRICES * h * i
        ratio = number(whole / (n * weights))
        rows.append([READINGS[reading], str(rank), f"{whole:,}", ratio, f"{used:,}"])
    if c.readings:
        dense = layers * MATRICES * int(method["rank"]) * (h + k * i)
        ratio = number(dense / (k * weights))
        name = "a dense MLP as wide as the active experts"
        rows.append([name, str(method["rank"]), f"{dense:,}", ratio, f"{dense:,}"])
    text = [
        "Per weight: trained parameters over the weights of the experts. The study divides the "
        "rank to have the same ratio as in dense models."
    ]
    return base.Section("What is trained in the experts", rows, text)


def _tokens(c: Experts) -> base.Section:
    """Show how unevenly tokens are spread over experts, whose adapters they train."""
    rows: base.Rows = [["curve", "layer", "fewest tokens per expert", "most", "if all were equal"]]
    named = [("full fine-tuning", c.whole), *((READINGS[r], o) for r, o in c.readings.items())]
    for name, o in named:
        for layer, shares in enumerate([] if o is None else c.token_shares(o)):
            low, high, equal = (f"{v:.1%}" for v in (min(shares), max(shares), 1 / len(shares)))
            rows.append([name, str(layer), low, high, equal])
    text = ["Shares of a layer's training tokens, mean over the runs of a curve."]
    return base.Section("Tokens per expert", rows if len(rows) > 1 else [], text)


def measures(found: Sequence[Experts], asked: base.Asked) -> dict[str, Any]:
    """Return gaps, ratios and token shares of every reading."""
    return {
        "cells": {
            c.name: {
                reading: {
                    "gap_nats": gap.mean().plain(),
                    "regret_percent": gap.percent().plain(),
                    "load": gap.load,
                    "ratio": ratio and ratio.plain(),
                    "token_shares": c.token_shares(gap.lora),
                }
                for reading, gap in c.gaps.items()
                for ratio in [c.ratio(reading, c.whole)]
            }
            for c in found
        }
    }


QUESTION = base.Question[Experts](
    estimands=[
        *(_over_allowed(r) for r in READINGS if r != "divided_alpha"),
        base.Estimand(
            "divided_over_allowed",
            _dividing,
            _gates_on_dividing,
            absent=lambda c: c.absent("active", "whole"),
        ),
        _ratio("lr_ratio", "active", lambda c: c.whole),
        _ratio("rate_of_whole", "whole", lambda c: c.readings.get("active")),
        _ratio("rate_of_divided_alpha", "divided_alpha", lambda c: c.readings.get("active")),
    ],
    conditions=conditions,
    sections=sections,
    measures=measures,
    ratios=lambda c: [(READINGS[r], v) for r in c.readings if (v := c.ratio(r, c.whole))],
)

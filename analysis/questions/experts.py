"""Question: how must LoRA on experts divide its rank to match full fine-tuning.

A reading is a way to set the rank of each expert from LoRA's rank; readings also differ in alpha,
and in whether the experts of a layer share one of the matrices A and B. Each curve is at its
optimal learning rate, and losses are paired by seed.
"""

import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, signed, with_interval
from analysis.measures.at_best import over_seeds
from analysis.measures.ratio import ratio_of
from analysis.measures.regret import ALLOWED, Gap, gaps_of
from analysis.optimum.optimum import Optimum
from analysis.questions import base
from analysis.runs.lr_curves import runs_of
from analysis.runs.table import TableError

READINGS = {
    "active": "rank / active experts",
    "all": "rank / all experts",
    "whole": "the whole rank",
    "shared": "the whole rank, one factor shared",
    "divided_alpha": "rank / active experts, alpha divided too",
}
BOTH = ("active", "whole")
"""Readings whose comparison shows the regret from dividing the rank."""
MATRICES = 3
"""Matrices of an expert: gate, up and down; one side of each is the hidden size."""


@dataclass(frozen=True)
class Experts(base.Condition):
    """The curves of one model and data set."""

    whole: Optimum | None
    """The curve of full fine-tuning of all weights; None if it is missing."""
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
        """Return a reading's optimal learning rate over another curve's; None if one is missing."""
        mine = self.readings.get(reading)
        return None if mine is None or other is None else ratio_of([mine], other)

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
        TableError: two curves have the same reading, or a curve has no experts.
    """
    found = []
    for group, mine in base.by_group(base.fit(table)).items():
        full = base.full_of(mine)
        lora: dict[str, Optimum] = {}
        for o in base.lora_of(mine):
            key = o.curve.key
            if key.get("expert_rank") not in ("active", "all", "whole"):
                raise TableError(
                    f"{group}: {o.curve.name} has no known rank of its experts (column "
                    "expert_rank: active, all or whole). Use a model with experts, and adapt its "
                    "MLP."
                )
            reading = "shared" if key["expert_outer"] == "shared" else str(key["expert_rank"])
            if key["expert_alpha"] != key["alpha"]:
                reading = "divided_alpha"
            if reading in lora:
                raise TableError(
                    f"{group}: two curves have the reading {READINGS[reading]!r}. Compare one "
                    "rank at a time, with at most one other alpha."
                )
            lora[reading] = o
        runs = pd.concat([runs_of(table, o.curve) for o in mine])
        found.append(Experts(group, runs, mine, full, {r: lora[r] for r in READINGS if r in lora}))
    return found


def _over_allowed(reading: str) -> base.Estimand[Experts]:
    return base.over_allowed(
        f"over_allowed_{reading}",
        lambda c: c.gaps.get(reading),
        absent=lambda c: c.absent(reading),
    )


def _dividing(c: Experts) -> Estimate | None:
    """Return the regret from dividing the rank minus the allowed regret, in nats."""
    divided, whole = c.gaps.get("active"), c.gaps.get("whole")
    if divided is None or whole is None:
        return None
    lost = divided.nats.minus(whole.nats)
    return over_seeds(lost.paired(divided.gain, lambda nats, gain: nats - ALLOWED * gain))


def _ratio(
    name: str, reading: str, other: Callable[[Experts], Optimum | None]
) -> base.Estimand[Experts]:
    """Declare a reading's optimal learning rate over another curve's."""
    return base.Estimand(
        name,
        lambda c: c.ratio(reading, other(c)),
        lambda c: base.gates_on([o for o in (other(c), c.readings[reading]) if o]),
        absent=lambda c: c.absent(reading, "active"),
        log=True,
    )


ESTIMANDS = [
    *(_over_allowed(r) for r in READINGS if r != "divided_alpha"),
    base.Estimand[Experts](
        "divided_over_allowed",
        _dividing,
        lambda c: list(dict.fromkeys(g for r in BOTH for g in base.gates_on_gap(c.gaps[r]))),
        absent=lambda c: c.absent(*BOTH),
    ),
    _ratio("lr_ratio", "active", lambda c: c.whole),
    _ratio("rate_of_whole", "whole", lambda c: c.readings.get("active")),
    _ratio("rate_of_divided_alpha", "divided_alpha", lambda c: c.readings.get("active")),
]


def measures(found: Sequence[Experts], asked: base.Asked) -> dict[str, Any]:
    """Return gaps, ratios and token shares of every reading."""
    cells = {}
    for c in found:
        cells[c.name] = {
            reading: {
                "gap_nats": gap.mean(),
                "regret_percent": gap.percent(),
                "load": gap.load,
                "ratio": c.ratio(reading, c.whole),
                "token_shares": c.token_shares(gap.lora),
            }
            for reading, gap in c.gaps.items()
        }
    return {"cells": cells}


def sections(found: Sequence[Experts], asked: base.Asked) -> list[base.Section]:
    """Return, for each model and data set, readings, trained parameters and token counts."""
    out = []
    for c in found:
        rows: list[list[Any]] = []
        for reading, o in c.readings.items():
            gap, trained = c.gaps.get(reading), runs_of(c.runs, o.curve)["n_trainable"].mean()
            row = [base.best_lr(o), c.ratio(reading, c.whole)]
            row += [with_interval(gap.mean(), signed), gap.percent()] if gap else [None, None]
            rows.append([READINGS[reading], f"{trained:,.0f}", gap.load if gap else None, *row])
        regrets = {textwrap.fill(READINGS[r], 15): g.percent() for r, g in c.gaps.items()}
        y, band = "regret, % of FullFT's gain", (-100 * ALLOWED, 100 * ALLOWED)
        panels = [base.panel_of("each at its optimal LR", y, regrets, band)] if c.gaps else []
        head = (
            "reading | trained parameters | load | best LR [95%] | ratio to FullFT's [95%] | "
            "gap (nats) [95%] | regret, % of the gain [95%]"
        )
        text = [
            "Load: bits of what is new over 2 bits for each trained parameter, where it is known."
        ]
        title, caption = f"Readings of the rank, {c.name}", "regret of each reading of the rank"
        figure = "readings.png" if c.gaps else ""
        out.append(base.Section.of(title, head, rows, text, figure, panels, caption))
        out.append(_counts(c))
        rows = []
        for name, o in (("full fine-tuning", c.whole), *c.readings.items()):
            for layer, shares in enumerate([] if o is None else c.token_shares(o)):
                three = (f"{v:.1%}" for v in (min(shares), max(shares), 1 / len(shares)))
                rows.append([READINGS.get(name, name), layer, *three])
        head = "curve | layer | fewest tokens per expert | most | if all were equal"
        text = ["Shares of a layer's training tokens, mean over the runs of a curve."]
        out.append(base.Section.of("Tokens per expert", head, rows, text))
    return out


def _counts(c: Experts) -> base.Section:
    """Count trained parameters of the experts, and of a dense MLP as wide as the active ones."""
    head = "reading | rank of an expert | trained in the experts | per weight | that a token uses"
    rows: list[list[Any]] = []
    for reading, o in c.readings.items():
        spec = json.loads(runs_of(c.runs, o.curve)["spec"].iloc[0])
        model, method = spec["model"], spec["method"]
        h, i, layers = model["hidden_size"], model["mlp_size"], model["n_layers"]
        n, k = model["n_experts"], model["n_active_experts"]
        divisor = {"active": k, "all": n, "whole": 1}[o.curve.key["expert_rank"]]
        rank = int(method["rank"]) // divisor
        per_rank = layers * MATRICES * rank
        own = o.curve.key["expert_outer"] == "own"
        whole, used = (per_rank * (count * i + (count if own else 1) * h) for count in (n, k))
        weights = layers * MATRICES * h * i
        rows.append([READINGS[reading], rank, f"{whole:,}", whole / (n * weights), f"{used:,}"])
    if c.readings:
        dense = layers * MATRICES * int(method["rank"]) * (h + k * i)
        name = "a dense MLP as wide as the active experts"
        rows.append([name, method["rank"], f"{dense:,}", dense / (k * weights), f"{dense:,}"])
    text = [
        "Per weight: trained parameters over the weights of the experts. The study divides the "
        "rank to have the same ratio as in dense models."
    ]
    return base.Section.of("What is trained in the experts", head, rows, text)


QUESTION = base.Question(
    ESTIMANDS,
    conditions,
    measures,
    sections,
    ratios=lambda c: [(READINGS[r], v) for r in c.readings if (v := c.ratio(r, c.whole))],
)

"""Question: how the ratio of the optimal learning rates depends on the hidden size and on alpha.

ln ratio = a + p ln(hidden) + q ln(alpha) is fitted over base models with equal pretraining tokens,
and over base models with equal loss before fine-tuning. Both sets are selected from the table.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.decide import Gate
from analysis.inference.estimate import Estimate, number
from analysis.measures.ratio import Ratio, RatioLaw, ratio_law, ratio_of, rivals
from analysis.optimum.fit import Optimum
from analysis.questions import base

AGREE = 0.03
"""Losses on the pretraining data count as equal if they differ by at most this, in nats."""
TOKENS, LOSS, ALL = "equal pretraining tokens", "equal base loss", "all bases"


@dataclass(frozen=True, eq=False)
class Base:
    """One base model and alpha."""

    model: str
    hidden: int
    alpha: float
    tokens: float | None
    """Number of pretraining tokens; None if the spec has no pretraining recipe."""
    base_nll: float
    """Loss on the pretraining data, in nats; NaN if it was not measured."""
    lora: Optimum
    full: Optimum

    @cached_property
    def ratio(self) -> Estimate:
        """LoRA's optimal learning rate over full fine-tuning's."""
        return ratio_of([self.lora], self.full)


@dataclass(frozen=True)
class Bases(base.Condition):
    """All base models and alphas on one data set."""

    bases: list[Base]

    @property
    def missing(self) -> str:
        return "" if self.bases else "a base with both full fine-tuning and LoRA"

    @cached_property
    def sets(self) -> dict[str, list[Base]]:
        """The bases to which each law is fitted: equal bases with the most hidden sizes, or all."""
        tokens = {b.tokens for b in self.bases if b.tokens}
        by_tokens = [[b for b in self.bases if b.tokens == t] for t in tokens]
        losses = {b.base_nll for b in self.bases}
        by_loss = [[b for b in self.bases if abs(b.base_nll - nll) <= AGREE] for nll in losses]

        def hidden(bases: list[Base]) -> int:
            return len({b.hidden for b in bases})

        equal_tokens = max(by_tokens, key=hidden, default=[])
        equal_loss = max(by_loss, key=lambda bases: (hidden(bases), len(bases)), default=[])
        return {TOKENS: equal_tokens, LOSS: equal_loss, ALL: self.bases}

    @cached_property
    def laws(self) -> dict[str, RatioLaw]:
        """The law fitted to each set; the variance between bases is estimated from all bases."""
        every = _ratios(self.bases)
        return {k: ratio_law(_ratios(part), every) for k, part in self.sets.items()}

    @property
    def seeds(self) -> int:
        """0, since intervals are over bases, not over seeds."""
        return 0

    def gates_on(self, name: str) -> list[Gate]:
        """List the gates on a law's bases."""
        bases = self.sets[name]
        if not bases:
            return base.missing("a base with known tokens or loss")
        return [
            gate.at(f"{o.curve.key['model']}, alpha {o.curve.key.get('alpha')}: ")
            for o in base.distinct(o for c in bases for o in (c.full, c.lora))
            for gate in base.gates_on([o])
        ]


def _ratios(bases: Sequence[Base]) -> list[Ratio]:
    """Return the ratios that have an interval."""
    known = [(c, np.log(c.ratio.draws)) for c in bases if c.ratio.draws is not None]
    return [Ratio(c.model, c.hidden, c.alpha, float(d.mean()), float(d.std())) for c, d in known]


def conditions(table: pd.DataFrame) -> list[Bases]:
    """Pair every LoRA curve with the full fine-tuning curve of its base."""
    optima = base.fit(table)
    groups = base.by_group(optima).items()
    full = {group: o for group, mine in groups if (o := base.full_of(mine)) is not None}
    models = table.drop_duplicates("model").set_index("model")
    found = []
    for lora in (o for o in base.lora_of(optima) if o.curve.group in full):
        row = models.loc[lora.curve.key["model"]]
        recipe = json.loads(row["spec"])["model"].get("recipe")
        size, alpha = int(row["hidden_size"]), float(lora.curve.key["alpha"])
        tokens = None
        if recipe:
            tokens = float(recipe["steps"] * recipe["batch_size"] * recipe["length"])
        nll, of_full = float(row.get("retain_start") or math.nan), full[lora.curve.group]
        found.append(Base(lora.curve.key["model"], size, alpha, tokens, nll, lora, of_full))
    return [Bases(str(table["dataset"].iloc[0]), table, optima, found)]


def _hidden(name: str, of: str) -> base.Estimand[Bases]:
    """Declare the exponent of the hidden size over one set of bases."""

    def gates(c: Bases) -> list[Gate]:
        one_size = len({b.hidden for b in c.sets[of]}) < 2
        return c.gates_on(of) + (base.missing("another hidden size") if one_size else [])

    return base.Estimand(name, lambda c: c.laws[of].p, gates)


ESTIMANDS = [
    _hidden("hidden_exponent", TOKENS),
    _hidden("hidden_exponent_equal_loss", LOSS),
    base.Estimand[Bases]("alpha_exponent", lambda c: c.laws[ALL].q, lambda c: c.gates_on(ALL)),
]


def measures(found: Sequence[Bases], asked: base.Asked) -> dict[str, Any]:
    """Return the laws."""
    (c,) = found
    return {"laws": {k: {"p": w.p, "q": w.q, "rivals": w.rivals} for k, w in c.laws.items()}}


def sections(found: Sequence[Bases], asked: base.Asked) -> list[base.Section]:
    """Return the laws, and the ratios they are fitted to."""
    (c,) = found
    rows: list[list[Any]] = []
    for name, law in c.laws.items():
        tests = "; ".join(f"{rival}: {number(p, 2)}" for rival, p in law.rivals.items()) or "-"
        rows.append([name, law.bases, law.p, law.q, law.bases_q, tests])
    head = (
        "bases | how many | exponent of the hidden size [95%] | of alpha [95%] | "
        "bases with more than one alpha | published laws, p-value"
    )
    text = (
        "ln ratio = a + p ln(hidden) + q ln(alpha). p is fitted at alpha 32 with one row per base; "
        "q within bases. Intervals are Student's over bases, with the variance of all bases "
        "together. A law with a p-value below 0.05 is rejected. A law that does not depend on "
        "alpha is tested by its p only; the level a is not tested."
    )
    out = [base.Section.of("The law of the ratio", head, rows, [text])]
    rows = []
    for b in c.bases:
        tokens = "-" if not b.tokens else f"{b.tokens:.2g}"
        settings = [b.model, b.hidden, f"{b.alpha:g}", number(b.base_nll, 4), tokens]
        found_here = [base.best_lr(b.full), base.best_lr(b.lora), b.ratio]
        rows.append([*settings, *found_here, *rivals(b.hidden, b.alpha).values()])
    head = "base | hidden | alpha | base NLL | pretraining tokens | best FullFT LR | best LoRA LR"
    laws = [name.partition(" (")[0] for name in rivals(64, 32.0)]
    head = " | ".join([head, "ratio [95%]", *laws])
    caption = "the ratio over alpha and hidden size, with published laws"
    figure = ("law.png", _panels(c.bases), caption)
    return [*out, base.Section.of("Ratios", head, rows, [], *figure)]


def _panels(bases: Sequence[Base]) -> list[base.Panel]:
    """Draw the ratios over alpha by base, and over the hidden size at one alpha with the laws."""
    y, ratios = "best LoRA LR / best FullFT LR", {b: b.ratio for b in bases}
    by_alpha = {
        m: {b.alpha: ratios[b] for b in sorted(bases, key=lambda b: b.alpha) if b.model == m}
        for m in dict.fromkeys(b.model for b in bases)
    }
    alphas = sorted({b.alpha for b in bases})
    mid = 32.0 if 32.0 in alphas else alphas[len(alphas) // 2]  # alpha of the laws' lines
    at = [b for b in bases if b.alpha == mid]
    measured = base.Series.of("a base", [b.hidden for b in at], [ratios[b] for b in at], style="o")
    ends = (min(b.hidden for b in bases), max(b.hidden for b in bases))
    grid = np.geomspace(*ends, 20).tolist()
    laws = [
        base.Series(
            f"{name.partition(' (')[0]}, alpha {mid:g}",
            grid,
            [rivals(h, mid)[name] for h in grid],
            style=("--", ":", "-.", "-")[k % 4],
            colour="grey",
        )
        for k, name in enumerate(rivals(64, 32.0))
    ]
    by_hidden, x = f"by hidden size at alpha {mid:g}, with laws", "hidden size"
    return [
        base.panel_over("alpha", "by alpha", y, by_alpha, log_y=True),
        base.Panel(by_hidden, x, y, [measured, *laws], log_x=True, log_y=True),
    ]


QUESTION = base.Question(ESTIMANDS, conditions, measures, sections)

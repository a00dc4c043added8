"""Question `lr_scale`: how the ratio of optimal learning rates depends on hidden size and alpha.

ln ratio = a + p ln(hidden) + q ln(alpha) is fitted over base models with equal pretraining tokens,
and over base models with equal loss before fine-tuning. Both sets are selected from the table.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.inference.decide import Gate, GateCode
from analysis.inference.estimate import Estimate, number
from analysis.inference.rows import Row, measured
from analysis.measures import places
from analysis.measures.ratio import Ratio, RatioLaw, ratio_law, ratio_of
from analysis.optimum.fit import Optimum
from analysis.questions import base

AGREE = 0.03
"""Losses on the pretraining data count as equal if they differ by at most this, in nats."""
TOKENS, LOSS, ALL = "equal pretraining tokens", "equal base loss", "all bases"


class Base(NamedTuple):
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
    ratio: Estimate
    """LoRA's optimal learning rate over full fine-tuning's."""


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

        def ratios(bases: Sequence[Base]) -> list[Ratio]:
            known = [(b, np.log(b.ratio.draws)) for b in bases if b.ratio.draws is not None]
            return [Ratio(b.model, b.hidden, b.alpha, d.mean(), d.std()) for b, d in known]

        return {k: ratio_law(ratios(part), ratios(self.bases)) for k, part in self.sets.items()}

    @property
    def seeds(self) -> int:
        """0, since intervals are over bases, not over seeds."""
        return 0

    def gates_on(self, name: str) -> list[Gate]:
        """List the gates on a law's bases."""
        if not self.sets[name]:
            return base.missing("a base with known tokens or loss")
        return [
            gate.at(f"{o.curve.key['model']}, alpha {o.curve.key.get('alpha')}: ")
            for o in base.distinct(o for c in self.sets[name] for o in (c.full, c.lora))
            for gate in base.gates_on([o])
        ]


def scale_conditions(table: pd.DataFrame) -> list[Bases]:
    """Pair every LoRA curve with the full fine-tuning curve of its base."""
    optima, found = base.fit(table), []
    models = table.drop_duplicates("model").set_index("model")
    groups = base.by_group(optima)
    for o in base.lora_of(optima):
        if (full := base.full_of(groups[o.curve.group])) is None:
            continue
        row = models.loc[o.curve.key["model"]]
        recipe = json.loads(row["spec"])["model"].get("recipe")
        at = (o.curve.key["model"], int(row["hidden_size"]), float(o.curve.key["alpha"]))
        factors = [recipe[k] for k in ("steps", "batch_size", "length")] if recipe else []
        tokens = float(math.prod(factors)) if recipe else None
        nll = float(row.get("retain_start") or math.nan)
        found.append(Base(*at, tokens, nll, o, full, ratio_of([o], full)))
    return [Bases(str(table["dataset"].iloc[0]), table, optima, found)]


def scale_report(asked: base.Asked, c: Bases) -> tuple[list[Row], list[base.Section]]:
    """Return the laws, and the ratios they are fitted to."""
    rows: list[list[Any]] = [
        [name, law.bases, law.p, law.q, law.bases_q] for name, law in c.laws.items()
    ]
    head = (
        "bases | how many | exponent of the hidden size [95%] | of alpha [95%] | "
        "bases with more than one alpha"
    )
    text = (
        "ln ratio = a + p ln(hidden) + q ln(alpha). p is fitted at alpha 32 with one row per base; "
        "q within bases. Intervals are Student's over bases, with the variance of all bases "
        "together."
    )
    laws = base.Section.of("The law of the ratio", head, rows, [text])
    rows = []
    for b in c.bases:
        tokens = "-" if not b.tokens else f"{b.tokens:.2g}"
        settings = [b.model, b.hidden, f"{b.alpha:g}", number(b.base_nll, 4), tokens]
        found_here = [base.best_lr(b.full), base.best_lr(b.lora), b.ratio]
        rows.append([*settings, *found_here])
    head = (
        "base | hidden | alpha | base NLL | pretraining tokens | best FullFT LR | best LoRA LR | "
        "ratio [95%]"
    )
    ratios = base.Section.of("Ratios", head, rows)
    at = places.places_of(c.optima, c.runs)
    return [measured(at[id(b.lora)], "lr_ratio", b.ratio) for b in c.bases], [laws, ratios]


def _hidden(name: str, of: str) -> base.Estimand:
    """Declare the exponent of the hidden size over one set of bases."""

    def gates(c: Bases) -> list[Gate]:
        one_size = len({b.hidden for b in c.sets[of]}) < 2
        return c.gates_on(of) + (base.missing("another hidden size") if one_size else [])

    return base.Estimand(name, lambda c: c.laws[of].p, gates, final=True)


def _gates_on_alpha(c: Bases) -> list[Gate]:
    at = {(b.model, b.alpha) for b in c.bases}
    few = Gate(GateCode.FEW_CONDITIONS, "1 of 2 (two alphas of a base)")
    return c.gates_on(ALL) + [few] * (len(at) == len(dict(at)))


QUESTION = base.Question(
    [
        _hidden("hidden_exponent", TOKENS),
        _hidden("hidden_exponent_equal_loss", LOSS),
        base.Estimand("alpha_exponent", lambda c: c.laws[ALL].q, _gates_on_alpha, final=True),
    ],
    scale_conditions,
    scale_report,
)

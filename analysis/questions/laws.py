"""Questions about laws of the ratio of the optimal learning rates.

`lr_scale`: how the ratio depends on the hidden size and on alpha. ln ratio = a + p ln(hidden) + q
ln(alpha) is fitted over base models with equal pretraining tokens, and over base models with equal
loss before fine-tuning. Both sets are selected from the table.

`rate_law` (archived): does one law predict LoRA's best learning rate from full fine-tuning's. LoRA
changes a layer's output by about alpha x rate x T x (A's start + A's own movement), full
fine-tuning by hidden x rate x T. Equal changes give, for the ratio R of best learning rates,

    R (1 + q R) = L,   L = g sqrt(3) hidden / alpha,   q = k hidden lr_full (T / 128)^beta

with T updates and alpha scaled as alpha / rank. The law's constants, its rivals and the rule were
fixed before the first run. The rivals are power laws, fitted by least squares to the 26 ratios that
were known then; the law with its constants has an rms error of 7.6% on these, the best rival 17%.

The rule. The error of a prediction is the rms of ln(measured / predicted) over the new conditions,
after the variance of the measurements is subtracted. Base models are resampled; with four of them
all 256 resamples are counted. SUPPORTED: the upper bound of the law's error is below 0.15, and so
is that of its difference from every rival's error below 0. REFUTED: the lower bound of the law's
error is above 0.15, or that of its difference from some rival's error is above 0. In simulations
the rule supported a law with an rms error of 6% in 87% of sweeps, one of 15%, the limit, in 20%
(four bases are few to resample), and refuted it where a rival was true in 98% or more.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.inference.decide import Gate, GateCode
from analysis.inference.estimate import BASES, Estimate, Spread, from_draws, number
from analysis.measures.laws import published
from analysis.measures.ratio import Ratio, RatioLaw, ratio_law, ratio_of
from analysis.optimum.fit import Optimum
from analysis.questions import base
from analysis.runs.table import as_losses, read

# ---------------------------------------------------------------- hidden size and alpha

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
        tokens = (
            float(math.prod(recipe[k] for k in ("steps", "batch_size", "length")))
            if recipe
            else None
        )
        nll = float(row.get("retain_start") or math.nan)
        found.append(Base(*at, tokens, nll, o, full, ratio_of([o], full)))
    return [Bases(str(table["dataset"].iloc[0]), table, optima, found)]


def scale_report(asked: base.Asked, c: Bases) -> tuple[dict[str, Any], list[base.Section]]:
    """Return the laws, and the ratios they are fitted to."""
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
    laws = base.Section.of("The law of the ratio", head, rows, [text])
    rows = []
    for b in c.bases:
        tokens = "-" if not b.tokens else f"{b.tokens:.2g}"
        settings = [b.model, b.hidden, f"{b.alpha:g}", number(b.base_nll, 4), tokens]
        found_here = [base.best_lr(b.full), base.best_lr(b.lora), b.ratio]
        rows.append([*settings, *found_here, *published(b.hidden, b.alpha).values()])
    head = "base | hidden | alpha | base NLL | pretraining tokens | best FullFT LR | best LoRA LR"
    short = (name.partition(" (")[0] for name in published(64, 32.0))
    head = " | ".join([head, "ratio [95%]", *short])
    ratios = base.Section.of("Ratios", head, rows)
    place = {id(o): k for k, o in enumerate(c.optima)}
    measured = [
        {"alpha": b.alpha, "ratio": b.ratio, "regrets": {}, "at": place[id(b.lora)]}
        for b in c.bases
    ]
    found = {k: {"p": w.p, "q": w.q, "rivals": w.rivals} for k, w in c.laws.items()}
    return {"laws": found, "ratios": measured}, [laws, ratios]


def _hidden(name: str, of: str) -> base.Estimand:
    """Declare the exponent of the hidden size over one set of bases."""

    def gates(c: Bases) -> list[Gate]:
        one_size = len({b.hidden for b in c.sets[of]}) < 2
        return c.gates_on(of) + (base.missing("another hidden size") if one_size else [])

    return base.Estimand(name, lambda c: c.laws[of].p, gates)


LR_SCALE = base.Question(
    [
        _hidden("hidden_exponent", TOKENS),
        _hidden("hidden_exponent_equal_loss", LOSS),
        base.Estimand("alpha_exponent", lambda c: c.laws[ALL].q, lambda c: c.gates_on(ALL)),
    ],
    scale_conditions,
    scale_report,
)


# ---------------------------------------------------------------- the law fixed beforehand

G, K, BETA, REFERENCE_STEPS = 1.33, 5.7, 0.45, 128
"""The law's constants."""
RATE_LAW = "the law"
RIVALS = {
    "constant": (1.26258487281, 0.0, 0.0, 0.0),
    "sqrt(hidden)": (-1.13903581059, 0.5, 0.0, 0.0),
    "hidden / alpha": (-0.101580098123, 1.0, -1.0, 0.0),
    "sqrt(hidden / alpha)": (0.580502387342, 0.5, -0.5, 0.0),
    "power law": (1.41775673064, 0.572455646164, -0.646667609227, -0.141960525111),
}
"""Rival -> ln of its factor, and its exponents of hidden size, alpha and updates."""
WITHIN = 0.15
"""Largest rms error of ln(ratio) at which the law counts as right."""
COUNTED = 24
"""Conditions that are judged: 3 bases x 7 alphas, and 3 of SmolLM2."""


class Cell(NamedTuple):
    """One condition: full fine-tuning's best learning rate, and LoRA's as a multiple of it."""

    base: str
    hidden: int
    alpha: float
    steps: int
    full: float
    ratio: float
    logs: np.ndarray
    """Draws of ln(best LR), of full fine-tuning and of LoRA."""

    def predict(self, name: str, full: Any) -> Any:
        """Return ln(ratio) by the law or a rival at these best LRs of full fine-tuning."""
        if name in RIVALS:
            return float(np.dot(RIVALS[name], [1, *np.log([self.hidden, self.alpha, self.steps])]))
        start = G * math.sqrt(3) * self.hidden / self.alpha
        moved = K * self.hidden * (self.steps / REFERENCE_STEPS) ** BETA * full
        return np.log(2 * start / (1 + np.sqrt(1 + 4 * moved * start)))

    @property
    def by_law(self) -> float:
        """The ratio that the law predicts."""
        return float(math.exp(self.predict(RATE_LAW, self.full)))

    @property
    def measured(self) -> Estimate:
        """The ratio with its interval."""
        return from_draws(np.exp(self.logs[1] - self.logs[0]), 2)

    def squared_error(self, name: str) -> float:
        """Return the squared ln(measured / predicted), minus the variance of its measurement.

        The variance is that of the difference: the law is predicted from the same draws of full
        fine-tuning's best learning rate by which LoRA's is divided.
        """
        full, lora = self.logs
        off = lora - full - self.predict(name, np.exp(full))
        return float(off.mean()) ** 2 - float(off.var())


def resampled(cells: Sequence[Cell], squares: Sequence[float]) -> np.ndarray:
    """Return the rms error, 0 if negative, of all resamples of as many bases with replacement."""
    bases = sorted({c.base for c in cells})
    at = np.array([[c.base == name for name in bases] for c in cells], float)
    chosen = list(itertools.product(range(len(bases)), repeat=len(bases)))
    counts = np.array([np.bincount(k, minlength=len(bases)) for k in chosen])
    return np.sqrt(np.maximum(counts @ (squares @ at) / (counts @ at.sum(0)), 0.0))


@dataclass(frozen=True)
class Cells(base.Condition):
    """All new conditions, of this table and of the other scale's kept answer."""

    cells: list[Cell]
    own: list[Cell]
    """The conditions of this table."""
    others: list[Optimum] = field(repr=False)
    """The curves of the other scale's kept answer."""

    @property
    def missing(self) -> str:
        return "" if self.cells else "a base with both full fine-tuning and LoRA"

    @cached_property
    def errors(self) -> dict[str, np.ndarray]:
        """The resampled rms errors of the law and of every rival."""
        return {
            name: resampled(self.cells, [c.squared_error(name) for c in self.cells])
            for name in (RATE_LAW, *RIVALS)
        }

    @property
    def is_judged(self) -> bool:
        """Whether the verdict is this answer's: both scales are judged once."""
        return not self.others or 2 * len(self.own) >= len(self.cells)

    @property
    def worst(self) -> Estimate:
        """Combine the criteria on the resampled errors of the law and of every rival.

        Each quantile is the largest quantile of: the law's error - WITHIN, and the law's error - a
        rival's error. So the interval is below 0 if every criterion's interval is, and above 0 if
        one of them is.
        """
        own = self.errors[RATE_LAW]
        criteria = [own - WITHIN, *(own - e for name, e in self.errors.items() if name in RIVALS)]
        worst = from_draws(np.max(np.sort(criteria, axis=1), axis=0), len(own))
        return replace(worst, spread=Spread(len({c.base for c in self.cells}), BASES))

    def gates(self) -> list[Gate]:
        """List the gates on all curves; also if conditions are missing."""
        found = base.gates_on([*self.optima, *self.others])
        if len(self.cells) < COUNTED:
            found.append(Gate(GateCode.FEW_CONDITIONS, f"{len(self.cells)} of {COUNTED}"))
        return found


def cells_of(table: pd.DataFrame, optima: Sequence[Optimum]) -> list[Cell]:
    """Pair every LoRA curve with full fine-tuning of its group; both need an interval."""
    hidden = dict(zip(table["model"], table["hidden_size"]))
    groups, found = base.by_group(optima), []
    for o in base.lora_of(optima):
        full = base.full_of(groups[o.curve.group])
        if full and full.best_lr.draws is not None and o.best_lr.draws is not None:
            key, logs = o.curve.key, np.stack([full.best_lr.log_draws, o.best_lr.log_draws])
            at = (key["model"], int(hidden[key["model"]]), float(key["alpha"]), int(key["steps"]))
            found.append(Cell(*at, full.best_lr.value, ratio_of([o], full).value, logs))
    return found


def law_conditions(table: pd.DataFrame, *others: pd.DataFrame) -> list[Cells]:
    """Fit the curves of a table and of other scales' tables, and pair them."""
    optima, *elsewhere = map(base.fit, (table, *others))
    own = cells_of(table, optima)
    cells = [*own, *(c for t, found in zip(others, elsewhere) for c in cells_of(t, found))]
    curves = [o for found in elsewhere for o in found]
    return [Cells("all new conditions", table, optima, cells, own, curves)]


class RateLaw(base.Question):
    """The question with the conditions of every scale, of which each has a table of its own."""

    def analyse(
        self, table: pd.DataFrame, asked: base.Asked, kept: Path | None = None
    ) -> base.Analysis:
        """Fit and judge a sweep's runs together with the kept runs of its other scales."""
        paths = sorted(kept.glob("rate_law-*/table.parquet")) if kept else []
        mine = f"rate_law-{asked.get('scale')}"
        others = [as_losses(read(path)) for path in paths if path.parent.name != mine]
        joined = replace(self, conditions=lambda table: law_conditions(table, *others))
        return base.Question.analyse(joined, table, asked, kept)


def law_report(asked: base.Asked, c: Cells) -> tuple[dict[str, Any], list[base.Section]]:
    """Return the conditions with the ratios by the law, and the errors."""
    n, own = len(c.cells), c.errors[RATE_LAW]
    rows: list[list[Any]] = [
        [name, from_draws(e, n), None if name == RATE_LAW else from_draws(own - e, n)]
        for name, e in c.errors.items()
    ]
    head = "prediction | rms error of ln(ratio) [95%] | the law's error - this one [95%]"
    text = [
        f"{n} of {COUNTED} new conditions; intervals from all resamples of the base models. "
        f"Supported if the law's error is below {WITHIN:g} and below each rival's."
    ]
    errors = base.Section.of("The law and its rivals", head, rows, text)
    head = "base | hidden | alpha | updates | best FullFT LR | ratio | the law"
    rows = [
        [x.base, x.hidden, f"{x.alpha:g}", x.steps, f"{x.full:.2e}", x.ratio, x.by_law]
        for x in c.cells
    ]
    series = []
    for name in dict.fromkeys(x.base for x in c.cells):
        mine = [x for x in c.cells if x.base == name]
        at, measured = [x.by_law for x in mine], [x.measured for x in mine]
        series.append(base.Series.of(name, at, measured, style="o"))
    ends = [0.01, 100.0]
    series.append(base.Series("equal", ends, ends, style="-", colour="black"))
    name = "best LoRA LR / best FullFT LR"
    panel = base.Panel(name, "predicted by the law", "measured", series, log_x=True, log_y=True)
    figure = ("law.png", [panel], "ratios against the law R (1 + q R) = L") if c.is_judged else ()
    cells = [{**x._asdict(), "law": x.by_law} for x in c.cells]
    for cell in cells:
        del cell["logs"]
    found = {"cells": cells, "errors": {k: from_draws(e, n) for k, e in c.errors.items()}}
    return found, [errors, base.Section.of("New conditions", head, rows, [], *figure)]


LAW = RateLaw(
    [
        base.Estimand(
            "worst_criterion",
            lambda c: c.worst,
            Cells.gates,
            applies=lambda c: c.is_judged,
            unanswered=GateCode.ELSEWHERE,
            seeds=lambda c: 0,
        )
    ],
    law_conditions,
    law_report,
    ratios=lambda c: [
        (f"{x.base}, alpha {x.alpha:g}, {x.steps} updates", x.measured) for x in c.own
    ],
    of_rates=True,
)

"""Question: how the ratio of the optimal learning rates depends on the hidden size and on alpha.

ln ratio = a + p ln(hidden) + q ln(alpha) is fitted over base models with equal pretraining tokens,
and over base models with equal loss before fine-tuning. Both sets are selected from the table.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, number
from analysis.inference.gates import Gate
from analysis.measures.ratio import Ratio, RatioLaw, ratio_law, ratio_of, rivals
from analysis.optimum.optimum import Optimum
from analysis.questions import base

AGREE = 0.03
"""Losses on the pretraining data count as equal if they differ by at most this, in nats."""
TOKENS, LOSS, ALL = "equal pretraining tokens", "equal base loss", "all bases"


@dataclass(frozen=True)
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
class Elsewhere:
    """A ratio measured by another sweep, shown with the law but not fitted."""

    where: str
    hidden: int
    alpha: float
    ratio: Estimate


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


def elsewhere(bases: Sequence[Base], kept: Path | None) -> list[Elsewhere]:
    """Return the ratios in kept results of `lr_ratio`, on models that are not in `bases`."""
    found, models = [], {b.model for b in bases}
    for path in sorted(kept.glob("lr_ratio-*/results.json")) if kept else ():
        results = json.loads(path.read_text())
        widths = pd.read_parquet(path.parent / "table.parquet", columns=["model", "hidden_size"])
        hidden = dict(widths.itertuples(index=False, name=None))
        lora = {r["group"]: results["curves"][r["at"]] for r in results["ratios"] if r["rank"]}
        for r in (r for r in results["ratios"] if r["rank"] is None):
            key = lora[r["group"]]
            if key["model"] not in models and r["ratio"]["value"] is not None:
                ratio = Estimate(**{**r["ratio"], "flags": tuple(r["ratio"]["flags"])})
                where = f"{key['model']} on {key['dataset']} ({results['scale']})"
                alpha = float(r["alpha"])
                found.append(Elsewhere(where, int(hidden[key["model"]]), alpha, ratio))
    return found


def measures(found: Sequence[Bases], asked: base.Asked) -> dict[str, Any]:
    """Return the laws, and other sweeps' ratios."""
    (c,) = found
    outside = {o.where: o.ratio for o in elsewhere(c.bases, asked.kept)}
    laws = {name: {"p": w.p, "q": w.q, "rivals": w.rivals} for name, w in c.laws.items()}
    return {"outside": outside, "laws": laws}


def sections(found: Sequence[Bases], asked: base.Asked) -> list[base.Section]:
    """Return the laws, the ratios they are fitted to, and other sweeps' ratios."""
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
    beyond = elsewhere(c.bases, asked.kept)
    caption = "the ratio over alpha and hidden size, with published laws"
    panels = _panels(c.bases, beyond)
    out.append(base.Section.of("Ratios", head, rows, [], "law.png", panels, caption))
    if beyond:
        rows = [[o.where, o.hidden, f"{o.alpha:g}", o.ratio] for o in beyond]
        head = "not fitted | hidden | alpha | ratio [95%]"
        out.append(base.Section.of("Other sweeps' ratios, not fitted", head, rows))
    return out


def _panels(bases: Sequence[Base], beyond: Sequence[Elsewhere]) -> list[base.Panel]:
    models = list(dict.fromkeys(c.model for c in bases))
    # Each base is shifted a little, so that markers do not overlap.
    shift = {m: 1.035 ** (k - (len(models) - 1) / 2) for k, m in enumerate(models)}

    def line(label: str, part: Iterable[Base], x: str, colour: int, style: str) -> base.Series:
        known = sorted(part, key=lambda c: getattr(c, x))
        at = [getattr(c, x) * shift[c.model] for c in known]
        return base.Series.of(label, at, [c.ratio for c in known], style=style, colour=colour)

    def panel(title: str, x: str, series: list[base.Series], values: Iterable[float]) -> base.Panel:
        ticks = [(v, f"{v:g}") for v in sorted(set(values))]
        y = "best LoRA LR / best FullFT LR"
        return base.Panel(title, x, y, series, log_x=True, log_y=True, ticks=ticks)

    over_alpha = [
        line(m, (c for c in bases if c.model == m), "alpha", k, "o-") for k, m in enumerate(models)
    ]
    alphas = sorted({c.alpha for c in bases})
    mid = 32.0 if 32.0 in alphas else alphas[len(alphas) // 2]  # alpha of the laws' lines
    others = [o for o in beyond if o.alpha == 32.0]
    names = ", ".join(dict.fromkeys(o.where.partition(" on ")[0] for o in others))
    sizes, ratios = [o.hidden for o in others], [o.ratio for o in others]
    star: dict[str, Any] = {"style": "*", "colour": 3, "size": 9}
    hiddens = [*(float(c.hidden) for c in bases), *(float(o.hidden) for o in beyond)]
    grid = np.geomspace(min(hiddens) / 1.2, max(hiddens) * 1.2, 20).tolist()
    over_hidden = [
        line("a base", (c for c in bases if c.alpha == mid), "hidden", 0, "o"),
        base.Series.of(f"not fitted: {names}", sizes, ratios, **star),
        *(
            base.Series(
                f"{name.partition(' (')[0]}, alpha {mid:g}",
                grid,
                [rivals(h, mid)[name] for h in grid],
                style=("--", ":", "-.", "-")[k % 4],
                colour="grey",
                width=1.1,
            )
            for k, name in enumerate(rivals(64, 32.0))
        ),
    ]
    by_hidden = f"by hidden size at alpha {mid:g}, with laws"
    return [
        panel("by alpha, bases side by side", "alpha", over_alpha, alphas),
        panel(by_hidden, "hidden size", over_hidden, hiddens),
    ]


QUESTION = base.Question(ESTIMANDS, conditions, measures, sections, shows=("lr_ratio",))

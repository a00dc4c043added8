"""Question: how the ratio of the best rates depends on the hidden size and on alpha.

ln ratio = a + p ln(hidden) + q ln(alpha) is fitted by regression over measured ratios
(analysis.measures.laws.ratio_law), twice: over base models with equal pretraining tokens, and over
base models with equal loss before fine-tuning. Both sets are found from the table.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, number, rate, with_interval
from analysis.inference.gates import Gate, GateCode
from analysis.measures.laws.ratio_law import Ratio, RatioLaw, ratio_law
from analysis.measures.ratio import ratio_of, rivals
from analysis.optimum.fit import fit_all
from analysis.optimum.optimum import Optimum
from analysis.questions.base import (
    Analysis,
    Panel,
    Section,
    Series,
    correct,
    distinct,
    gates_on,
    judge_claims,
    pairs_of,
)
from analysis.runs.lr_curves import lr_curves

ESTIMANDS = ("hidden_exponent", "hidden_exponent_equal_loss", "alpha_exponent")
LOG_ESTIMANDS = ()
SHOWS = ("lr_ratio",)
"""Sweeps whose kept answers the report shows too: they are rendered before it."""
AGREE = 0.03
"""Base models count as equal in loss if their losses on the pretraining data differ by at most this
many nats."""


@dataclass(frozen=True)
class Cell:
    """One base and alpha."""

    model: str
    hidden: int
    alpha: float
    tokens: float | None
    """Pretraining tokens; None without a recipe."""
    base_nll: float
    """Loss of the base model on its pretraining data, in nats; NaN if it was not measured."""
    lora: Optimum
    full: Optimum

    @property
    def ratio(self) -> Estimate:
        """Best LoRA rate over best full fine-tuning rate."""
        return ratio_of([self.lora], self.full)


def cells_of(table: pd.DataFrame, optima: Sequence[Optimum]) -> list[Cell]:
    """Pair every LoRA curve with the full fine-tuning curve of its base."""
    models = table.drop_duplicates("model").set_index("model")
    found = []
    for lora, full in pairs_of(optima):
        row = models.loc[lora.curve.key["model"]]
        recipe = json.loads(row["spec"])["model"].get("recipe")
        tokens = (
            float(recipe["steps"] * recipe["batch_size"] * recipe["length"]) if recipe else None
        )
        nll = float(row.get("retain_start", math.nan))
        alpha = float(lora.curve.key["alpha"])
        model, hidden = lora.curve.key["model"], int(row["hidden_size"])
        found.append(Cell(model, hidden, alpha, tokens, nll, lora, full))
    return found


@dataclass(frozen=True)
class Elsewhere:
    """A ratio measured by another sweep, shown with the law but not fitted."""

    where: str
    hidden: int
    alpha: float
    ratio: Estimate


def elsewhere(models: Sequence[str], kept: Path | None) -> list[Elsewhere]:
    """Return the ratios in kept results of `lr_ratio` about models other than `models`."""
    found = []
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


def equal_tokens(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells with equal pretraining tokens that cover the most hidden sizes."""
    groups = {t: [c for c in cells if c.tokens == t] for t in {c.tokens for c in cells if c.tokens}}
    return max(groups.values(), key=lambda g: len({c.hidden for c in g}), default=[])


def equal_loss(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells with equal base loss that cover the most hidden sizes.

    Candidates are, for each base model, the bases whose loss agrees with it within AGREE; of equal
    candidates the largest is returned.
    """
    near = [
        [c for c in cells if abs(c.base_nll - centre) <= AGREE]
        for centre in {c.base_nll for c in cells}
    ]
    return max(near, key=lambda g: (len({c.hidden for c in g}), len(g)), default=[])


def law_of(cells: Sequence[Cell], wider: Sequence[Cell] = ()) -> RatioLaw:
    """Fit the law to the cells whose ratio has an interval.

    Args:
        wider: cells that are also used for the variance between bases.
    """
    return ratio_law(_ratios(cells), _ratios(wider))


def _ratios(cells: Sequence[Cell]) -> list[Ratio]:
    known = [(c, np.log(c.ratio.draws)) for c in cells if c.ratio.draws is not None]
    return [Ratio(c.model, c.hidden, c.alpha, float(d.mean()), float(d.std())) for c, d in known]


TOKENS, LOSS, ALL = "equal pretraining tokens", "equal base loss", "all bases"
"""The sets of base models to which a law is fitted."""


def analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None = None) -> Analysis:
    """Judge the exponents."""
    optima = fit_all(lr_curves(table))
    cells = cells_of(table, optima)
    sets = {TOKENS: equal_tokens(cells), LOSS: equal_loss(cells), ALL: cells}
    laws = {
        name: law_of(part, cells) if part is not cells else law_of(cells)
        for name, part in sets.items()
    }
    group = str(table["dataset"].iloc[0])
    gates = {name: _gates(part) for name, part in sets.items()}
    measured = {
        "hidden_exponent": (laws[TOKENS].p, gates[TOKENS] + _one_size(sets[TOKENS])),
        "hidden_exponent_equal_loss": (laws[LOSS].p, gates[LOSS] + _one_size(sets[LOSS])),
        "alpha_exponent": (laws[ALL].q, gates[ALL]),
    }
    found = judge_claims(question, measured, LOG_ESTIMANDS, group)
    beyond = elsewhere([c.model for c in cells], kept)
    sections = [_law_section(laws), _ratio_section(cells, beyond)]
    if beyond:
        head = ["not fitted", "hidden", "alpha", "ratio [95%]"]
        rows = [[o.where, str(o.hidden), f"{o.alpha:g}", with_interval(o.ratio)] for o in beyond]
        sections.append(Section("Other sweeps' ratios, not fitted", [head, *rows]))
    measures = {
        "outside": {o.where: o.ratio.plain() for o in beyond},
        "laws": {
            n: {"p": w.p.plain(), "q": w.q.plain(), "rivals": w.rivals} for n, w in laws.items()
        },
    }
    return Analysis(optima, correct(found, question), sections, measures, {group: optima})


def _law_section(laws: dict[str, RatioLaw]) -> Section:
    head = ["bases", "how many", "exponent of the hidden size [95%]", "of alpha [95%]"]
    rows = [[*head, "bases with more than one alpha", "published laws, p-value"]]
    for name, law in laws.items():
        tests = "; ".join(f"{rival}: {number(p, 2)}" for rival, p in law.rivals.items()) or "-"
        exponents = [with_interval(law.p), with_interval(law.q)]
        rows.append([name, str(law.bases), *exponents, str(law.bases_q), tests])
    text = (
        "ln ratio = a + p ln(hidden) + q ln(alpha). p is fitted at alpha 32 with one row per base; "
        "q within bases. Intervals are Student's over bases, with the variance of all bases "
        "together. A law with a p-value below 0.05 is rejected. A law that does not depend on "
        "alpha is tested by its p only; the level a is not tested."
    )
    return Section("The law of the ratio", rows, [text])


def _ratio_section(cells: Sequence[Cell], beyond: Sequence[Elsewhere]) -> Section:
    head = ["base", "hidden", "alpha", "base NLL", "pretraining tokens", "best FullFT LR"]
    laws = [name.partition(" (")[0] for name in rivals(64, 32.0)]
    rows = [[*head, "best LoRA LR", "ratio [95%]", *laws]]
    for c in cells:
        rows.append(
            [
                c.model,
                str(c.hidden),
                f"{c.alpha:g}",
                number(c.base_nll, 4),
                "-" if not c.tokens else f"{c.tokens:.2g}",
                with_interval(c.full.best_lr, rate),
                with_interval(c.lora.best_lr, rate),
                with_interval(c.ratio),
                *(number(v) for v in rivals(c.hidden, c.alpha).values()),
            ]
        )
    caption = "the ratio over alpha and hidden size, with laws in print"
    return Section("Ratios", rows, [], "law.png", _panels(cells, beyond), caption)


def _gates(cells: Sequence[Cell]) -> list[Gate]:
    if not cells:
        return [Gate(GateCode.MISSING, "a base with known tokens or loss")]
    return [
        gate.at(f"{o.curve.key['model']}, alpha {o.curve.key.get('alpha')}: ")
        for o in distinct(o for c in cells for o in (c.full, c.lora))
        for gate in gates_on([o])
    ]


def _one_size(cells: Sequence[Cell]) -> list[Gate]:
    many = len({c.hidden for c in cells}) > 1
    return [] if many else [Gate(GateCode.MISSING, "another hidden size")]


def _panels(cells: Sequence[Cell], beyond: Sequence[Elsewhere]) -> list[Panel]:
    models = list(dict.fromkeys(c.model for c in cells))
    # Shifted a little, so that the bases' markers do not overlap.
    shift = {m: 1.035 ** (k - (len(models) - 1) / 2) for k, m in enumerate(models)}
    over_alpha = [
        _series(m, [c for c in cells if c.model == m], "alpha", k, shift)
        for k, m in enumerate(models)
    ]
    alphas = sorted({c.alpha for c in cells})
    mid = 32.0 if 32.0 in alphas else alphas[len(alphas) // 2]  # of the laws' lines
    over_hidden = [_series("a base", [c for c in cells if c.alpha == mid], "hidden", 0, shift, "o")]
    others = [o for o in beyond if o.alpha == 32.0]
    names = ", ".join(dict.fromkeys(o.where.partition(" on ")[0] for o in others))
    sizes, ratios = [o.hidden for o in others], [o.ratio for o in others]
    over_hidden.append(
        Series.of(f"not fitted: {names}", sizes, ratios, style="*", colour=3, size=9)
    )
    hiddens = [float(c.hidden) for c in cells] + [float(o.hidden) for o in beyond]
    grid = np.geomspace(min(hiddens) / 1.2, max(hiddens) * 1.2, 20)
    for k, name in enumerate(rivals(64, 32.0)):
        label = f"{name.partition(' (')[0]}, alpha {mid:g}"
        heights, style = [rivals(h, mid)[name] for h in grid], ("--", ":", "-.", "-")[k % 4]
        over_hidden.append(
            Series(label, list(grid), heights, style=style, colour="grey", width=1.1)
        )
    y = "best LoRA LR / best FullFT LR"
    hidden_ticks = [(h, f"{h:g}") for h in sorted(set(hiddens))]
    return [
        Panel(
            "by alpha, bases side by side",
            "alpha",
            y,
            over_alpha,
            ticks=[(a, f"{a:g}") for a in alphas],
            log_x=True,
            log_y=True,
        ),
        Panel(
            f"by hidden size at alpha {mid:g}, with laws",
            "hidden size",
            y,
            over_hidden,
            ticks=hidden_ticks,
            log_x=True,
            log_y=True,
        ),
    ]


def _series(
    label: str,
    cells: Sequence[Cell],
    x: str,
    colour: int,
    shift: dict[str, float],
    style: str = "o-",
) -> Series:
    known = sorted(cells, key=lambda c: getattr(c, x))
    at, ratios = [getattr(c, x) * shift[c.model] for c in known], [c.ratio for c in known]
    return Series.of(label, at, ratios, style=style, colour=colour)

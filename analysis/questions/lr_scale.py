"""How does the ratio of the best rates depend on the hidden size and on alpha?

ln ratio = a + p ln(hidden) + q ln(alpha), by regression over measured ratios
(analysis.measures.ratio_law), twice: over bases of equal pretraining tokens, and over bases of
equal loss. Which base belongs to which set is read from the table: bases of one number of
pretraining tokens, and bases whose loss before fine-tuning agrees.
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
from analysis.measures.ratio import ratio_of, rivals
from analysis.measures.ratio_law import Ratio, RatioLaw, ratio_law
from analysis.optimum.fit import fit_all
from analysis.optimum.optimum import Optimum
from analysis.questions.base import (
    Analysis,
    Panel,
    Section,
    Series,
    claims_about,
    correct,
    gates_on,
    judge_claims,
)
from analysis.runs.lr_curves import lr_curves

ESTIMANDS = ("hidden_exponent", "hidden_exponent_equal_loss", "alpha_exponent")
LOG_ESTIMANDS = ()
AGREE = 0.03
"""Bases count as of equal loss if their losses on what they were pretrained on differ by at most
this many nats."""


@dataclass(frozen=True)
class Cell:
    """One base and alpha."""

    model: str
    hidden: int
    alpha: float
    tokens: float | None
    """Pretraining tokens; None where no recipe tells."""
    base_nll: float
    """Loss of the base on what it was pretrained on; NaN if it was not measured."""
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
    for o in (o for o in optima if o.curve.key["method"] == "lora"):
        full = [
            f
            for f in optima
            if f.curve.group == o.curve.group and f.curve.key["method"] == "fullft"
        ]
        if not full:
            continue
        row = models.loc[o.curve.key["model"]]
        recipe = json.loads(row["spec"])["model"].get("recipe")
        tokens = (
            float(recipe["steps"] * recipe["batch_size"] * recipe["length"]) if recipe else None
        )
        nll = (
            float(row["retain_start"])
            if "retain_start" in row and pd.notna(row["retain_start"])
            else math.nan
        )
        found.append(
            Cell(
                o.curve.key["model"],
                int(row["hidden_size"]),
                float(o.curve.key["alpha"]),
                tokens,
                nll,
                o,
                full[0],
            )
        )
    return found


@dataclass(frozen=True)
class Outside:
    """A ratio measured by another sweep: shown beside the law, not fitted."""

    where: str
    hidden: int
    alpha: float
    ratio: Estimate


def outside(models: Sequence[str], kept: Path | None) -> list[Outside]:
    """Return the kept answers of `lr_ratio` about models that are not among `models`."""
    found = []
    for path in sorted(kept.glob("lr_ratio-*/results.json")) if kept else ():
        told = json.loads(path.read_text())
        table = pd.read_csv(
            path.parent / "table.csv", usecols=["model", "hidden_size"]
        ).drop_duplicates()
        for model, hidden in table.itertuples(index=False):
            for r in told["ratios"]:
                mine = model not in models and r["group"].startswith(f"{model} on ")
                if mine and r["rank"] is None and r["ratio"]["value"] is not None:  # over ranks
                    ratio = Estimate(**{**r["ratio"], "flags": tuple(r["ratio"]["flags"])})
                    where = f"{r['group'].partition(',')[0]} ({told['scale']})"
                    found.append(Outside(where, int(hidden), float(r["alpha"]), ratio))
    return found


def equal_tokens(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells of the number of pretraining tokens that covers most hidden sizes."""
    groups = {t: [c for c in cells if c.tokens == t] for t in {c.tokens for c in cells if c.tokens}}
    return max(groups.values(), key=lambda g: len({c.hidden for c in g}), default=[])


def equal_loss(cells: Sequence[Cell]) -> list[Cell]:
    """Return, around each base in turn, the cells of the bases that agree with it in loss; the set
    that covers most hidden sizes, and of those the largest."""
    near = [
        [c for c in cells if abs(c.base_nll - centre) <= AGREE]
        for centre in {c.base_nll for c in cells}
    ]
    return max(near, key=lambda g: (len({c.hidden for c in g}), len(g)), default=[])


def law_of(cells: Sequence[Cell], wider: Sequence[Cell] = ()) -> RatioLaw:
    """Fit the law to the cells whose ratio has an interval; the variance between bases from `wider`
    as well."""
    return ratio_law(_ratios(cells), _ratios(wider))


def _ratios(cells: Sequence[Cell]) -> list[Ratio]:
    known = [(c, np.log(c.ratio.draws)) for c in cells if c.ratio.draws is not None]
    return [Ratio(c.model, c.hidden, c.alpha, float(d.mean()), float(d.std())) for c, d in known]


def analyse(table: pd.DataFrame, question: dict[str, Any], kept: Path | None = None) -> Analysis:
    """Judge the exponents."""
    optima = fit_all(lr_curves(table))
    cells = cells_of(table, optima)
    by_tokens, by_loss = equal_tokens(cells), equal_loss(cells)
    laws = {
        "equal pretraining tokens": law_of(by_tokens, cells),
        "equal base loss": law_of(by_loss, cells),
        "all bases": law_of(cells),
    }
    group = str(table["dataset"].iloc[0])
    gates = {
        name: _gates(part)
        for name, part in (("tokens", by_tokens), ("loss", by_loss), ("all", cells))
    }
    measured = {
        "hidden_exponent": (
            laws["equal pretraining tokens"].p,
            gates["tokens"] + _one_size(by_tokens),
        ),
        "hidden_exponent_equal_loss": (
            laws["equal base loss"].p,
            gates["loss"] + _one_size(by_loss),
        ),
        "alpha_exponent": (laws["all bases"].q, gates["all"]),
    }
    rests = {
        "hidden_exponent": laws["equal pretraining tokens"].bases,
        "hidden_exponent_equal_loss": laws["equal base loss"].bases,
        "alpha_exponent": laws["all bases"].bases_q,
    }
    found = [
        judge_claims(claims_about(question, e), measured, LOG_ESTIMANDS, group, n, "bases")
        for e, n in rests.items()
    ]
    verdicts = correct([v for part in found for v in part], question)
    rows = [
        [
            "base",
            "hidden",
            "alpha",
            "base NLL",
            "pretraining tokens",
            "best FullFT LR",
            "best LoRA LR",
            "ratio [95%]",
            *(n.partition(" (")[0] for n in rivals(64, 32.0)),
        ]
    ]
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
    beyond = outside([c.model for c in cells], kept)
    beyond_rows = [
        ["not fitted", "hidden", "alpha", "ratio [95%]"],
        *([o.where, str(o.hidden), f"{o.alpha:g}", with_interval(o.ratio)] for o in beyond),
    ]
    law_rows = [
        [
            "bases",
            "how many",
            "exponent of the hidden size [95%]",
            "of alpha [95%]",
            "bases with several alphas",
            "laws in print, p-value",
        ]
    ]
    for name, law in laws.items():
        told = "; ".join(f"{r}: {number(p, 2)}" for r, p in law.rivals.items())
        law_rows.append(
            [
                name,
                str(law.bases),
                with_interval(law.p),
                with_interval(law.q),
                str(law.bases_q),
                told or "-",
            ]
        )
    said = (
        "ln ratio = a + p ln(hidden) + q ln(alpha); p at alpha 32, one row a base, q within bases. Student's intervals "
        "over bases, whose variance is that of all bases together. A law with a p-value below 0.05 is out; one that says "
        "nothing of alpha is judged by its p alone, and none by its level."
    )
    sections = [
        Section("The law of the ratio", law_rows, [said]),
        Section(
            "Ratios",
            rows,
            figure="law.png",
            panels=_panels(cells, beyond),
            caption="the ratio over alpha and hidden size, with laws in print",
        ),
        *([Section("Other sweeps' ratios, beside the law", beyond_rows)] if beyond else []),
    ]
    measures = {
        "outside": {o.where: o.ratio.plain() for o in beyond},
        "laws": {
            n: {"p": w.p.plain(), "q": w.q.plain(), "rivals": w.rivals} for n, w in laws.items()
        },
    }
    return Analysis(optima, verdicts, sections, measures, {group: optima})


def _gates(cells: Sequence[Cell]) -> list[str]:
    if not cells:
        return ["no curve of a base with known tokens or loss"]
    rests = list({id(o): o for c in cells for o in (c.full, c.lora)}.values())
    return [
        f"{o.curve.key['model']}, alpha {o.curve.key.get('alpha')}: {g}"
        for o in rests
        for g in gates_on([o])
    ]


def _one_size(cells: Sequence[Cell]) -> list[str]:
    return [] if len({c.hidden for c in cells}) > 1 else ["no curve of another hidden size"]


def _panels(cells: Sequence[Cell], beyond: Sequence[Outside]) -> list[Panel]:
    over_alpha, over_hidden = [], []
    models = list(dict.fromkeys(c.model for c in cells))
    beside = {
        m: 1.035 ** (k - (len(models) - 1) / 2) for k, m in enumerate(models)
    }  # so that bases do not cover each other
    for k, model in enumerate(models):
        over_alpha.append(
            _series(model, [c for c in cells if c.model == model], "alpha", k, beside)
        )
    alphas = sorted({c.alpha for c in cells})
    mid = (
        32.0 if 32.0 in alphas else alphas[len(alphas) // 2]
    )  # the alpha of the laws' lines, and of what they are held to
    over_hidden.append(
        _series("a base", [c for c in cells if c.alpha == mid], "hidden", 0, beside, "o")
    )
    others = [o for o in beyond if o.alpha == 32.0]
    ends = ([getattr(o.ratio, k) for o in others] for k in ("value", "low", "high"))
    sizes = [o.hidden for o in others]
    names = ", ".join(dict.fromkeys(o.where.partition(" on ")[0] for o in others))
    over_hidden.append(Series(f"not fitted: {names}", sizes, *ends, style="*", colour=3, size=9))
    hiddens = [float(x.hidden) for x in (*cells, *beyond)]
    for s, name in enumerate(rivals(64, 32.0)):
        sizes = np.geomspace(min(hiddens) / 1.2, max(hiddens) * 1.2, 20)
        label, heights = (
            f"{name.partition(' (')[0]}, alpha {mid:g}",
            [rivals(h, mid)[name] for h in sizes],
        )
        over_hidden.append(
            Series(
                label,
                list(sizes),
                heights,
                style=("--", ":", "-.", "-")[s % 4],
                colour="grey",
                width=1.1,
            )
        )
    return [
        Panel(
            "by alpha, bases side by side",
            "alpha",
            "best LoRA LR / best FullFT LR",
            over_alpha,
            log_x=True,
            log_y=True,
            ticks=[(a, f"{a:g}") for a in alphas],
        ),
        Panel(
            f"by hidden size at alpha {mid:g}, with laws",
            "hidden size",
            "best LoRA LR / best FullFT LR",
            over_hidden,
            log_x=True,
            log_y=True,
            ticks=[(h, f"{h:g}") for h in sorted(set(hiddens))],
        ),
    ]


def _series(
    label: str,
    cells: Sequence[Cell],
    x: str,
    colour: int,
    beside: dict[str, float],
    style: str = "o-",
) -> Series:
    known = sorted((c for c in cells if c.ratio.value is not None), key=lambda c: getattr(c, x))
    ends = ([getattr(c.ratio, k) for c in known] for k in ("value", "low", "high"))
    return Series(
        label, [getattr(c, x) * beside[c.model] for c in known], *ends, style=style, colour=colour
    )

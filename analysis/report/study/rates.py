"""Learning rates of both methods: what LoRA gives up away from its best one, and all best rates."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.inference.estimate import Estimate, number, rate, signed, with_interval
from analysis.optimum.fit import fit_all
from analysis.optimum.likelihood import rate_means
from analysis.optimum.optimum import Optimum
from analysis.questions.base import full_of, lora_of
from analysis.report.report_page import band_text
from analysis.report.study.answers import Part, estimate_of
from analysis.report.study.setting import WORDS, Setting
from analysis.report.text import markdown
from analysis.runs.lr_curves import lr_curves

TABLE = (
    "base, data, batch, updates",
    "method",
    "best rate",
    "costs under 0.01 nats",
    "best NLL",
    "over full fine-tuning's",
    "10 times full fine-tuning's rate costs (nats)",
    "full fine-tuning's rate costs (nats)",
)
RULES = ("10 x FullFT's best LR", "FullFT's best LR")
"""Rules of thumb, as named in an answer's ratios."""
NOTE = (
    "Alpha 32, scaled as alpha / rank; 95% intervals. A dash: the rate is outside those tried, "
    "or diverges."
)


@dataclass(frozen=True)
class RateCurve:
    """What LoRA of one rank gives up on one base, by its rate over full fine-tuning's best one."""

    label: str
    times: np.ndarray
    percent: np.ndarray
    """Of what LoRA gains at its best rate, at each rate tried; mean over seeds."""
    fitted_times: np.ndarray
    fitted_percent: np.ndarray
    """The same by the fit that gives the best rate."""


def rate_curves(parts: Sequence[Part]) -> list[RateCurve]:
    """Return one curve per base and setting, at the highest rank.

    Of answers on one base and setting, one of fresh seeds comes first, then the one of most runs.
    """
    chosen: dict[tuple[str, Setting], RateCurve] = {}
    for part in sorted(_with_rates(parts), key=lambda p: (p.exploratory, -p.results["runs"])):
        groups: dict[str, list[Optimum]] = {}
        for o in fit_all(lr_curves(part.runs)):
            groups.setdefault(o.curve.group, []).append(o)
        for group, optima in groups.items():
            full, lora = full_of(optima), lora_of(optima)
            where = (str(optima[0].curve.key["model"]), part.setting(group))
            if full is None or not lora or where in chosen:
                continue
            highest = max(lora, key=lambda o: o.curve.key["rank"])
            curve = _curve(highest, full, f"{where[0]}, rank {{:g}}, {WORDS[where[1]]}")
            if curve is not None:
                chosen[where] = curve
    return list(chosen.values())


def has_curves(parts: Sequence[Part]) -> bool:
    """Return whether an answer has best rates of both methods, without fitting its runs again."""
    return any(
        {c["method"] for c in p.results["curves"] if c["best_lr"] is not None} >= {"fullft", "lora"}
        for p in _with_rates(parts)
    )


def _with_rates(parts: Sequence[Part]) -> list[Part]:
    return [p for p in parts if p.results["sweep"] == "lr_ratio"]


def _curve(lora: Optimum, full: Optimum, label: str) -> RateCurve | None:
    """Compare the losses of one rank with its lowest fitted one; None without a fit of both."""
    c, best, unit = lora.curve, lora.best_nll, full.best_lr.value
    rates = c.unbroken
    if best is None or unit is None or not len(rates):
        return None
    lr = np.exp(np.linspace(rates[0], rates[-1], 200))
    fitted = lora.predict(lr)
    if fitted is None:
        return None
    tried, losses = rate_means(c)
    share = 100 / (c.nll_start - best)
    return RateCurve(
        label.format(c.key["rank"]),
        np.exp(tried) / unit,
        share * (losses - best),
        lr / unit,
        share * (fitted - best),
    )


def best_rates(parts: Sequence[Part]) -> list[str]:
    """Render the best rates of all answers with ratios as a table, the largest model first."""
    rows = [list(TABLE)]
    for part in sorted((p for p in parts if p.results.get("ratios")), key=lambda p: -p.size):
        rows += _rates_of(part)
    return [NOTE, "", *markdown(rows), ""] if len(rows) > 1 else []


def _rates_of(part: Part) -> list[list[str]]:
    ratios = {(r["group"], r["rank"]): r for r in part.results["ratios"]}
    rows = []
    for c in part.results["curves"]:
        where = (c["model"], c["dataset"], c["batch_size"], c["steps"])
        group = "{} on {}, batch {}, steps {}".format(*where)
        lora = c["method"] == "lora"
        r = ratios.get((group, c["rank"])) if lora else None
        against = ["", "", ""]
        if r is not None:
            costs = [signed(r["regrets"].get(rule)) for rule in RULES]
            against = [with_interval(estimate_of(r["ratio"])), *costs]
        rows.append(
            [
                f"{', '.join(map(str, where))} (`{part.results['scale']}`)",
                f"LoRA r{c['rank']:g}" if lora else "full fine-tuning",
                with_interval(Estimate(c["best_lr"], c["low"], c["high"]), rate),
                band_text(c["band"]),
                number(c["best_nll"], 4),
                *against,
            ]
        )
    return rows

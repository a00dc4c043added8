"""Fit the study's law of the optimal learning rate: LR = base x M x (2000 / hidden)^p.

hidden is the hidden size, base a constant, and M the factor of LoRA (1 for full fine-tuning). p
depends on the model family. There are two fits: the study's, which minimises a summed loss, and a
regression on fitted optima.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from analysis.inference.estimate import Estimate, exp_of, from_draws
from analysis.inference.meta import meta_regression
from analysis.optimum.likelihood import rate_means
from analysis.optimum.optimum import Optimum
from analysis.runs.lr_curves import LrCurve

PUBLISHED = {"base": 5e-5, "M": 10.0, "llama": 0.781, "qwen": 0.0775}
"""Published constants, with p by family (tinker-cookbook, docs/sl-hyperparams, 2025)."""
REFERENCE = 2000.0
T = TypeVar("T")
_P = np.linspace(-1.5, 2.0, 141)
_N_K, _BOOT = 161, 400


class Law(NamedTuple):
    """Constants of one family and method: LR at hidden size 2000 (base x M), and the exponent p."""

    family: str
    method: str
    lr_at_2000: Estimate
    p: Estimate
    models: int
    regret_percent: float | None
    """Mean over all curves of (loss at the law's LR - best loss tried) / best loss."""
    flags: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        fitted = {"lr_at_2000": self.lr_at_2000.plain(), "p": self.p.plain()}
        return {**self._asdict(), **fitted, "flags": list(self.flags)}


def family(model: str) -> str:
    """Return a model's family: the leading letters of its name, e.g. Qwen/Qwen3-8B -> qwen."""
    found = re.match(r"[A-Za-z]+", str(model).rsplit("/", 1)[-1])
    return found.group(0).lower() if found else str(model).lower()


def published(curve: LrCurve, hidden: float) -> float | None:
    """Return the LR by the published formula; None for a family without a published exponent."""
    p = PUBLISHED.get(family(curve.key["model"]))
    if p is None or not hidden > 0:
        return None
    m = PUBLISHED["M"] if curve.key["method"] == "lora" else 1.0
    return PUBLISHED["base"] * m * (REFERENCE / hidden) ** p


def regret(curve: LrCurve, lr: float) -> float | None:
    """Return (loss at an LR - lowest loss over the LRs tried) / the lowest loss, in percent.

    The loss is interpolated linearly in ln(lr). None outside the usable LRs.
    """
    lrs, means = rate_means(curve)
    if len(lrs) < 2 or not lrs[0] <= math.log(lr) <= lrs[-1] or not means.min():
        return None
    best = float(means.min())
    return 100 * (float(np.interp(math.log(lr), lrs, means)) - best) / abs(best)


# ---------------------------------------------------------------- the study's way


def by_loss(curves: Sequence[LrCurve], hidden: dict[str, float]) -> list[Law]:
    """Fit each family and method by minimising the summed loss; intervals resample the models.

    A curve's term is (loss at the law's LR - best loss tried) / best loss tried, interpolated.
    Outside the LRs tried, the last segment of the curve is extrapolated, but never downward:
    otherwise the fit could prefer LRs without data. With one hidden size, p is not fitted.

    Args:
        hidden: model -> hidden size.
    """
    laws, usable = [], [c for c in curves if len(np.unique(c.x[c.usable])) >= 2]
    for (name, method), members in _groups(usable, usable, hidden):
        sizes = np.array([hidden[c.key["model"]] for c in members])
        models = sorted({c.key["model"] for c in members})
        n, one_size, enough = len(members), len(set(sizes)) < 2, len(models) >= 4
        ps = np.array([0.0]) if one_size else _P
        lrs = np.concatenate([c.x[c.usable] for c in members])
        ks = np.linspace(lrs.min() - 1, lrs.max() + 1, _N_K)
        logs = [ks[None, :] + ps[:, None] * math.log(REFERENCE / h) for h in sizes]
        loss = np.array([_extrapolated(c, x).ravel() for c, x in zip(members, logs)])
        owner = np.array([models.index(c.key["model"]) for c in members])
        best = int(np.argmin(loss.sum(0)))
        k, p = ks[best % _N_K], ps[best // _N_K]
        even = np.ones(len(models)) / len(models)
        count = np.random.default_rng(7).multinomial(len(models), even, _BOOT)
        drawn = np.argmin(count[:, owner] @ loss, axis=1)
        at = _around(math.exp(k), np.exp(ks[drawn % _N_K]), n, enough)
        power = Estimate(None, n=n) if one_size else _around(p, ps[drawn // _N_K], n, enough)
        costs = [
            regret(c, math.exp(k + p * math.log(REFERENCE / h))) for c, h in zip(members, sizes)
        ]
        known = [v for v in costs if v is not None]
        mean = float(np.mean(known)) if known else None
        flags: tuple[str, ...] = ("one hidden size",) if one_size else ()
        flags += () if enough else (f"{len(models)} model(s): no interval",)
        laws.append(Law(name, method, at, power, len(models), mean, flags))
    return laws


def _groups(
    items: Sequence[T], curves: Sequence[LrCurve], hidden: dict[str, float]
) -> list[tuple[tuple[str, str], list[T]]]:
    """Group items by the family and method of their curves, where the hidden size is known."""
    groups: dict[tuple[str, str], list[T]] = {}
    for item, c in zip(items, curves):
        if hidden.get(c.key["model"], math.nan) > 0:
            groups.setdefault((family(c.key["model"]), c.key["method"]), []).append(item)
    return sorted(groups.items(), key=lambda group: group[0])


def _extrapolated(curve: LrCurve, ln_lr: np.ndarray) -> np.ndarray:
    lrs, means = rate_means(curve)
    inside = np.interp(ln_lr, lrs, means)
    left = max((means[0] - means[1]) / (lrs[1] - lrs[0]), 0.0) * np.maximum(lrs[0] - ln_lr, 0)
    right = max((means[-1] - means[-2]) / (lrs[-1] - lrs[-2]), 0.0) * np.maximum(ln_lr - lrs[-1], 0)
    return (inside + left + right - means.min()) / (abs(means.min()) or 1.0)


def _around(value: float, draws: np.ndarray, n: int, enough: bool) -> Estimate:
    if not enough:
        return Estimate(float(value), n=n)
    low, high = from_draws(draws, n).interval
    return Estimate(float(value), min(low, float(value)), max(high, float(value)), n)


# ---------------------------------------------------------------- regression on optima


def by_optima(optima: Sequence[Optimum], hidden: dict[str, float]) -> list[Law]:
    """Fit ln(best LR) = ln(LR at 2000) + p ln(2000 / hidden) to the known optima.

    There is one regression per family and method. Each model gives one row, the mean over its
    ranks. A row's variance is its own error plus a variance between models. Curves whose best LR is
    at an edge are left out. This can bias the law, so a flag states the number of these curves.

    Args:
        hidden: model -> hidden size.
    """
    laws = []
    for (name, method), members in _groups(optima, [o.curve for o in optima], hidden):
        known = [o for o in members if o.best_lr.draws is not None]
        missing = len(members) - len(known)
        flags = (f"{missing} of {len(members)} optima are bounds only",) if missing else ()
        models = sorted({o.curve.key["model"] for o in known})
        sizes = np.array([hidden[m] for m in models])
        if len(models) < 3 or len(set(sizes)) < 2:
            unknown = Estimate(None, n=len(known))
            flags = (*flags, "too few optima or one hidden size")
            laws.append(Law(name, method, unknown, unknown, len(models), None, flags))
            continue
        logs = [
            np.mean([o.best_lr.log_draws for o in known if o.curve.key["model"] == m], axis=0)
            for m in models
        ]
        y, v = np.array([d.mean() for d in logs]), np.array([d.var() for d in logs])
        design = np.stack([np.ones(len(y)), np.log(REFERENCE / sizes)], 1)
        fit = meta_regression(y, v, design)
        at, p = exp_of(fit.term(0)), fit.term(1)
        laws.append(Law(name, method, at, p, len(models), None, flags))
    return laws

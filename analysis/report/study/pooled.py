"""One claim on several bases: a random effect over them, beside the single ones.

Bases are replicates of one question. None raises another's bar, and none of the verdicts changes.
An estimate that a gate forbids to judge, such as a best rate at an edge, is left out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from analysis.inference.decide import scale_of
from analysis.inference.estimate import AT_LEAST, Estimate, Verdict, exp_of
from analysis.inference.meta import random_effects
from analysis.report.study.answers import Part
from analysis.report.study.setting import Setting

MIN_BASES = 3
"""With two bases the interval of a random effect is Student's with one degree of freedom, which
says nothing."""
Key = tuple[str, str, str, Setting, bool]


@dataclass(frozen=True)
class Pooled:
    """The average of one claim's estimates over bases."""

    bases: tuple[str, ...]
    estimate: Estimate
    """Without a value if the bases that are not left out are too few."""
    one: tuple[Part, Verdict]
    """One of the verdicts on these bases, with its answer."""
    left_out: tuple[str, ...] = ()
    """Bases on which a gate forbids every such verdict."""


def pooled(parts: Sequence[Part]) -> list[Pooled]:
    """Pool every claim that has intervals on MIN_BASES bases of one scale and one setting.

    Answers of one base are not averaged first: the one with the most runs stands for it.
    Exploratory and confirmatory verdicts are never mixed.
    """
    found: dict[Key, dict[str, tuple[Part, Verdict]]] = {}
    for part in sorted(parts, key=lambda p: -int(p.results.get("runs", 0))):
        claims = [v.claim for v in part.verdicts]
        for v in part.verdicts:
            if claims.count(v.claim) == 1 and len(part.bases) == 1 and _has_spread(v):
                scale = part.results["scale"].partition("_")[0]
                sweep, setting = part.results["sweep"], part.setting(v.group)
                key = (sweep, v.claim, scale, setting, bool(v.exploratory))
                mine, base = found.setdefault(key, {}), part.bases[0]
                if base not in mine or (mine[base][1].gates and not v.gates):
                    mine[base] = (part, v)
    return [_pool(mine) for mine in found.values() if len(mine) >= MIN_BASES]


def _has_spread(v: Verdict) -> bool:
    """Return whether a verdict has an interval of its value, and not of a bound or a count."""
    e, to = v.estimate, scale_of(v.log)
    if e.value is None or not e.has_interval() or AT_LEAST in e.flags:
        return False
    low, high = map(to, e.interval)
    return math.isfinite(low) and low < high


def _pool(by_base: dict[str, tuple[Part, Verdict]]) -> Pooled:
    """Pool estimates at the widest of their levels, so that the price of looks stays paid.

    An interval's half-width counts as a Normal one. At few seeds it is Student's, so the single
    errors are taken too large rather than too small.
    """
    judged = {base: one for base, one in by_base.items() if not one[1].gates}
    left_out = tuple(sorted(by_base.keys() - judged.keys()))
    bases, one = tuple(sorted(judged)), next(iter((judged or by_base).values()))
    if len(judged) < MIN_BASES:
        return Pooled(bases, Estimate(None), one, left_out)
    values, errors = [], []
    level = max(v.estimate.level for _, v in judged.values())
    for _, v in judged.values():
        to = scale_of(v.log)
        low, high = map(to, v.estimate.interval)
        values.append(to(float(v.estimate.value or 0.0)))
        errors.append((high - low) / 2 / float(stats.norm.ppf(0.5 + v.estimate.level / 2)))
    over = random_effects(values, errors, level)
    estimate = Estimate(over.mean, over.low, over.high, over.k, level=level)
    return Pooled(bases, exp_of(estimate) if one[1].log else estimate, one, left_out)

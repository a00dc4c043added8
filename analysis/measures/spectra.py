"""Spectral norms of A, of B and of the weights' whole change, at each curve's best rate."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.inference.estimate import Estimate, exp_of
from analysis.inference.seeds import pooled_variance
from analysis.measures.at_best import AtBest, over_seeds, values_at_best
from analysis.optimum.optimum import Optimum

Norms = dict[str, dict[str, float]]
"""Matrix -> a, b, delta (the change) -> spectral norm."""


@dataclass(frozen=True)
class Spectra:
    """The norms of one curve by seed, and ratios of them."""

    by_seed: dict[int, Norms]
    growth: Estimate
    """Norm of B over norm of A, median over matrices."""
    movement: Estimate
    """Norm of the change over full fine-tuning's, median over matrices."""

    def median(self, part: str) -> float:
        """Return the median of a, b or delta over seeds and matrices; NaN if there is none."""
        values = [v.get(part, math.nan) for m in self.by_seed.values() for v in m.values()]
        return float(np.median(values))


def spectra_of(table: pd.DataFrame, optima: Sequence[Optimum]) -> list[Spectra]:
    """Return the norms of every curve; growth and movement only for LoRA."""
    found = [runs.map(_by_matrix) for runs in values_at_best(table, optima, _log_spectra)]
    none: AtBest[Norms] = AtBest({})
    full = next((v for o, v in zip(optima, found) if o.curve.key["method"] == "fullft"), none)
    lora = [v if o.curve.key["method"] == "lora" else none for o, v in zip(optima, found)]
    grown = [v.map(lambda m: _median_log(m, "b", m, "a")) for v in lora]
    moved = [v.paired(full, lambda m, f: _median_log(m, "delta", f, "delta")) for v in lora]
    of_growth, of_movement = (
        pooled_variance([list(v.best.values()) for v in mine]) for mine in (grown, moved)
    )
    return [
        Spectra(v.best, exp_of(over_seeds(g, of_growth)), exp_of(over_seeds(m, of_movement)))
        for v, g, m in zip(found, grown, moved)
    ]


def _log_spectra(row: pd.Series) -> dict[tuple[str, str], float]:
    """Return the logarithms of a run's spectral norms by (matrix, a, b or delta).

    Logarithms interpolate well between rates.
    """
    spectra = json.loads(row["result"]).get("spectra") or {}
    return {
        (matrix, what): math.log(v)
        for matrix, norms_ in spectra.items()
        for what, v in norms_.items()
        if v > 0
    }


def _by_matrix(logs: dict[tuple[str, str], float]) -> dict[str, dict[str, float]]:
    """Return spectral norms by matrix, then by a, b or delta."""
    out: dict[str, dict[str, float]] = {}
    for (matrix, what), v in logs.items():
        out.setdefault(matrix, {})[what] = math.exp(v)
    return out


def _median_log(
    a: dict[str, dict[str, float]], of: str, b: dict[str, dict[str, float]], over: str
) -> float:
    """Return the median of ln(a / b) over the matrices that both have."""
    return float(
        np.median(
            [
                math.log(a[n][of] / b[n][over])
                for n in a.keys() & b.keys()
                if b[n][over] > 0 and a[n][of] > 0
            ]
        )
    )

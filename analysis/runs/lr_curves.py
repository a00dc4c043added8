"""LR curves: loss over learning rates. Curves of loss over updates are in `learning_curves`."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.runs.table import (
    CURVE_KEYS,
    CUT_FROM,
    GROUP_KEYS,
    NLL,
    Shown,
    check,
    collapsed,
    shown,
)

_PARAMETERS = re.compile(r"(\w+)\((\w+=[^()]+)\)")
SHARES = {"rule_shift": "rules", "new_exceptions": "exceptions"}
"""Generator parameter that is a share of new items -> name of the items."""
IN_NAME = ("method", "rank", "expert_rank", "expert_outer")
"""Settings in a curve's name."""


@dataclass(frozen=True)
class LrCurve:
    """Loss over learning rates of runs that differ only in LR and seed; arrays are [n]."""

    key: dict[str, Any]
    """The settings that the runs share: columns of CURVE_KEYS and their values."""
    x: np.ndarray
    """ln(lr)."""
    y: np.ndarray
    """Held-out NLL in nats; NaN where the run did not finish, or its reward collapsed."""
    seed: np.ndarray
    block: np.ndarray
    """Runs of one block share a shift of the loss: usually those of one seed, which see the same
    batches at every LR."""
    usable: np.ndarray
    """False: the run diverged or ended no better than the untrained model. It bounds the optimum
    but is not fitted."""
    nll_start: float
    """Held-out NLL before training; NaN if unknown."""
    floor: float
    """NLL of the generator that wrote the data, the lowest possible loss; NaN if unknown."""
    cut_from: int | None = None
    """Number of updates of the full runs, if the curve uses only their first updates."""
    shown: Shown = NLL

    @property
    def name(self) -> str:
        """Return a readable name: method, rank and, with experts, how the rank is divided."""
        rank, experts = self.key.get("rank"), self.key.get("expert_rank")
        name = self.key["method"] + (f" r{rank:.0f}" if _known(rank) else "")
        shared = ", shared" if self.key.get("expert_outer") == "shared" else ""
        return f"{name} (experts: {experts}{shared})" if _known(experts) else name

    @property
    def is_full(self) -> bool:
        """Whether the curve is of full fine-tuning of all weights."""
        return bool(self.key["method"] == "fullft" and not self.is_control)

    @property
    def is_control(self) -> bool:
        """Whether the curve is of full fine-tuning of some matrices only."""
        return self.key.get("scope") == "matrices"

    @property
    def broke_down(self) -> np.ndarray:
        """Mask of runs that diverged, collapsed, or ended no better than the untrained model."""
        return ~np.isfinite(self.y) | (self.y >= self.nll_start)

    @property
    def unbroken(self) -> np.ndarray:
        """ln of the LRs with usable runs only, rising, up to the first LR with an unusable run.

        Fitted lines end there, because at higher LRs the usable runs are a biased sample.
        """
        rates = np.unique(self.x)
        whole = np.array([bool(self.usable[self.x == v].all()) for v in rates], bool)
        first = int(whole.argmax()) if whole.any() else len(rates)
        return rates[first:][np.logical_and.accumulate(whole[first:])]

    @property
    def group(self) -> str:
        """Name the group within which arms are compared: see GROUP_KEYS."""
        steps = self.key.get("steps")
        return self.place(self.key["dataset"], f"steps {int(steps or 0)}" if _known(steps) else "")

    def place(self, dataset: str, length: str) -> str:
        """Name model, data set, objective, batch size and length, as far as they are known."""
        objective, batch = self.key.get("objective"), self.key.get("batch_size")
        words = [f"{self.key['model']} on {dataset}"]
        words += [str(objective).replace("_", " ")] if _known(objective) else []
        words += [f"batch {int(batch or 0)}"] if _known(batch) else []
        return ", ".join([*words, *filter(None, [length])])


def title(curve: LrCurve) -> str:
    """Return the title of a group's figures, in words."""
    updates = ""
    if _known(curve.key.get("steps")):
        steps = int(curve.key["steps"])
        updates = f"first {steps} of {curve.cut_from}" if curve.cut_from else f"{steps}"
        updates += " updates"
    return curve.place(in_words(str(curve.key["dataset"])), updates)


def in_words(text: str) -> str:
    """Write the parameters behind a data set's name as words.

    "dialect(new_exceptions=0, rule_shift=1)" becomes
    "dialect (no new exceptions, all rules new)".
    """

    def words(found: re.Match[str]) -> str:
        said = []
        for key, _, value in (part.partition("=") for part in found[2].split(", ")):
            if what := SHARES.get(key):
                share = f"{100 * float(value):g}"
                ends = {"0": f"no new {what}", "100": f"all {what} new"}
                said.append(ends.get(share, f"{share}% of the {what} new"))
            else:
                said.append(f"{key.replace('_', ' ')} {value}")
        return f"{found[1]} ({', '.join(said)})"

    return _PARAMETERS.sub(words, text)


def lr_curves(table: pd.DataFrame) -> list[LrCurve]:
    """Split a table into curves, full fine-tuning first, then by rank."""
    check(table)
    keys = [k for k in CURVE_KEYS if k in table.columns]
    found = []
    for key, part in table.groupby(keys, dropna=False):
        part = part.sort_values(["lr", "seed"])
        y, lr = part["test_nll"].astype(float).to_numpy(), part["lr"].astype(float).to_numpy()
        start, floor, cut_from = (
            part[c].astype(float).to_numpy() if c in part else np.full(len(part), np.nan)
            for c in ("nll_start", "floor_nats", CUT_FROM)
        )
        done = (part["status"] == "done").to_numpy() & np.isfinite(y) & ~collapsed(part).to_numpy()
        usable = done & ~(y >= start)  # a NaN start compares False: the point stays usable
        whole = [v for v in np.unique(lr) if usable[lr == v].all()]
        if whole:
            # Runs that survive above the first LR at which one diverged are not fitted.
            best = min(whole, key=lambda v: y[lr == v].mean())
            broken = lr[~usable & (lr > best)]
            usable &= lr < (broken.min() if len(broken) else np.inf)
        nll_start, lowest = (
            float(v[np.isfinite(v)].mean()) if np.isfinite(v).any() else math.nan
            for v in (start, floor)
        )
        updates = np.nanmax([0.0, *cut_from])
        found.append(
            LrCurve(
                key=dict(zip(keys, key)),
                x=np.log(lr),
                y=np.where(done, y, np.nan),
                seed=part["seed"].astype(int).to_numpy(),
                block=part["block" if "block" in part else "seed"].astype(int).to_numpy(),
                usable=usable,
                nll_start=nll_start,
                floor=lowest,
                cut_from=int(updates) if updates and updates > part["steps"].max() else None,
                shown=shown(part),
            )
        )

    def order(c: LrCurve) -> tuple[str, bool, str, float]:
        rank = float(c.key["rank"]) if _known(c.key.get("rank")) else 0.0
        return c.group, c.key["method"] != "fullft", c.key["method"], rank

    return sorted(found, key=order)


def _known(value: Any) -> bool:
    return value is not None and value == value


def runs_of(table: pd.DataFrame, curve: LrCurve) -> pd.DataFrame:
    """Return the rows of a table that belong to a curve."""
    belongs = pd.Series(True, table.index)
    for column in curve.key.keys() & set(table.columns):
        value = curve.key[column]
        belongs &= table[column] == value if _known(value) else table[column].isna()
    return table[belongs]


def variants(curves: Sequence[LrCurve]) -> list[str]:
    """Describe each curve by the settings beyond group, method and rank in which they differ."""
    keys = [k for k in CURVE_KEYS if k not in (*GROUP_KEYS, "method", "rank", "scope")]
    apart = [k for k in keys if len({str(c.key.get(k)) for c in curves}) > 1]
    return [", ".join(_setting(k, c.key.get(k)) for k in apart) for c in curves]


def _setting(key: str, value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{key} {text if _known(value) else 'unknown'}"


def full_names(curves: Sequence[LrCurve]) -> list[str]:
    """Name curves by method, rank, and the settings in which they differ from each other."""
    keys = [k for k in (curves[0].key if curves else ()) if k not in (*GROUP_KEYS, *IN_NAME)]
    # Compare LoRA's curves within an objective, because objectives differ in their settings.
    values: dict[str, set[tuple[str, str]]] = {k: set() for k in keys}
    for c in (c for c in curves if c.key["method"] == "lora"):
        for k in keys:
            values[k].add((str(c.key.get("objective")), str(c.key[k])))
    apart = {k for k, v in values.items() if len(v) > len({objective for objective, _ in v})}
    full = [c.key for c in curves if c.key["method"] == "fullft"]
    scopes = {(key.get("scope"), key.get("layers")) for key in full}
    of_full = ["scope", "layers"] if len(scopes) > 1 else []
    names = []
    for c in curves:
        of = [k for k in keys if k in apart] if c.key["method"] == "lora" else of_full
        known = [(k, c.key[k]) for k in of if _known(c.key[k])]
        settings = [str(v) if k == "layers" else _setting(k, v) for k, v in known]
        names.append(", ".join([c.name, *settings]))
    return names

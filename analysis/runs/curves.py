"""LR curves (loss over learning rates) and learning curves (held-out loss over updates) of runs.

At a constant learning rate a run of S updates equals the first S updates of any longer run. A
task's floor is the NLL of the generator that wrote the data: no model can beat it.
"""

import hashlib
import json
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
    TableError,
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
    mixed: bool = False
    """Whether a foreign trainer's runs were trained with several versions of its libraries."""
    prints: tuple[str, ...] = ()
    """Fingerprints of the base weights and of the data, where known."""

    def stream(self, purpose: str) -> np.random.Generator:
        """Return random numbers seeded by the purpose and by what the curve's runs were.

        So they depend on no list. Curves of other settings, lengths, seeds, base or data are
        independent, and of one curve every reader gets the same draws.
        """
        settings = sorted((k, str(v)) for k, v in self.key.items())
        name = repr((purpose, settings, sorted(set(self.seed.tolist())), self.prints))
        return np.random.default_rng(int(hashlib.sha256(name.encode()).hexdigest(), 16))

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
        words += [f"by {trainer}"] if _known(trainer := self.key.get("trainer")) else []
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
        if "weights_sha256" in part:  # a trainer that ignores its seed: no second observation
            given = part["weights_sha256"].notna() & (part["status"] == "done")
            part = part[~(given & part.duplicated(["lr", "weights_sha256"]))]
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
        updates = np.nanmax([0.0, *cut_from]) if "steps" in part else 0.0
        found.append(
            LrCurve(
                key=dict(zip(keys, key)),
                x=np.log(lr),
                y=np.where(done, y, np.nan),
                seed=part["seed"].astype(int).to_numpy(),
                block=part.get("block", part["seed"]).fillna(part["seed"]).astype(int).to_numpy(),
                mixed=part.get("trainer_versions", part["seed"] * 0).nunique() > 1,
                usable=usable,
                nll_start=nll_start,
                floor=lowest,
                cut_from=int(updates) if updates and updates > part["steps"].max() else None,
                shown=shown(part),
                prints=tuple(
                    str(v)
                    for c in ("base_sha256", "data_sha256")
                    for v in sorted(part.get(c, part["seed"].iloc[:0]).dropna().unique())
                ),
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
    # Compare the curves of a method within an objective: objectives differ in their settings.
    values: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for c in curves:
        for k in keys:
            seen = values.setdefault((c.key["method"], k), set())
            seen.add((str(c.key.get("objective")), str(c.key[k])))
    apart = {k for k, v in values.items() if len(v) > len({objective for objective, _ in v})}
    trained = {("fullft", "scope"), ("fullft", "layers")}
    apart |= trained if trained & apart else set()
    names = []
    for c in curves:
        known = [(k, c.key[k]) for k in keys if (c.key["method"], k) in apart and _known(c.key[k])]
        known.sort(key=lambda setting: setting[0] != "scope")  # before the matrices that it means
        settings = [str(v) if k == "layers" else _setting(k, v) for k, v in known]
        names.append(", ".join([c.name, *settings]))
    return names


Points = list[tuple[float, float]]
"""A learning curve: (step, held-out NLL in nats), by increasing step."""
MIN_GAIN = 20.0
"""Smallest gain of a task, in standard deviations of the difference between two runs."""
MIN_REST = 0.2
"""Share of the starting excess over the floor that must be left at the best LR: a solved task does
not separate learning rates."""


def learning_curves(table: pd.DataFrame) -> pd.DataFrame:
    """Return all evaluations of a table's runs, in order; empty if there are none.

    Columns: `run`, the run's label in the table's index; `step`; `test_nll` in nats;
    `test_nll_curve`, before training (not in old results) and at its end the loss on the rows of
    the evaluations between; `grad_share`, the share of the squared gradient by layer set. Missing
    and infinite values are NaN.
    """
    assert table.index.is_unique, "the index of the table must be unique: call reset_index() first"
    results = table["result"].items() if "result" in table.columns else ()
    texts = [(run, v) for run, v in results if isinstance(v, str) and v.startswith("{")]
    points = [{"run": r, **point} for r, v in texts for point in json.loads(v).get("curve") or []]
    columns = ["run", "step", "test_nll", "test_nll_curve", "grad_share"]
    found = pd.DataFrame(points, columns=columns)
    found = found.astype({"test_nll": float, "test_nll_curve": float})
    return found.replace([math.inf, -math.inf], math.nan)


def by_run(table: pd.DataFrame) -> dict[object, pd.DataFrame]:
    """Return label in the table's index -> learning curve, for the runs that have one."""
    return dict(iter(learning_curves(table).groupby("run", sort=False)))


def same_rows(curve: pd.DataFrame | None) -> Points:
    """Return evaluations on the same held-out rows, without step 0, which has no logarithm.

    The last evaluation uses more rows, so its loss on the same rows is taken. Old results without
    that loss end one evaluation earlier.
    """
    if curve is None:
        return []
    # numpy, because pandas would take most of an analysis' time here.
    steps, nll, again = (curve[c].to_numpy(float) for c in ("step", "test_nll", "test_nll_curve"))
    kept = (steps >= 1) & ~np.isnan(nll)
    losses = np.where(np.isnan(again), nll, again)
    points = list(zip(steps[kept].tolist(), losses[kept].tolist()))
    return points[:-1] if np.isnan(again[kept][-1:]).any() else points


def at_step(table: pd.DataFrame, step: int) -> pd.DataFrame:
    """Return the table that the same runs would give if they had ended after `step` updates.

    Losses, also those before training, come from the learning curves, whose held-out rows are
    fewer, but the same in all runs. Runs without an evaluation at `step` are left out, unless they
    had diverged by then.

    Raises TableError: a schedule is not constant, so runs are not beginnings of longer ones.
    """
    if (table["schedule"] != "constant").any():
        raise TableError("only runs with a constant learning rate can be cut to shorter ones.")
    learned = learning_curves(table)
    nll = learned[learned["step"] == step].set_index("run")["test_nll"]
    start, rows = starts_on_curve(table, learned), []
    for run, row in table.iterrows():
        ended = {CUT_FROM: int(row.get(CUT_FROM, row["steps"])), "nll_start": start[run]}
        if row["steps"] == step:
            rows.append({**row})
        elif run in nll.index:
            result = json.loads(row["result"])
            curve = [p for p in result["curve"] if p["step"] <= step]
            if curve:  # as if the run ended there
                curve[-1] = {**curve[-1], "test_nll_curve": curve[-1]["test_nll"]}
            ended |= {"status": "done", "steps": step, "test_nll": nll[run]}
            rows.append({**row, **ended, "result": json.dumps({**result, "curve": curve})})
        elif row["status"] == "diverged" and row["steps_done"] <= step < row["steps"]:
            rows.append({**row, "steps": step, **ended})
    return pd.DataFrame(list(rows)).reset_index(drop=True)


def on_curve_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with losses on the rows of the evaluations between, where recorded.

    These are the final losses and those before training.
    """
    learned = learning_curves(table)
    ended = learned[learned["step"] > 0].dropna(subset="test_nll_curve")
    again = ended.groupby("run")["test_nll_curve"].last()
    final = again.reindex(table.index).fillna(table["test_nll"])
    return table.assign(test_nll=final, nll_start=starts_on_curve(table, learned))


def starts_on_curve(table: pd.DataFrame, learned: pd.DataFrame) -> pd.Series:
    """Return each run's loss before training on the rows of its learning curve.

    Old results have it on all test rows only. `learned`: the learning curves of the table.
    """
    on_curve = learned[learned["step"] == 0].set_index("run")["test_nll_curve"]
    start = table["nll_start"] if "nll_start" in table.columns else math.nan
    return on_curve.reindex(table.index).fillna(pd.Series(start, table.index))


def steps_seen(table: pd.DataFrame) -> list[int]:
    """List the steps between start and end, rising, at which every finished run was evaluated."""
    learned = by_run(table)
    done = table.index[table["status"] == "done"]
    seen = [set(learned[run]["step"].iloc[1:-1]) if run in learned else set() for run in done]
    return sorted(map(int, set.intersection(*seen))) if seen else []


def while_unsolved(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Cut runs of one length before the task is solved; also return a sentence about the cut.

    The cut is at the last step at which MIN_REST of the excess over the floor is still left at the
    best LR: a solved task does not separate two methods, but the beginnings of the runs still do.
    The sentence is empty without a cut: the floor is unknown, the task is not solved at the end, or
    no evaluated step is early enough.
    """
    floor, start = (
        float(np.nanmean(table[c])) if c in table and table[c].notna().any() else np.nan
        for c in ("floor_nats", "nll_start")
    )
    varies = table["steps"].nunique() > 1 or (table["schedule"] != "constant").any()
    if varies or not np.isfinite(start - floor):
        return table, ""
    on_curve = float(np.nanmean(starts_on_curve(table, learning_curves(table))))
    for step in (last := int(table["steps"].max()), *reversed(steps_seen(table))):
        part, before = (table, start) if step == last else (at_step(table, step), on_curve)
        done = part[part["status"] == "done"]
        # Subtract floors run by run: data drawn by seed have one each, few seeds ran at some LRs.
        left = (done["test_nll"] - done["floor_nats"]).rename("left")
        by_rate = left.groupby([done[c] for c in ("method", "rank", "lr")], dropna=False)
        if by_rate.mean().min() >= MIN_REST * (before - floor):
            return part, "" if step == last else (
                f"Cut at {step} of {last} updates: later less than {MIN_REST:.0%} of the "
                "excess over the floor is left, and the task is nearly solved."
            )
    return table, ""


def task_problems(start: float, floor: float, lowest: float, noise: float) -> list[str]:
    """List the reasons why the task cannot separate methods; NaN values are not checked.

    All values are in nats. `start`: full fine-tuning's loss before training. `lowest`: the lowest
    loss of all curves. `noise`: standard deviation of one run.
    """
    gain = (start - lowest) / (math.sqrt(2) * noise) if noise > 0 else math.nan
    if gain < MIN_GAIN:
        return [
            f"the gain is {gain:.3g} standard deviations of the difference between two runs, "
            f"{MIN_GAIN:g} needed"
        ]
    if (lowest - floor) / (start - floor) < MIN_REST:
        return ["nearly solved, less than a fifth of the starting excess is left"]
    return []

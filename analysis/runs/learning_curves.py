"""Read learning curves (held-out loss over updates), cut runs to shorter ones, find solved tasks.

At a constant learning rate a run of S updates equals the first S updates of any longer run. A
task's floor is the NLL of the generator that wrote the data: no model can beat it. LR curves,
the loss over learning rates, are in `lr_curves`.
"""

import json
import math

import numpy as np
import pandas as pd

from analysis.runs.table import CUT_FROM, TableError

COLUMNS = ("run", "step", "test_nll", "test_nll_curve", "grad_share")
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
    found = pd.DataFrame(points, columns=list(COLUMNS))
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
            rows.append(row)
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
        # Subtract floors run by run: data drawn by seed have a floor each, and few seeds ran at
        # some LRs.
        left = (done["test_nll"] - done["floor_nats"]).rename("left")
        by_rate = left.groupby([done[c] for c in ("method", "rank", "lr")], dropna=False)
        if by_rate.mean().min() >= MIN_REST * (before - floor):
            return part, "" if step == last else (
                f"Cut at {step} of {last} updates: later less than {MIN_REST:.0%} of the "
                "excess over the floor is left, and the task is nearly solved."
            )
    return table, ""


def gain_in_noise(start: float, lowest: float, noise: float) -> float:
    """Return the gain in standard deviations of the difference of two runs; `noise`: of one run."""
    return (start - lowest) / (math.sqrt(2) * noise) if noise > 0 else math.nan


def task_problems(start: float, floor: float, lowest: float, noise: float) -> list[str]:
    """List the reasons why the task cannot separate methods; NaN values are not checked.

    All values are in nats. `start`: full fine-tuning's loss before training. `lowest`: the lowest
    loss of all curves. `noise`: standard deviation of one run.
    """
    if (gain := gain_in_noise(start, lowest, noise)) < MIN_GAIN:
        return [
            f"the gain is {gain:.3g} standard deviations of the difference between two runs, "
            f"{MIN_GAIN:g} needed"
        ]
    if (lowest - floor) / (start - floor) < MIN_REST:
        return ["nearly solved, less than a fifth of the starting excess is left"]
    return []

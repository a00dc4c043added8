"""Shorter runs taken from longer ones, and whether a task leaves room for methods to differ.

At a constant learning rate a run of S updates equals the first S updates of any longer run. What is
left to learn needs the task's floor: the NLL of the generator that wrote the data, which no model
can beat.
"""

import math

import numpy as np
import pandas as pd

from analysis.runs.learning_curves import by_run, cut, learning_curves
from analysis.runs.table import CUT_FROM, TableError

MIN_GAIN = 20.0
"""Full fine-tuning must gain at least so many standard deviations of the difference of two runs."""
MIN_REST = 0.2
"""The best run must leave at least this share of the starting excess over the floor: a solved task
does not separate learning rates."""


def at_step(table: pd.DataFrame, step: int) -> pd.DataFrame:
    """Return the table that the same runs would give if they had ended after `step` updates.

    Losses come from the learning curves. These use fewer held-out rows than the last evaluation,
    but the same ones in all runs. A run that had diverged by then is diverged; runs without an
    evaluation at that step are left out.

    Raises:
        TableError: a schedule is not constant, so that the runs are not prefixes of each other.
    """
    if (table["schedule"] != "constant").any():
        raise TableError("only runs with a constant learning rate can be cut to shorter ones.")
    learned = learning_curves(table)
    nll = learned[learned["step"] == step].set_index("run")["test_nll"]
    rows = []

    def whole(row: pd.Series) -> dict[str, int]:
        return {CUT_FROM: int(row.get(CUT_FROM, row["steps"]))}

    for run, row in table.iterrows():
        if row["steps"] == step:
            rows.append(row)
        elif run in nll.index:
            ended = {"status": "done", "steps": step, "test_nll": nll[run], **whole(row)}
            rows.append({**row, **ended, "result": cut(row["result"], step)})
        elif row["status"] == "diverged" and row["steps_done"] <= step < row["steps"]:
            rows.append({**row, "steps": step, **whole(row)})
    return pd.DataFrame(list(rows)).reset_index(drop=True)


def on_curve_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with final losses on the held-out rows of the earlier evaluations.

    So a loss at the end can be compared with one on the way. Runs that have no such loss keep the
    one on all rows.
    """
    learned = learning_curves(table).dropna(subset="test_nll_curve")
    again = learned.groupby("run")["test_nll_curve"].last()
    return table.assign(test_nll=again.reindex(table.index).fillna(table["test_nll"]))


def steps_seen(table: pd.DataFrame) -> list[int]:
    """List the steps, rising, at which every finished run was evaluated on the same held-out rows.

    The last evaluation, which uses more rows, is left out.
    """
    learned = by_run(table)
    done = table.index[table["status"] == "done"]
    seen = [set(learned[run]["step"].iloc[1:-1]) if run in learned else set() for run in done]
    return sorted(map(int, set.intersection(*seen))) if seen else []


def while_unsolved(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Cut runs of one length before the task is solved.

    The cut is at the last step at which a fifth (MIN_REST) of the excess over the floor is still
    left at the best rate: a solved task does not separate two methods, but the beginnings of the
    runs still do.

    Returns:
        The table and a sentence about the cut. The sentence is empty without a cut: the floor is
        unknown, the task is not solved at the end, or no evaluated step is early enough.
    """
    floor, start = (
        float(np.nanmean(table[c])) if c in table and table[c].notna().any() else np.nan
        for c in ("floor_nats", "nll_start")
    )
    varies = table["steps"].nunique() > 1 or (table["schedule"] != "constant").any()
    if varies or not np.isfinite(start - floor):
        return table, ""
    for step in (last := int(table["steps"].max()), *reversed(steps_seen(table))):
        part = table if step == last else at_step(table, step)
        done = part[part["status"] == "done"]
        # Each run's own floor: data drawn by seed have one each, and few seeds ran some rates.
        left = (done["test_nll"] - done["floor_nats"]).rename("left")
        by_rate = left.groupby([done[c] for c in ("method", "rank", "lr")], dropna=False)
        if by_rate.mean().min() >= MIN_REST * (start - floor):
            return part, "" if step == last else (
                f"Cut at {step} of {last} updates: later less than {MIN_REST:.0%} of the "
                "excess over the floor is left, and the task is nearly solved."
            )
    return table, ""


def gain_in_noise(start: float, lowest: float, noise: float) -> float:
    """Return the gain, in standard deviations of the difference of two runs of one seed.

    Args:
        start: loss before training, lowest: at the best rate; in nats.
        noise: standard deviation of one run, in nats.
    """
    return (start - lowest) / (math.sqrt(2) * noise) if noise > 0 else math.nan


def task_problems(start: float, floor: float, lowest: float, noise: float) -> list[str]:
    """List the reasons why the task cannot separate methods; NaN values are not checked.

    Args:
        start: full fine-tuning's loss before training, floor: the least possible one, lowest: the
            lowest of all curves; in nats.
        noise: standard deviation of one run, in nats.
    """
    found = []
    if (gain := gain_in_noise(start, lowest, noise)) < MIN_GAIN:
        found.append(
            f"the gain is {gain:.3g} standard deviations of the difference between two runs, "
            f"{MIN_GAIN:g} needed"
        )
    elif (lowest - floor) / (start - floor) < MIN_REST:
        found.append("nearly solved, less than a fifth of the starting excess is left")
    return found

"""Shorter runs out of longer ones: a run of S updates at a constant rate is the beginning of every longer one."""

import json

import pandas as pd

from analysis.table import TableError


def at_step(table: pd.DataFrame, step: int) -> pd.DataFrame:
    """Return the table that the runs would have made had they ended after `step` updates.

    Losses are those of the learning curves, which use fewer held-out rows than the last evaluation, the same in all runs. A
    run that broke down by then is diverged; runs without an evaluation at that step are left out.

    Raises:
        TableError: runs with another schedule than a constant one are no prefixes of each other.
    """
    if (table["schedule"] != "constant").any():
        raise TableError("only runs at a constant rate hold shorter ones.")
    rows = []
    for _, row in table.iterrows():
        result = json.loads(row["result"])
        found = [p for p in result.get("curve") or [] if p["step"] == step]
        if row["steps"] == step:
            rows.append(row)
        elif found:
            whole = result["curve"][: next(k for k, p in enumerate(result["curve"]) if p["step"] == step) + 1]
            short = json.dumps({**result, "curve": whole})
            rows.append({**row, "status": "done", "steps": step, "test_nll": found[0]["test_nll"], "result": short})
        elif row["status"] == "diverged" and result.get("steps_done", 0) <= step < row["steps"]:
            rows.append({**row, "steps": step})
    return pd.DataFrame(list(rows)).reset_index(drop=True)


def steps_seen(table: pd.DataFrame) -> list[int]:
    """List the steps at which every finished run was evaluated on the same held-out rows, rising; the last one left out."""
    seen: set[int] | None = None
    for text in table.loc[table["status"] == "done", "result"]:
        mine = {int(p["step"]) for p in json.loads(text)["curve"][1:-1]}
        seen = mine if seen is None else seen & mine
    return sorted(seen or ())

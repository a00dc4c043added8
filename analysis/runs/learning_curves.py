"""Learning curves: held-out loss over updates, one row per run and evaluation.

Curves of loss over learning rates are in `lr_curves`.
"""

import json

import pandas as pd

COLUMNS = ("run", "step", "test_nll", "grad_share")
Points = list[tuple[float, float]]
"""A learning curve: (step, held-out NLL in nats), by increasing step."""


def learning_curves(table: pd.DataFrame) -> pd.DataFrame:
    """Return all evaluations of a table's runs, in order; empty if there are none.

    Columns: `run`, the run's label in the table's index; `step`; `test_nll` in nats; `grad_share`,
    the share of the squared gradient by layer set, where it was measured. Missing is NaN.
    """
    assert table.index.is_unique, "runs are distinguished by the table's index: reset_index() first"
    results = table["result"].items() if "result" in table.columns else ()
    points = [
        {"run": run, **point}
        for run, text in results
        if isinstance(text, str)
        for point in json.loads(text).get("curve") or []
    ]
    return pd.DataFrame(points, columns=list(COLUMNS)).astype({"test_nll": float})


def by_run(table: pd.DataFrame) -> dict[object, pd.DataFrame]:
    """Return each run's learning curve by its label in the table's index.

    Runs without a learning curve are left out.
    """
    return dict(iter(learning_curves(table).groupby("run", sort=False)))


def same_rows(curve: pd.DataFrame | None) -> Points:
    """Return the evaluations on the same held-out rows: from step 1 to the last but one.

    The last evaluation uses more rows, and step 0 has no logarithm.
    """
    if curve is None:
        return []
    kept = curve[(curve["step"] >= 1) & curve["test_nll"].notna()].iloc[:-1]
    return list(zip(kept["step"].astype(float), kept["test_nll"]))


def cut(result: str, step: int) -> str:
    """Cut the learning curve in a run's result (JSON) after `step`."""
    values = json.loads(result)
    return json.dumps({**values, "curve": [p for p in values["curve"] if p["step"] <= step]})

"""Learning curves: held-out loss over updates, one row per run and evaluation.

Curves of loss over learning rates are in `lr_curves`.
"""

import json

import numpy as np
import pandas as pd

COLUMNS = ("run", "step", "test_nll", "test_nll_curve", "grad_share")
Points = list[tuple[float, float]]
"""A learning curve: (step, held-out NLL in nats), by increasing step."""


def learning_curves(table: pd.DataFrame) -> pd.DataFrame:
    """Return all evaluations of a table's runs, in order; empty if there are none.

    Columns: `run`, the run's label in the table's index; `step`; `test_nll` in nats;
    `test_nll_curve`, at the end of training the loss on the rows of the earlier evaluations;
    `grad_share`, the share of the squared gradient by layer set. Missing is NaN.
    """
    assert table.index.is_unique, "runs are distinguished by the table's index: reset_index() first"
    results = table["result"].items() if "result" in table.columns else ()
    points = [
        {"run": run, **point}
        for run, text in results
        if isinstance(text, str)
        for point in json.loads(text).get("curve") or []
    ]
    return pd.DataFrame(points, columns=list(COLUMNS)).astype(
        {"test_nll": float, "test_nll_curve": float}
    )


def by_run(table: pd.DataFrame) -> dict[object, pd.DataFrame]:
    """Return each run's learning curve by its label in the table's index.

    Runs without a learning curve are left out.
    """
    return dict(iter(learning_curves(table).groupby("run", sort=False)))


def same_rows(curve: pd.DataFrame | None) -> Points:
    """Return the evaluations on the same held-out rows, from step 1 on.

    The last evaluation uses more rows, so its loss on the same rows is taken; results that do not
    have it end at the last evaluation but one. Step 0 has no logarithm.
    """
    if curve is None:
        return []
    # By numpy: this is called for every run, and pandas would take most of an analysis' time.
    steps, nll, again = (curve[c].to_numpy(float) for c in ("step", "test_nll", "test_nll_curve"))
    kept = (steps >= 1) & ~np.isnan(nll)
    losses = np.where(np.isnan(again), nll, again)
    points = list(zip(steps[kept].tolist(), losses[kept].tolist()))
    return points[:-1] if np.isnan(again[kept][-1:]).any() else points


def cut(result: str, step: int) -> str:
    """Cut the learning curve in a run's result (JSON) after `step`.

    Its last evaluation is on the rows of the others, and says so as the end of a run does.
    """
    values = json.loads(result)
    curve = [p for p in values["curve"] if p["step"] <= step]
    if curve:
        curve[-1] = {**curve[-1], "test_nll_curve": curve[-1]["test_nll"]}
    return json.dumps({**values, "curve": curve})

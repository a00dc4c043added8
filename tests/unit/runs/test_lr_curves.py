"""Tables that must be refused before a curve is made of them."""

import math

import numpy as np
import pandas as pd
import pytest

from analysis.runs.lr_curves import lr_curves
from analysis.runs.table import TableError

GRID = np.array([1e-4 * 2**k for k in range(7)])


def table(loss, seeds=(0,), lrs=GRID, rank=4, start=5.0, status=None):
    rows = []
    for lr in lrs:
        for seed in seeds:
            y = loss(lr, seed)
            state = "done" if math.isfinite(y) else "diverged"
            rows.append(
                {
                    "model": "m",
                    "dataset": "d",
                    "method": "lora",
                    "rank": rank,
                    "lr": lr,
                    "seed": seed,
                    "status": state,
                    "test_nll": y,
                    "nll_start": start,
                }
            )
    return pd.DataFrame(rows)


def test_two_bases_are_never_mixed():
    frame = table(lambda lr, s: 2.0, seeds=(0, 1))
    frame["base_sha256"] = np.where(frame["seed"] == 0, "a" * 64, "b" * 64)
    with pytest.raises(TableError, match="cannot share a curve"):
        lr_curves(frame)


def test_a_missing_column_is_named():
    with pytest.raises(TableError, match="test_nll"):
        lr_curves(pd.DataFrame({"model": ["m"]}))

"""Tables of runs with a planted valley, as users write them, and the command that reads them."""

import math

import numpy as np
import pandas as pd

from analysis.__main__ import main
from analysis.optimum.valley import linex

GRID = np.array([1e-4 * 2**k for k in range(7)])


def table(loss, seeds=(0,), lrs=GRID, rank=4, start=5.0):
    """One LoRA curve as our own stores export it: `loss(lr, seed)`, diverged where not finite."""
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


def planted(ranks=(None, 4, 16), seeds=(0, 1, 2), ratio=10.0, noise=1e-3, higher=False):
    """Seven rates around 1.3e-4 (full fine-tuning, rank None) and `ratio` times that (LoRA)."""
    rng = np.random.default_rng(3)
    rows = []
    for rank in ranks:
        best = 1.3e-4 * (1 if rank is None else ratio)
        for k in range(7):
            lr = float(f"{best * 1.15 * 2.0 ** (k - 3):.3g}")
            for seed in seeds:
                y = (
                    2
                    + 0.1 * float(linex(np.array(math.log(lr / best)), 0.5))
                    + 0.004 * seed
                    + noise * rng.standard_normal()
                )
                rows.append(
                    {
                        "model": "m",
                        "rank": rank,
                        "lr": lr,
                        "seed": seed,
                        "status": "done",
                        "test_nll": 1 - y / 10 if higher else y,
                    }
                )
    return pd.DataFrame(rows)


def write(tmp_path, table, name="runs.csv"):
    """Write the table as its name says; returns the path."""
    path = tmp_path / name
    table.to_parquet(path) if name.endswith("parquet") else table.to_csv(path, index=False)
    return path


def run(capsys, *argv):
    """Run `python -m analysis ...` in this process: code, standard output, standard error."""
    code = main([str(a) for a in argv])
    out = capsys.readouterr()
    return code, out.out, out.err

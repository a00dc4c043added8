"""Tables of runs with a planted valley, as users write them, and the command that reads them."""

import math

import numpy as np
import pandas as pd

from analysis.__main__ import main
from analysis.optimum.fit import linex
from analysis.runs.curves import LrCurve

GRID = np.array([1e-4 * 2**k for k in range(7)])


def table(loss, seeds=(0,), lrs=GRID, rank=4, start=5.0):
    """One LoRA curve as our own stores export it: `loss(lr, seed)`, diverged where not finite."""
    rows = [{"lr": lr, "seed": s, "test_nll": loss(lr, s)} for lr in lrs for s in seeds]
    found = pd.DataFrame(rows)
    status = np.where(np.isfinite(found["test_nll"]), "done", "diverged")
    arm = {"model": "m", "dataset": "d", "method": "lora", "rank": rank}
    return found.assign(**arm, status=status, nll_start=start)


def lr_curve(x, y, seed, start=math.nan, **key):
    """One curve of losses `y` at ln(lr) = `x`; a run without a loss has diverged."""
    key = {"model": "m", "dataset": "d", "method": "lora", "rank": 4.0, **key}
    return LrCurve(key, x, y, seed, seed, np.isfinite(y), start, math.nan)


def planted(ranks=(None, 4, 16), seeds=(0, 1, 2), ratio=10.0, noise=1e-3, higher=False):
    """Seven LRs around 1.3e-4 (full fine-tuning, rank None) and `ratio` times that (LoRA)."""
    rng, rows = np.random.default_rng(3), []
    for rank in ranks:
        best = 1.3e-4 * (1 if rank is None else ratio)
        for k in range(7):
            lr = float(f"{best * 1.15 * 2.0 ** (k - 3):.3g}")
            valley = 2 + 0.1 * float(linex(np.array(math.log(lr / best)), 0.5))
            for seed in seeds:
                y = valley + 0.004 * seed + noise * rng.standard_normal()
                run = {"model": "m", "rank": rank, "lr": lr, "seed": seed, "status": "done"}
                rows.append({**run, "test_nll": 1 - y / 10 if higher else y})
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

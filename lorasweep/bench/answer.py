"""Time the way from nothing to a ratio: lorasweep against one TRL process a run on a plain grid.

lorasweep's command is timed whole, from process start to the report. Of the plain grid a sample of
processes of each curve is timed and multiplied up: the runs of a curve differ only in learning rate
and seed.
"""

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasweep.bench.grids import Log, baseline, by_arm
from lorasweep.bench.overhead import command
from lorasweep.cli.points import all_points
from lorasweep.config.compose import compose_request
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point

PLAIN_RUNS = 7 * 3
"""Runs of a curve of the plain grid, 7 rates x 3 seeds: with fewer seeds no claim is judged."""
SAME_INTERVAL_RUNS = 7 * 2
"""Runs of a curve of the smallest plain grid that has an interval of the ratio at all. On planted
curves with the noise of `tiny` it is narrower than that of the sweep's own design
(analysis/results/calibration, "Runs for an interval")."""
SAMPLES = 3
"""Timed processes of each curve."""


def plain_grid_s(curves: Sequence[dict[str, Any]], runs: float) -> float:
    """Return the wall seconds of a plain grid, one process a run, one after the other.

    Args:
        curves: start_s and run_s of a process of each curve.
        runs: of one curve.
    """
    return sum(runs * (c["start_s"] + c["run_s"]) for c in curves)


def measure(scale: str, values: dict[str, Any], log: Log) -> dict[str, Any]:
    """Time the command and the processes, and divide the plain grids' seconds by the command's.

    Args:
        values: of an Exec, with absolute paths.
    """
    with tempfile.TemporaryDirectory() as folder:
        found, points = answer(scale, Path(folder))
        log(f"an answer from {found['runs']} runs in {found['wall_s']:.0f} s")
        curves = [_process(arm, values, folder) for arm in by_arm(points)]
    found |= versus(found["wall_s"], curves)
    log(
        f"{found['vs_plain_grid']:.1f} times faster than a plain grid of {PLAIN_RUNS} runs a "
        f"curve, {found['vs_same_interval']:.1f} times than one of {SAME_INTERVAL_RUNS} ({SAMPLES} "
        "TRL processes of each curve timed, and multiplied up)"
    )
    return found


def answer(scale: str, home: Path) -> tuple[dict[str, Any], list[Point]]:
    """Run `lr_ratio` from an empty store; return its time and ratio, and the runs."""
    asked = ["+sweep=lr_ratio", f"scale={scale}"]
    wall_s, found = command(*asked, f"exec.reports_dir={home / 'reports'}", runs_dir=home / "runs")
    store = RunStore(home / "runs")
    points = all_points(compose_request([*asked, f"exec.runs_dir={home / 'runs'}"]), store)
    states = Counter(store.state(p.id) for p in points)
    if set(states) - {"done", "diverged"}:
        raise RuntimeError(f"runs that did not end: {dict(states)}")
    (ratio,) = (r["ratio"] for r in found["ratios"] if r["rank"] is None)
    counts = {"runs": len(points), "diverged": states["diverged"]}
    return {
        "scale": scale,
        "wall_s": wall_s,
        **counts,
        **{k: ratio[k] for k in ("value", "low", "high")},
    }, points


def versus(wall_s: float, curves: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compare an answer's seconds with those of both plain grids.

    Args:
        wall_s: of the answer.
        curves: see `plain_grid_s`.
    """
    plain_s, same_s = (plain_grid_s(curves, runs) for runs in (PLAIN_RUNS, SAME_INTERVAL_RUNS))
    return {
        "processes": list(curves),
        "plain_runs": PLAIN_RUNS,
        "plain_grid_s": plain_s,
        "vs_plain_grid": plain_s / wall_s,
        "same_interval_runs": SAME_INTERVAL_RUNS,
        "same_interval_s": same_s,
        "vs_same_interval": same_s / wall_s,
    }


def _process(arm: Sequence[Point], values: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the mean times of SAMPLES processes of one curve, a run each."""
    timed = [baseline("trl", [point], values, 1, folder) for point in arm[:SAMPLES]]
    means = {k: sum(t[k] for t in timed) / len(timed) for k in timed[0]}
    rank = getattr(arm[0].spec.method, "rank", None)
    return {"arm": arm[0].arm, "rank": rank, "sampled": len(timed), **means}

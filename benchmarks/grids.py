"""Time whole grids of runs, and an answer from an empty store, against two baselines.

The baselines, one TRL process per run and a plain PEFT loop in one process, get all cores. They
train some runs of each curve, one after another. The time of the others, which differ only in
learning rate and seed, is extrapolated. lorasweep's commands are timed from process start to the
report.
"""

import dataclasses
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Figures, Log, command
from benchmarks.steps import at
from lorasweep.cli.points import all_points
from lorasweep.config.compose import compose_request
from lorasweep.launch.local import run_points
from lorasweep.plan import detect
from lorasweep.plan.load import run_flops
from lorasweep.plan.plan import make_plan
from lorasweep.spec.execution import Exec
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point

LORA_GRID = (
    "+sweep=lr_ratio",
    "~sweep.arms.fullft",
    "sweep.arms.lora.rank=[16]",
    "sweep.replicate.seeds=[]",
    "sweep.arms.lora.lr=${around:3e-4,16,1.3}",
)
PLAIN_RUNS = 7 * 3
"""Runs per curve of the plain grid, 7 LRs x 3 seeds: with fewer seeds no claim is judged."""
SAME_INTERVAL_RUNS = 7 * 2
"""Runs per curve of the smallest plain grid with an interval of the ratio. On simulated curves that
interval is narrower than the sweep's (analysis/results/calibration, "Runs for an interval")."""
SAMPLES = 3
"""Timed processes of each curve of the plain grid."""


def baseline(
    kind: str, points: Sequence[Point], values: dict[str, Any], runs: int, folder: str
) -> dict[str, float]:
    """Train `runs` of `points` with a baseline in one process; return seconds per run by part.

    Loading counts as start-up. The first of several runs warms up the process and does not count.
    """
    job = {"jobs": [[p.spec.plain()] for p in points[:runs]], "exec": values, "out": None}
    wall_s, rows = harness.baseline(kind, job, Path(folder))
    kept = rows[1:] or rows
    parts = {k: sum(r[k] for r in kept) / len(kept) for k in ("train_s", "eval_s")}
    start_s = wall_s - sum(r["train_s"] + r["eval_s"] for r in rows)
    return {"start_s": start_s, **parts, "run_s": sum(parts.values())}


def by_arm(points: Sequence[Point]) -> list[list[Point]]:
    """Group the runs by curve: one group for full fine-tuning, and one for each rank."""
    arms: dict[tuple[str, Any], list[Point]] = {}
    for p in points:
        arms.setdefault((p.arm, getattr(p.spec.method, "rank", None)), []).append(p)
    return list(arms.values())


def compare(
    points: Sequence[Point], whole_s: float, values: dict[str, Any], folder: str, samples: int
) -> dict[str, Any]:
    """Compare `whole_s`, the wall seconds of all `points`, with both baselines."""
    process_s = warm_s = 0.0
    alone_by_arm: list[Figures] = []
    warm_by_arm: list[Figures] = []
    for arm in by_arm(points):
        alone = baseline("trl", arm, values, 1, folder)
        warm = baseline("loop", arm, values, samples, folder)
        process_s += len(arm) * (alone["start_s"] + alone["run_s"])
        warm_s += len(arm) * warm["run_s"] + (0.0 if warm_by_arm else warm["start_s"])
        alone_by_arm.append({"arm": arm[0].arm, "runs": len(arm), **alone})
        warm_by_arm.append({"arm": arm[0].arm, "runs": len(arm), **warm})
    return {
        "runs": len(points),
        "lorasweep_s": whole_s,
        "process_per_run": alone_by_arm,
        "warm_peft": warm_by_arm,
        "process_per_run_s": process_s,
        "warm_peft_s": warm_s,
        "vs_process_per_run": process_s / whole_s,
        "vs_warm_peft": warm_s / whole_s,
    }


def _check_done(points: Sequence[Point], store: RunStore) -> None:
    """Check that all runs are done: a diverged run ends early, but a baseline never does."""
    states = {p.id: store.state(p.id) for p in points}
    rest = {i: s for i, s in states.items() if s != "done"}
    if rest:
        raise RuntimeError(f"runs that are not done: {rest}")


def flops_over_peak(points: Sequence[Point], wall_s: float, peak: float) -> float:
    """Return the runs' floating-point operations divided by wall time and the measured peak.

    The study's formula counts the operations, with the unembedding at every token.
    """
    return sum(run_flops(p.spec) for p in points) / wall_s / peak


def whole_sweep(values: dict[str, Any], peak: float, log: Log) -> Figures:
    """Run the whole tiny lr_ratio sweep with its command, including process start."""
    with tempfile.TemporaryDirectory() as folder:
        answer, points = run_answer("tiny", Path(folder))
        _check_done(points, RunStore(Path(folder) / "runs"))
        found = compare(points, answer["wall_s"], values, folder, 2)
    found["flops_over_gemm_peak"] = flops_over_peak(points, answer["wall_s"], peak)
    log(
        f"tiny sweep, {len(points)} runs: {answer['wall_s']:.0f} s; one process per run "
        f"{found['process_per_run_s']:.0f} s, warm PEFT loop {found['warm_peft_s']:.0f} s; "
        f"{found['flops_over_gemm_peak']:.2f} of the matrix-multiply peak"
    )
    return found


def lora_grid(
    scale: str,
    batch_size: int,
    steps: int,
    values: dict[str, Any],
    start_s: float,
    peak: float,
    log: Log,
) -> Figures:
    """Plan and train 16 LoRA runs of one rank from an empty store.

    `start_s`, the start time of a command, is added, because this function starts no command.
    """
    overrides = [*LORA_GRID, *at(scale), f"batch_size={batch_size}", f"steps={steps}"]
    with tempfile.TemporaryDirectory() as folder:
        exec_ = Exec(**{**values, "runs_dir": f"{folder}/runs"})
        points = compose_request(overrides).points
        if scale != "tiny":
            few = dataclasses.replace(points[0].spec.dataset, n_test=32, n_test_curve=4)
            points = [Point(p.arm, dataclasses.replace(p.spec, dataset=few)) for p in points]
        store = RunStore(exec_.runs_dir)
        store.prepare()
        started = time.perf_counter()
        packs = make_plan(points, store, exec_, detect.this_machine()).packs
        run_points(points, store, exec_, lambda event: None)
        whole_s = time.perf_counter() - started + start_s
        _check_done(points, store)
        found = compare(points, whole_s, values, folder, 2)
    found |= {
        "scale": scale,
        "model": points[0].spec.model.name,
        "batch_size": batch_size,
        "steps": steps,
        "pack": max(len(p.points) for p in packs),
        "flops_over_gemm_peak": flops_over_peak(points, whole_s, peak),
    }
    log(
        f"16 LoRA runs at {scale}, batch {batch_size}: {whole_s:.0f} s, packs of {found['pack']}; "
        f"{found['vs_process_per_run']:.1f} times faster than one process per run, "
        f"{found['vs_warm_peft']:.2f} times faster than a warm PEFT loop; "
        f"{found['flops_over_gemm_peak']:.2f} of the matrix-multiply peak"
    )
    return found


# ---------------------------------------------------------------- from nothing to an answer


def time_answer(scale: str, values: dict[str, Any], log: Log) -> Figures:
    """Time an answer and a sample of TRL processes; compare the answer with both plain grids."""
    with tempfile.TemporaryDirectory() as folder:
        found, points = run_answer(scale, Path(folder))
        log(f"an answer from {found['runs']} runs in {found['wall_s']:.0f} s")
        curves: list[Figures] = []
        for arm in by_arm(points):
            timed = [baseline("trl", [point], values, 1, folder) for point in arm[:SAMPLES]]
            means = {k: sum(t[k] for t in timed) / len(timed) for k in timed[0]}
            rank = getattr(arm[0].spec.method, "rank", None)
            curves.append({"arm": arm[0].arm, "rank": rank, "sampled": len(timed), **means})
    found |= versus(found["wall_s"], curves)
    log(
        f"{found['vs_plain_grid']:.1f} times faster than a plain grid of {PLAIN_RUNS} runs a "
        f"curve, {found['vs_same_interval']:.1f} times than one of {SAME_INTERVAL_RUNS} ({SAMPLES} "
        "TRL processes of each curve timed, and multiplied up)"
    )
    return found


def run_answer(scale: str, home: Path) -> tuple[Figures, list[Point]]:
    """Run `lr_ratio` from an empty store; return the time, the ratio and the runs."""
    asked = ["+sweep=lr_ratio", f"scale={scale}"]
    wall_s, found = command(*asked, f"exec.reports_dir={home / 'reports'}", runs_dir=home / "runs")
    store = RunStore(home / "runs")
    points = all_points(compose_request([*asked, f"exec.runs_dir={home / 'runs'}"]), store)
    states = Counter(store.state(p.id) for p in points)
    if set(states) - {"done", "diverged"}:
        raise RuntimeError(f"runs that did not end: {dict(states)}")
    (ratio,) = (r["ratio"] for r in found["ratios"] if r["rank"] is None)
    counts = {"runs": len(points), "diverged": states["diverged"]}
    ends = {k: ratio[k] for k in ("value", "low", "high")}
    return {"scale": scale, "wall_s": wall_s, **counts, **ends}, points


def versus(wall_s: float, curves: Sequence[Figures]) -> Figures:
    """Compare `wall_s` of an answer with both plain grids, run one process after another.

    Args:
        curves: for each curve, start_s and run_s of one process.
    """
    seconds = [c["start_s"] + c["run_s"] for c in curves]
    plain_s, same_s = (runs * sum(seconds) for runs in (PLAIN_RUNS, SAME_INTERVAL_RUNS))
    return {
        "processes": list(curves),
        "plain_runs": PLAIN_RUNS,
        "plain_grid_s": plain_s,
        "vs_plain_grid": plain_s / wall_s,
        "same_interval_runs": SAME_INTERVAL_RUNS,
        "same_interval_s": same_s,
        "vs_same_interval": same_s / wall_s,
    }

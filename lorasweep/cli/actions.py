"""The actions of the command line that run and watch sweeps; those on finished runs are in
`upkeep`.

Ties plan, local execution and analysis together; knows no torch (the workers do).
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorasweep.cli import answer, status
from lorasweep.cli import finished_runs as upkeep
from lorasweep.cli import study as several
from lorasweep.cli.progress import Display, duration
from lorasweep.config import preflight as checks
from lorasweep.errors import GaveUp, SpecError
from lorasweep.launch import local
from lorasweep.launch.measure_packs import measure_packs
from lorasweep.launch.slurm import cancel
from lorasweep.launch.slurm import submit as batch
from lorasweep.launch.worker import Stopped, Trainer
from lorasweep.plan import detect
from lorasweep.plan.estimate import Plan, make_plan, summary
from lorasweep.plan.hardware import Hardware, from_plain
from lorasweep.plan.packing import forward_tokens
from lorasweep.plan.throughput import shape_of
from lorasweep.store.run_store import FINAL, RunStore
from lorasweep.sweep import looks as rounds
from lorasweep.sweep.grid import Point, curve_key, second_stage
from lorasweep.sweep.names import run_names
from lorasweep.sweep.request import Request, question

POWER_RUNS = 2000
"""Runs above which action=plan leaves out the seeds needed: loading the analysis takes a second,
planning less."""


def act(
    request: Request, trainer: Trainer | str | None = None, follow: dict[str, Any] | None = None
) -> int:
    """Do what was asked; return the exit status. `trainer` replaces the real one in tests and
    benchmarks.

    `follow`: what the job that follows others knows of the round before (a cluster's jobs only).
    """
    store = RunStore(request.exec.runs_dir)
    if request.action == "export":
        return upkeep.export(request, store, all_points(request, store) if request.sweep else [])
    if request.action == "import":
        return upkeep.import_(request)
    if request.action == "adapter":
        return upkeep.adapter(request, store)
    if request.parts:
        return several.each(request, lambda part: act(part, trainer))
    if request.action == "verify":
        return upkeep.verify(request, store, all_points(request, store))
    if request.action == "plan":
        return _plan(request, store)
    if request.action == "extend":
        return upkeep.extend(request, store, all_points(request, store), question(request))
    if request.action == "status":
        return _status(request, store)
    if request.action == "measure_packs":
        return _measure_packs(request, store)
    if request.action == "cancel":
        return _cancel(request, store)
    store.prepare()
    checks.check_available(request)
    answer.check_claims(request.sweep)
    if request.action == "qualify" and (request.sweep is None or request.cluster.kind == "slurm"):
        raise SpecError(
            "action=qualify judges the tasks of a sweep (+sweep=NAME), on this machine (cluster=local)."
        )
    if request.cluster.kind == "slurm":
        return _run_on_cluster(request, store, trainer, follow)
    return _run(request, store, trainer)


def _chosen(request: Request, store: RunStore) -> list[Point]:
    """Return the runs that are wanted now: all of the sweep's, or those that tell whether its tasks
    are fit."""
    points = all_points(request, store)
    return several.qualifying(points) if request.action == "qualify" else points


def all_points(request: Request, store: RunStore) -> list[Point]:
    """Return the sweep's runs: the first stage, for curves whose first is over the second, and
    further rounds."""
    if request.parts:
        return list({p.id: p for part in request.parts for p in all_points(part, store)}.values())
    points = _two_stages(request, store)
    if request.sweep is None:
        return points
    return points + rounds.points(rounds.read(rounds.file_of(request)), points)


def _two_stages(request: Request, store: RunStore) -> list[Point]:
    points = list(request.points)
    second = request.sweep.second if request.sweep else None
    if second is None or not second.seeds:
        return points
    results = {p.id: store.result(p.id) for p in points}
    by_curve: dict[tuple[str, str], list[Point]] = {}
    for p in points:
        by_curve.setdefault(curve_key(p), []).append(p)
    over = [p for curve in by_curve.values() if all(results[q.id] for q in curve) for p in curve]

    def nll(rid: str) -> float | None:
        result = results[rid] or {}
        return result.get("test_nll") if result.get("state") == "done" else None

    return points + second_stage(over, second, nll)


# ---------------------------------------------------------------- run


def _run(request: Request, store: RunStore, trainer: Trainer | str | None) -> int:
    quiet = request.format == "json"
    hardware, started = detect.this_machine(), False
    try:
        while True:
            points = _chosen(request, store)
            now = make_plan(points, store, request.exec, hardware)
            if not now.todo:
                break
            if not quiet:
                print(_plan_text(request, now), file=sys.stderr)
                if not started:
                    for line in answer.seeds_needed(request.points, request.sweep):
                        print(line, file=sys.stderr)
            started = True
            with Display(now.todo, quiet) as display:
                local.run_points(points, store, request.exec, display.event, trainer)
            if len(_chosen(request, store)) == len(points):
                break
    except (Stopped, KeyboardInterrupt):
        print(
            "stopped; finished runs are kept, the others continue from their checkpoints when you ask again",
            file=sys.stderr,
        )
        return 130
    if request.action == "qualify":
        return several.tell(request, store, points)
    return _end(request, store, points)


def _say(request: Request) -> Callable[[str], None]:
    """Return what tells the user how things go: on stderr, and not to programs."""
    return lambda text: (
        None if request.format == "json" else print(text, file=sys.stderr, flush=True)
    )


def _end(request: Request, store: RunStore, points: list[Point]) -> int:
    """Say what went wrong, mirror, and answer: when nothing is left to do."""
    names, states = run_names(points), store.states(p.id for p in points)
    failed = [p.id for p in points if states[p.id] == "failed"]
    for i in failed:
        print(
            f"run {i} ({names[i]}) failed: {store.failure(i)}. Log: {store.folder(i)}/attempts/{store.last_attempt(i)}"
            "/log.txt. Try again: exec.retry=true",
            file=sys.stderr,
        )
    killed = [p.id for p in points if states[p.id] == "stale"]
    for i in killed:
        print(
            f"run {i} ({names[i]}) did not end: its process was killed {store.failures(i)} times (out of memory?). Try "
            "fewer workers or a smaller exec.micro_batch_size, and a larger exec.max_attempts.",
            file=sys.stderr,
        )
    if request.mirror == "wandb":
        from lorasweep.tracking.wandb import mirror

        mirror(points, store, request.sweep_name or "single")
    if request.sweep is None:
        _show_single(request, store, points[0])
    else:
        _answer(request, store, points)
    return 1 if failed or killed else 0


# ---------------------------------------------------------------- a cluster


def _run_on_cluster(
    request: Request, store: RunStore, trainer: Trainer | str | None, follow: dict[str, Any] | None
) -> int:
    """Submit what is missing and return; with nothing left to do, answer."""
    idle, points = 0, all_points(request, store)
    if follow is not None:
        over = sum(s in FINAL for s in store.states(p.id for p in points).values())
        idle = follow["idle"] + 1 if over <= follow["finished"] else 0
        if idle >= batch.IDLE:
            raise GaveUp(
                f"no run finished in {idle} rounds of jobs, so no more are submitted. See action=status."
            )
    name = trainer if isinstance(trainer, str) else None
    done = batch.submit(
        request, store, lambda: all_points(request, store), _say(request), idle, name
    )
    gone = sum(map(len, done.removed.values()))
    if request.format == "json" and (done.waiting or done.n_submitted):
        told = {
            "submitted": done.n_submitted,
            "queued": done.queued,
            "running": done.running,
            "removed": gone,
            "pruned": done.pruned,
            "refused": done.refused,
            "untold": done.untold,
            "exhausted": len(done.exhausted),
            "scripts": [str(p) for p in done.scripts],
            "jobs": [a.job for s in done.submitted for a in s.arrays if a.job],
        }
        print(json.dumps(told))
        return 0
    for s in done.submitted:
        at = ", ".join(f"{a.n} job(s) as {a.job}" for a in s.arrays if a.job and a.part != "follow")
        print(f"submitted {done.n_submitted} runs: {at}; records and logs in {s.folder}")
    for script in done.scripts:
        print(f"submit it yourself: sbatch {script}")
    if done.refused:
        print(f"Slurm did not take all: {done.refused}", file=sys.stderr)
        print("The rest follows when jobs are over, or when you ask again", file=sys.stderr)
    if done.untold:
        print(
            f"{done.untold} runs may be with jobs of another cluster, or of another user whose jobs Slurm hides from you: "
            f"ask there. If those jobs are gone, remove their folders in {store.root}/.slurm",
            file=sys.stderr,
        )
    if done.exhausted:
        print(
            f"{len(done.exhausted)} runs were killed {request.exec.max_attempts} times and are not submitted again: see "
            "their causes by action=status, then raise exec.max_attempts",
            file=sys.stderr,
        )
    if done.pruned:
        print(f"cancelled {done.pruned} queued run(s) that are no longer part of the sweep")
    elif gone:
        print(f"{gone} queued run(s) are no longer part of the sweep; cancel them with prune=true")
    if done.waiting:
        print(
            f"{done.queued} runs queued, {done.running} running. See action=status; the same command answers when they "
            "are over."
        )
        return 0
    return _end(request, store, all_points(request, store))


def _cancel(request: Request, store: RunStore) -> int:
    """Cancel the sweep's jobs on the cluster; local runs are stopped where they run, by Ctrl-C."""
    n_jobs, n_runs = cancel.cancel(request, store, _say(request))
    if request.format == "json":
        print(json.dumps({"jobs": n_jobs, "runs": n_runs}))
    else:
        print(
            f"cancelled {n_jobs} job(s) with {n_runs} unfinished run(s); finished runs are kept, the others go on from their "
            "checkpoints when you ask for the sweep again"
            if n_jobs
            else "nothing to cancel"
        )
    return 0


def _answer(request: Request, store: RunStore, points: list[Point]) -> None:
    """Judge the finished runs, print the answer and write the report."""
    from lorasweep.store.run_store import load_runs

    finished = [p.id for p in points if store.result(p.id)]
    if not finished:
        print("no run has finished, so there is no answer yet", file=sys.stderr)
        return
    folder = Path(request.exec.reports_dir) / f"{request.sweep_name}-{request.scale}"
    table = load_runs(store.root, finished)
    asked = question(request)
    print(answer.judge(table, asked, folder, as_json=request.format == "json"))
    rounds.note_look(rounds.file_of(request), answer.claims_hash(asked), request.sweep.rounds)


def _show_single(request: Request, store: RunStore, point: Point) -> None:
    result = store.result(point.id)
    if result is None:
        return
    if request.format == "json":
        print(json.dumps({k: v for k, v in result.items() if k != "curve"}))
        return
    nll = result.get("test_nll")
    shown = "" if nll is None else f", test NLL {nll:.4f} (from {result['nll_start']:.4f})"
    name = run_names([point])[point.id]
    print(f"run {point.id} ({name}): {result['state']}{shown}. Folder: {store.folder(point.id)}")


# ---------------------------------------------------------------- plan and status


def hardware_of(request: Request) -> Hardware:
    """Return the hardware that is planned for: what was chosen, else this machine."""
    return from_plain(request.hardware) if request.hardware else detect.this_machine()


def _measure_packs(request: Request, store: RunStore) -> int:
    """Measure the shapes of runs that are missing, on this machine, and show the plan."""
    if request.cluster.kind == "slurm":
        raise SpecError(
            "action=measure_packs measures the machine it runs on. On a cluster, give the command "
            "with cluster=local inside a job: srun python -m lorasweep ... action=measure_packs"
        )
    store.prepare()
    checks.check_available(request)
    points = all_points(request, store)
    states = store.states(p.id for p in points)
    missing = [p.spec for p in points if states[p.id] == "missing"]
    if missing:
        measure_packs(missing, store, request.exec, detect.this_machine(), _say(request))
    return _plan(request, store)


def _plan(request: Request, store: RunStore) -> int:
    now = make_plan(all_points(request, store), store, request.exec, hardware_of(request))
    difference = batch.difference(request, store, now)
    if request.format == "json":
        print(
            json.dumps(
                {
                    "sweep": request.sweep_name,
                    "scale": request.scale,
                    **summary(now),
                    **difference,
                }
            )
        )
    else:
        print(_plan_text(request, now))
        for line in batch.difference_lines(difference):
            print(line)
        if len(now.points) <= POWER_RUNS:
            for line in answer.seeds_needed(request.points, request.sweep):
                print(line)
    return 0


def _plan_text(request: Request, now: Plan) -> str:
    told = summary(now)
    runs, cost = told["runs"], told["cost"]
    head = (
        f"sweep {request.sweep_name}, scale {request.scale}" if request.sweep_name else "single run"
    )
    if now.hardware.name != detect.NAME:
        head += f", on {now.hardware.name}"
    states = ", ".join(f"{n} {s}" for s, n in now.counts().items())
    how = {
        "measured": "by the runs that are done",
        "calibrated": "by the times of steps",
        "assumed": "by an assumed speed",
    }
    lines = [
        f"{head}: {runs['total']} runs ({states}); {runs['todo']} to do in {cost['packs']} packs on "
        f"{cost['workers']} worker(s) x {cost['threads']} thread(s), about {duration(cost['hours'] * 3600)} "
        f"({how[cost['basis']]}), {cost['flops']:.2g} FLOPs, memory up to {cost['memory_gib']:.1f} GiB, checkpoints up "
        f"to {cost['checkpoint_gib']:.1f} GiB"
    ]
    for a in told["arms"]:
        rank = f" rank {a['rank']}" if a["rank"] else ""
        lines.append(
            f"  {a['arm']}{rank} on {a['model']}: {a['runs']} runs, {a['n_trainable']:,} trained parameters"
        )
    lines += _pack_lines(request, now)
    if now.todo and request.cluster.name == "local" and _bf16_is_slow(now):
        lines.append(
            "  this processor has no bf16 instructions: an update takes some 50 times as long as in fp32; add "
            "precision=fp32 (another run id), or use a processor or a GPU that has them"
        )
    if request.sweep and request.sweep.second.seeds:
        s = request.sweep.second
        of = f" of {', '.join(s.arms)}" if s.arms else ""
        lines.append(
            f"  second stage{of}, when a curve's first is over: seeds {s.seeds} at its {s.n_lrs} best rates"
        )
    return "\n".join(lines)


def _bf16_is_slow(now: Plan) -> bool:
    """Return whether these runs ask for bf16 of hardware that is known to have none."""
    precision = now.points[0].spec.precision if now.points else None
    return precision == "bf16" and now.hardware.fast_bf16 is False


def _pack_lines(request: Request, now: Plan) -> list[str]:
    """Say how runs are packed, and why: what was measured for each shape."""
    lines = []
    shapes = {shape_of(pack.points[-1].spec): pack for pack in now.packs}
    for pack in shapes.values():
        spec, n = pack.points[-1].spec, len(pack.points)
        if spec.method.MAX_PACK is not None:
            continue
        rank = f" rank {spec.method.rank}" if hasattr(spec.method, "rank") else ""
        head = f"  packs of {spec.method.name}{rank} on {spec.model.name}: {n} run(s)"
        speed = now.throughputs.of(spec)
        if request.exec.pack_size is not None:
            why = "exec.pack_size"
        elif speed is None:
            tokens = forward_tokens(now.hardware)
            why = f"as many as {tokens} tokens a forward allow; not measured here"
        else:
            times = ", ".join(
                f"{s * 1e3:.3g} ms in {size}" for size, s in sorted(speed.step_s.items())
            )
            pays = ": packing does not pay" if speed.measured and speed.best_size() == 1 else ""
            how = "measured" if speed.measured else "recorded"
            why = f"{how} a step and run: {times}{pays}"
        lines.append(f"{head}, {pack.micro_batch_size} rows of each a forward ({why})")
    return list(dict.fromkeys(lines))  # shapes that differ in their data only say the same


def _status(request: Request, store: RunStore) -> int:
    def look() -> dict[str, Any]:
        return status.status(request, store, all_points(request, store))

    if request.watch:
        status.watch(request, look)
    else:
        status.show(request, look())
    return 0

"""The actions of the command line that run and watch sweeps; those on finished runs are in `upkeep`.

Ties plan, local execution and analysis together; knows no torch (the workers do).
"""

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from lorasweep import calibrate, local, plan, rounds, upkeep
from lorasweep.compose import Request
from lorasweep.cost import run_flops
from lorasweep.errors import SpecError, StoreError, unknown
from lorasweep.execute import Stopped, Trainer
from lorasweep.grid import Point, curve_key, second_stage
from lorasweep.progress import Display, duration, run_name
from lorasweep.store import RunStore

POWER_RUNS = 2000
"""Runs above which action=plan leaves out the seeds needed: loading the analysis takes a second, planning less."""


def act(request: Request, trainer: Trainer | None = None) -> int:
    """Do what was asked; return the exit status. `trainer` replaces the real one in tests."""
    store = RunStore(request.exec.runs_dir)
    if request.action == "export":
        return upkeep.export(request, store, all_points(request, store) if request.sweep else [])
    if request.action == "import":
        return upkeep.import_(request)
    if request.action == "adapter":
        return upkeep.adapter(request, store)
    if request.action == "verify":
        return upkeep.verify(request, store, all_points(request, store))
    if request.action == "plan":
        return _plan(request, store)
    if request.action == "extend":
        return upkeep.extend(request, store, all_points(request, store), question(request))
    if request.action == "status":
        return _status(request, store)
    return _run(request, store, trainer)


def all_points(request: Request, store: RunStore) -> list[Point]:
    """Return the sweep's runs: the first stage, for curves whose first is over the second, and further rounds."""
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


def check_available(request: Request) -> None:
    """Raise an error that says how to get them if weights or data of any point are not on this machine."""
    from lorasweep import data, models

    seen: set[str] = set()
    for p in request.points:
        for spec, check, dirs in (
            (p.spec.model, models.check_available, request.exec.models_dir),
            (p.spec.dataset, data.check_available, request.exec.data_dir),
        ):
            if spec.name not in seen:
                seen.add(spec.name)
                check(spec, dirs)
        vocab = data.generator_vocab(p.spec.dataset)
        if vocab is not None and vocab > p.spec.model.vocab_size:
            raise SpecError(
                f"dataset {p.spec.dataset.name!r} has {vocab} symbols, model {p.spec.model.name!r} only "
                f"{p.spec.model.vocab_size}. Choose a model made for it (conf/model)."
            )


def check_claims(request: Request) -> None:
    """Raise SpecError if the sweep claims what its analysis does not measure: before runs, not after them."""
    if request.sweep is None:
        return
    try:
        judged = importlib.import_module(f"analysis.{request.sweep.analysis or '?'}")
        known = judged.ESTIMANDS
    except (ImportError, AttributeError):
        raise SpecError(f"analysis={request.sweep.analysis!r} is no analysis. Available: lr_ratio.") from None
    for name, claim in request.sweep.claims.items():
        if claim.estimand not in known:
            raise SpecError(f"claim {name!r}: " + unknown("estimand", claim.estimand, known))
        if claim.estimand in judged.LOG_ESTIMANDS and not claim.margin[0] > 0:
            raise SpecError(f"claim {name!r}: margin={claim.margin}, but {claim.estimand} is a ratio. Start it above 0.")


# ---------------------------------------------------------------- run


def _run(request: Request, store: RunStore, trainer: Trainer | None) -> int:
    store.prepare()
    check_available(request)
    check_claims(request)
    quiet = request.format == "json"
    started = False
    try:
        while True:
            points = all_points(request, store)
            if trainer is None:
                _calibrate(request, store, points)
            now = plan.make_plan(points, store, request.exec)
            if not now.todo:
                break
            if not quiet:
                print(_plan_text(request, now), file=sys.stderr)
                if not started:
                    for line in plan.power(request.points, request.sweep):
                        print(line, file=sys.stderr)
            started = True
            with Display(now.todo, quiet) as display:
                local.run_points(points, store, request.exec, display.event, trainer)
            if len(all_points(request, store)) == len(points):
                break
    except (Stopped, KeyboardInterrupt):
        print("stopped; finished runs are kept, the others continue from their checkpoints when you ask again",
              file=sys.stderr)  # fmt: skip
        return 130
    failed = [p for p in points if store.state(p.id) == "failed"]
    for p in failed:
        print(f"run {p.id} ({run_name(p)}) failed: {store.failure(p.id)}. Log: {store.folder(p.id)}/attempts/"
              f"{store.last_attempt(p.id)}/log.txt. Try again: exec.retry=true", file=sys.stderr)  # fmt: skip
    killed = [p for p in points if store.state(p.id) == "stale"]
    for p in killed:
        print(f"run {p.id} ({run_name(p)}) did not end: its process was killed {store.failures(p.id)} times (out of "
              "memory?). Try fewer workers or a smaller exec.micro_batch_size, then ask again.",
              file=sys.stderr)  # fmt: skip
    if request.mirror == "wandb":
        from lorasweep.mirror import mirror

        mirror(points, store, request.sweep_name or "single")
    if request.sweep is None:
        _show_single(request, store, points[0])
    else:
        _answer(request, store, points)
    return 1 if failed or killed else 0


def _calibrate(request: Request, store: RunStore, points: list[Point]) -> None:
    shapes = plan.to_calibrate(points, store.states(p.id for p in points), request.exec)
    shapes = [s for s in shapes if calibrate.known(s, request.exec) is None]
    if not shapes:
        return
    if request.format != "json":
        print(f"measuring {len(shapes)} shape(s) of run on this machine, once: at most about "
              f"{duration(len(shapes) * calibrate.BUDGET_S)}", file=sys.stderr)  # fmt: skip
    trouble = calibrate.ensure(shapes, request.exec)
    if trouble:
        print(f"the measurement failed ({trouble}); packs are planned by default sizes", file=sys.stderr)


def _answer(request: Request, store: RunStore, points: list[Point]) -> None:
    """Judge the finished runs, print the answer and write the report."""
    from analysis.report import judge_and_report, question_hash
    from analysis.table import TableError
    from lorasweep.store import load_runs

    finished = [p.id for p in points if store.result(p.id)]
    if not finished:
        print("no run has finished, so there is no answer yet", file=sys.stderr)
        return
    folder = Path(request.exec.reports_dir) / f"{request.sweep_name}-{request.scale}"
    table = load_runs(store.root, finished)
    try:
        print(judge_and_report(table, question(request), folder, as_json=request.format == "json"))
        rounds.note_look(rounds.file_of(request), question_hash(question(request)), request.sweep.rounds)
    except TableError as error:
        raise StoreError(f"the runs are finished and kept, but cannot be judged together: {error}") from None


def question(request: Request) -> dict[str, Any]:
    """Return what the analysis must know of the sweep: plain values, kept beside the report."""
    sweep = dataclasses.asdict(request.sweep)
    return {"name": request.sweep_name, "scale": request.scale, "question": sweep["question"],
            "source": sweep["source"], "claims": sweep["claims"], "rounds": sweep["rounds"],
            "analysis": sweep["analysis"]}  # fmt: skip


def _show_single(request: Request, store: RunStore, point: Point) -> None:
    result = store.result(point.id)
    if result is None:
        return
    if request.format == "json":
        print(json.dumps({k: v for k, v in result.items() if k != "curve"}))
        return
    nll = result.get("test_nll")
    shown = "" if nll is None else f", test NLL {nll:.4f} (from {result['nll_start']:.4f})"
    print(f"run {point.id} ({run_name(point)}): {result['state']}{shown}. Folder: {store.folder(point.id)}")


# ---------------------------------------------------------------- plan and status


def _plan(request: Request, store: RunStore) -> int:
    now = plan.make_plan(all_points(request, store), store, request.exec)
    if request.format == "json":
        print(json.dumps({"sweep": request.sweep_name, "scale": request.scale, **plan.summary(now)}))
    else:
        print(_plan_text(request, now))
        if len(now.points) <= POWER_RUNS:
            for line in plan.power(request.points, request.sweep):
                print(line)
    return 0


def _plan_text(request: Request, now: plan.Plan) -> str:
    told = plan.summary(now)
    runs, cost = told["runs"], told["cost"]
    head = f"sweep {request.sweep_name}, scale {request.scale}" if request.sweep_name else "single run"
    states = ", ".join(f"{n} {s}" for s, n in now.counts().items())
    how = {"measured": "by the runs that are done", "calibrated": "by a calibration", "assumed": "by an assumed speed"}
    lines = [
        f"{head}: {runs['total']} runs ({states}); {runs['todo']} to do in {cost['packs']} packs on "
        f"{cost['workers']} worker(s) x {cost['threads']} thread(s), about {duration(cost['hours'] * 3600)} "
        f"({how[cost['basis']]}), {cost['flops']:.2g} FLOPs, memory up to {cost['memory_gib']:.1f} GiB, checkpoints up "
        f"to {cost['checkpoint_gib']:.1f} GiB"
    ]
    for a in told["arms"]:
        rank = f" rank {a['rank']}" if a["rank"] else ""
        lines.append(f"  {a['arm']}{rank} on {a['model']}: {a['runs']} runs, {a['n_trainable']:,} trained parameters")
    lines += _pack_lines(request, now)
    if request.sweep and request.sweep.second.seeds:
        s = request.sweep.second
        lines.append(f"  second stage, when a curve's first is over: seeds {s.seeds} at its {s.n_lrs} best rates")
    return "\n".join(lines)


def _pack_lines(request: Request, now: plan.Plan) -> list[str]:
    """Say how runs are packed, and why: what was measured for each shape."""
    lines = []
    shapes = {calibrate.kind(pack.points[-1].spec, request.exec): pack for pack in now.packs}
    for pack in shapes.values():
        spec, n = pack.points[-1].spec, len(pack.points)
        if spec.method.MAX_PACK is not None:
            continue
        rank = f" rank {spec.method.rank}" if hasattr(spec.method, "rank") else ""
        head = f"  packs of {spec.method.name}{rank} on {spec.model.name}: {n} run(s)"
        speed = calibrate.known(spec, request.exec)
        if request.exec.pack_size is not None:
            why = "exec.pack_size"
        elif speed is None:
            why = f"as many as {calibrate.FORWARD_TOKENS} tokens a forward allow; not measured here"
        else:
            times = ", ".join(f"{s * 1e3:.3g} ms in {size}" for size, s in sorted(speed.step_s.items()))
            pays = "" if speed.best_size() > 1 else ": packing does not pay"
            why = f"measured a step and run: {times}{pays}"
        lines.append(f"{head}, {pack.micro_batch_size} rows of each a forward ({why})")
    return lines


def _status(request: Request, store: RunStore) -> int:
    now = plan.make_plan(all_points(request, store), store, request.exec)
    running = [p for p in now.points if now.states[p.id] in ("running", "stale")]
    steps = {p.id: (store.records(p.id) or [{"step": 0}])[-1]["step"] for p in running}
    left = now.hours * 3600
    if now.flops:
        begun = sum(run_flops(p.spec) * steps[p.id] / p.spec.steps for p in running)
        left *= max(0.0, 1 - begun / now.flops)
    problems = [{"run": p.id, "name": run_name(p), "state": now.states[p.id], "cause": store.failure(p.id)}
                for p in now.points if now.states[p.id] in ("failed", "diverged")]  # fmt: skip
    if request.format == "json":
        told = plan.summary(now)
        at = [{"run": i, "step": s} for i, s in steps.items()]
        print(json.dumps({"sweep": request.sweep_name, "scale": request.scale, "runs": told["runs"], "left_s": left,
                          "running": at, "problems": problems}))  # fmt: skip
        return 0
    counts = ", ".join(f"{n} {s}" for s, n in now.counts().items())
    print(f"{request.sweep_name or 'single run'} at scale {request.scale}: {counts}; about {duration(left)} left")
    for p in running:
        print(f"  {now.states[p.id]:8} {run_name(p):32} {p.id}  step {steps[p.id]}/{p.spec.steps}")
    for x in problems:
        print(f"  {x['state']:8} {x['name']:32} {x['run']}  {x['cause']}")
    return 0

"""A sweep of sweeps: its parts asked in turn, runs that several share trained once; and whether a
sweep's tasks are fit.

Knows requests and the analysis; refuses to know how runs are trained.
"""

import json
from collections.abc import Callable
from pathlib import Path

from lorasweep.cli import answer
from lorasweep.config import preflight as checks
from lorasweep.store.files import write_atomic
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import Request

STOPPED = 130


def each(request: Request, act: Callable[[Request], int]) -> int:
    """Do what was asked for every part. All is checked before the first one starts. format=json
    prints one object a part."""
    if request.action == "run":
        for part in request.parts:
            checks.check_available(part)
            answer.check_claims(part.sweep)
    code = 0
    for part in request.parts:
        if request.format != "json":
            print(f"== {part.sweep_name}", flush=True)
        code = max(code, act(part))
        if code >= STOPPED:
            return code
    if request.action == "run" and request.cluster.kind == "local" and request.format != "json":
        reports = Path(request.exec.reports_dir)
        print("\n".join(answer.study(reports, request.scale, request.title)))
    return code


# ---------------------------------------------------------------- are the tasks fit?


def qualifying(points: list[Point]) -> list[Point]:
    """Choose the runs that tell whether a task is fit: of each model, data set, batch and length,
    full fine-tuning of everything and LoRA with most parameters."""
    groups: dict[tuple[str, str, int, int], dict[str, list[Point]]] = {}
    for p in points:
        s = p.spec
        if (
            s.schedule != "constant"
            or s.precision == "fp64"
            or getattr(s.method, "scope", "all") != "all"
        ):
            continue
        arms = groups.setdefault((s.model.name, s.dataset.name, s.batch_size, s.steps), {})
        arms.setdefault(s.method.name, []).append(p)
    chosen = []
    for arms in groups.values():
        chosen += arms.get("fullft", [])
        lora = arms.get("lora", [])
        most = max((p.spec.method.n_trainable(p.spec.model) for p in lora), default=0)
        best = next(
            (p.spec.method for p in lora if p.spec.method.n_trainable(p.spec.model) == most), None
        )
        chosen += [p for p in lora if p.spec.method == best]
    return chosen


def tell(request: Request, store: RunStore, points: list[Point]) -> int:
    """Print whether the tasks of finished runs qualify, and keep it beside the reports. 0: all do;
    1: some do not."""
    from lorasweep.store.run_store import load_runs

    found = answer.qualify(load_runs(store.root, [p.id for p in points if store.result(p.id)]))
    told = {
        "sweep": request.sweep_name,
        "scale": request.scale,
        "qualified": found.verdict,
        "checks": found.checks,
    }
    path = Path(request.exec.reports_dir) / f"qualify-{request.title}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(told, indent=1) + "\n").encode())
    if request.format == "json":
        print(json.dumps(told))
    else:
        print("\n".join(found.lines))
        for group, ok in found.verdict.items():
            print(f"{group}: {'qualifies' if ok else 'DOES NOT QUALIFY'}")
        print(f"kept: {path}")
    return 0 if all(found.verdict.values()) else 1

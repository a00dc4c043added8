"""Run a sweep that consists of sweeps, part by part; and judge whether tasks qualify.

Knows requests and the analysis; refuses to know how runs are trained.
"""

import json
from collections.abc import Callable
from pathlib import Path

from lorasweep.cli import answer
from lorasweep.store import files
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import Request

FIRST_SIGNAL_STATUS = 130
"""Exit statuses from here on mean that the user stopped the command."""


def each(request: Request, act: Callable[[Request], int], check: Callable[[Request], None]) -> int:
    """Run the requested action for every part.

    action=run: `check` raises what is wrong with a part, for all parts before the first starts.
    format=json prints one object per part.
    """
    if request.action == "run":
        for part in request.parts:
            check(part)
    code = 0
    for part in request.parts:
        if request.format != "json":
            print(f"== {part.sweep_name}", flush=True)
        code = max(code, act(part))
        if code >= FIRST_SIGNAL_STATUS:
            return code
    if request.action == "run" and request.cluster.kind == "local" and request.format != "json":
        reports = Path(request.exec.reports_dir)
        titles = [part.title for part in request.parts]
        print("\n".join(answer.study(reports, titles, request.title)))
    return code


def qualify(request: Request, store: RunStore, points: list[Point]) -> int:
    """Print whether the tasks of finished runs qualify, and save that with the reports.

    Returns 0 if all do, 1 if some do not.
    """
    from lorasweep.store.table import load_runs

    found = answer.qualify(load_runs(store.root, [p.id for p in points if store.result(p.id)]))
    content = {
        "sweep": request.sweep_name,
        "scale": request.scale,
        "qualified": found.verdict,
        "checks": found.checks,
    }
    path = Path(request.exec.reports_dir) / f"qualify-{request.title}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())
    if request.format == "json":
        print(json.dumps(content))
    else:
        print("\n".join(found.lines))
        for group, ok in found.verdict.items():
            print(f"{group}: {'qualifies' if ok else 'DOES NOT QUALIFY'}")
        print(f"saved: {path}")
    return 0 if all(found.verdict.values()) else 1

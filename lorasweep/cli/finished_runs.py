"""The actions on finished runs: export, import, adapter, verify, extend."""

import json
from pathlib import Path
from typing import Any

from lorasweep.cli import answer
from lorasweep.errors import SpecError
from lorasweep.store.run_store import FINAL, RunStore
from lorasweep.sweep import looks as rounds
from lorasweep.sweep.grid import Point
from lorasweep.sweep.names import run_names
from lorasweep.sweep.request import Request


def export(request: Request, store: RunStore, points: list[Point]) -> int:
    """Write the finished runs as a table: those of the sweep, or without one all that the store
    holds."""
    from lorasweep.store.run_store import load_runs

    path = Path(request.table)
    if path.suffix not in (".parquet", ".csv"):
        raise SpecError(f"table={request.table!r}: name a file that ends in .parquet or .csv.")
    ids = [p.id for p in points] if request.sweep else None
    table = load_runs(store.root, ids)
    if table.empty:
        raise SpecError(
            f"no finished runs in {store.root}. Run the sweep first, or set exec.runs_dir."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        table.to_csv(path, index=False)
    print(f"{len(table)} runs written to {path}")
    return 0


def import_(request: Request) -> int:
    """Put an exported table's runs into the store."""
    from lorasweep.store.run_store import import_table

    print(
        f"{import_table(request.exec.runs_dir, request.table)} runs imported into {request.exec.runs_dir}"
    )
    return 0


def adapter(request: Request, store: RunStore) -> int:
    """Save a finished LoRA run in PEFT's format."""
    from lorasweep.cli.adapter_export import export_adapter

    if not request.run or not request.out:
        raise SpecError("action=adapter needs run=RUN_ID and out=FOLDER.")
    if (store.result(request.run) or {}).get("state") not in FINAL[:1]:
        raise SpecError(
            f"run {request.run!r} is not a finished run in {store.root}. See action=status for ids."
        )
    export_adapter(
        store.spec(request.run), store.layout(request.run), request.exec, Path(request.out)
    )
    print(
        f"adapter of run {request.run} saved to {request.out}: load it with peft.PeftModel.from_pretrained"
    )
    return 0


def verify(request: Request, store: RunStore, points: list[Point]) -> int:
    """Train a sample of the finished runs again, alone; exit 1 if one comes out otherwise."""
    from lorasweep.cli import verify as verifying

    if request.sample < 1:
        raise SpecError(f"sample={request.sample}: at least 1 run.")
    quiet = request.format == "json"
    names = run_names(points)

    def told(c: verifying.Comparison) -> None:
        if quiet:
            return
        if c.difference is None:
            what = "diverged both times" if c.same_state else "ENDED OTHERWISE"
        else:
            what = f"recorded {c.recorded:.6f}, alone {c.alone:.6f}, difference {c.difference:+.1e} nats"
        print(f"{names[c.run]:32} {c.run}  pack of {c.pack_size}  {what}", flush=True)

    report = verifying.verify(points, store, request.exec, request.sample, told)
    if quiet:
        print(json.dumps(report.plain()))
    else:
        floor = report.noise_floor
        noise = (
            "no cell has two seeds"
            if floor is None
            else f"standard deviation between seeds {floor:.1e} nats"
        )
        largest = max(
            (abs(c.difference) for c in report.comparisons if c.difference is not None), default=0.0
        )
        print(f"largest difference {largest:.1e} nats; {noise}")
    return 1 if report.differing() else 0


def extend(request: Request, store: RunStore, points: list[Point], asked: dict[str, Any]) -> int:
    """Add the runs that would decide most to the sweep, as its next round; starts nothing."""
    from lorasweep.store.run_store import load_runs

    if request.sweep is None:
        raise SpecError("action=extend needs a sweep: +sweep=NAME.")
    missing = [p for p in points if not store.result(p.id)]
    if missing:
        raise SpecError(
            f"{len(missing)} of {len(points)} runs have not finished: a round is extended when it is over. "
            "Ask without action=extend first."
        )
    table = load_runs(store.root, [p.id for p in points])
    wanted = answer.next_round(table, asked)
    if not wanted.runs:
        print("nothing to add: every claim is decided, or more runs cannot help")
        return 0
    number = rounds.append(rounds.file_of(request), wanted.runs, answer.claims_hash(asked), points)
    print(
        "\n".join(
            [
                *wanted.lines,
                f"round {number}: {len(wanted.runs)} runs added; ask without action=extend to train them",
            ]
        )
    )
    return 0

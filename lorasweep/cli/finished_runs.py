"""The actions on finished runs: export, import, adapter, verify, extend."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorasweep.cli import answer
from lorasweep.cli.verify import (
    Comparison,
    changed_circumstances,
    compare_alone,
    largest_difference,
    noise_floor,
    train_again,
)
from lorasweep.errors import SpecError, TrainingError
from lorasweep.launch.trainer import Trainer
from lorasweep.methods.lora import LoRA
from lorasweep.methods.registry import spec_from
from lorasweep.plan.same_data import refuse_extending
from lorasweep.spec.run import RunSpec
from lorasweep.store import looks
from lorasweep.store.checkpoint import weights_of
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.names import run_names
from lorasweep.sweep.request import Request, question

if TYPE_CHECKING:
    from torch import Tensor


def export(request: Request, store: RunStore, points: list[Point]) -> int:
    """Write finished runs as a table: those of the sweep, or without a sweep all in the store."""
    from lorasweep.store.table import load_runs

    path = Path(request.table)
    if path.suffix not in (".parquet", ".csv"):
        raise SpecError(
            f"table={request.table!r}: expected a file name that ends in .parquet or .csv."
        )
    table = load_runs(store.root, [p.id for p in points] if request.sweep else None)
    if table.empty:
        raise SpecError(
            f"no finished runs in {store.root}. Run the sweep first, or set exec.runs_dir."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False, compression="zstd", compression_level=12)
    else:
        table.to_csv(path, index=False)
    print(f"{len(table)} runs written to {path}")
    return 0


def import_(request: Request) -> int:
    """Add the runs of an exported table to the store."""
    from lorasweep.store.table import import_table

    new = import_table(request.exec.runs_dir, request.table)
    print(f"{new} runs imported into {request.exec.runs_dir}")
    return 0


def adapter(request: Request, store: RunStore, points: Sequence[Point], trainer: Trainer) -> int:
    """Save a finished LoRA run in PEFT's format.

    The weights of runs are not kept (a sweep has thousands), so the run is trained again, alone,
    with the same threads and micro-batch. The result is the same up to rounding; if the run was
    trained alone on the same processor, it is the same bit for bit (tests). `points`: the runs
    whose seeds show the noise.

    Raises:
        TrainingError: it ends elsewhere than the recorded run, by more than the noise.
    """
    if not request.run or not request.out:
        raise SpecError("action=adapter needs run=RUN_ID and out=FOLDER.")
    if (store.result(request.run) or {}).get("state") != "done":
        raise SpecError(
            f"run {request.run!r} is not a finished run in {store.root}. List the ids with "
            "action=export."
        )
    spec = spec_from(store.spec(request.run))
    if not isinstance(spec.method, LoRA):
        raise SpecError(f"a {spec.method.name} run has no adapter. Set run= to a LoRA run.")
    comparison, state, final = train_again(spec, store, request.exec, trainer)
    bound = request.max_difference
    if bound is None:
        bound = largest_difference(noise_floor(points, store))
    causes = changed_circumstances(spec.id, store, final["backend"])
    why = "; ".join(causes) or "nothing of what is recorded: threads, code edits and drivers remain"
    outcome = f"trained again: {_outcome(comparison)}"
    if not comparison.within(bound):
        needed = math.ceil(100 * abs(comparison.difference or 0.0)) / 100
        accept = f"To accept it, add max_difference={needed:g}. " if comparison.same_state else ""
        raise TrainingError(
            f"run {spec.id} {outcome}. More than {bound:.1e} is beyond the noise, so no adapter "
            f"was written. What differs: {why}. {accept}Or train where the run was trained."
        )
    write_adapter(Path(request.out), spec, weights_of(state), final.get("base_commit"))
    print(outcome + (f"; what differs: {why}" if comparison.difference else ""))
    print(
        f"adapter of run {request.run} saved to {request.out}: load it with "
        "peft.PeftModel.from_pretrained"
    )
    if spec.model.tied and "unembedding" in spec.method.target_layers():
        print("its unembedding is tied to the embedding: use the adapter as it is, never merge it")
    return 0


def write_adapter(
    folder: Path,
    spec: RunSpec,
    weights: "dict[str, Tensor]",
    commit: str | None,
    base: str | None = None,
) -> None:
    """Write what a LoRA run trained as a folder that PEFT loads.

    `commit`: that of its base. `base`: what the folder calls it; None: where it was loaded from.
    """
    from lorasweep.methods.stacked.peft_export import save_peft

    assert isinstance(spec.method, LoRA)
    base = base or spec.model.location or spec.model.name
    of_experts = spec.model.n_experts, spec.method.scaling_of_experts(spec.model)
    scalings = spec.method.scaling, *of_experts
    save_peft(folder, weights, spec.method.rank, base, commit, *scalings)


def verify(request: Request, store: RunStore, points: list[Point]) -> int:
    """Train a sample of the finished runs again, alone; return 1 if a result differs."""
    if request.sample < 1:
        raise SpecError(f"sample={request.sample}: expected at least 1 run.")
    quiet = request.format == "json"
    names = run_names(points)

    def show(c: Comparison) -> None:
        if not quiet:
            print(f"{names[c.run]:32} {c.run}  pack of {c.pack_size}  {_outcome(c)}", flush=True)

    report = compare_alone(points, store, request.exec, request.sample, show)
    if quiet:
        print(json.dumps(report.plain()))
    else:
        floor = report.noise_floor
        noise = "no setting has two seeds"
        if floor is not None:
            noise = f"standard deviation between seeds {floor:.1e} nats"
        gaps = [abs(c.difference) for c in report.comparisons if c.difference is not None]
        print(f"largest difference {max(gaps, default=0.0):.1e} nats; {noise}")
    return 1 if report.differing() else 0


def _outcome(c: Comparison) -> str:
    if c.difference is None:
        return "diverged both times" if c.same_state else "ENDED DIFFERENTLY"
    if c.difference == 0:
        return f"recorded {c.recorded:.6f}, alone exactly the same"
    return f"recorded {c.recorded:.6f}, alone {c.alone:.6f}, difference {c.difference:+.1e} nats"


def extend(request: Request, store: RunStore, points: list[Point]) -> int:
    """Add the most useful runs to the sweep, as its next round. Starts nothing."""
    from lorasweep.store.table import load_runs

    if request.sweep is None:
        raise SpecError("action=extend needs a sweep: +sweep=NAME.")
    missing = [p for p in points if not store.result(p.id)]
    if missing:
        raise SpecError(
            f"{len(missing)} of {len(points)} runs have not finished. Run the sweep first, without "
            "action=extend."
        )
    asked = question(request)
    wanted = answer.next_round(load_runs(store.root, [p.id for p in points]), asked)
    if not wanted.runs:
        print("nothing to add: every claim is decided, or more runs cannot help")
        return 0
    by_id = {p.id: p for p in points}
    refuse_extending(points, [by_id[run["like"]] for run in wanted.runs], store)
    path = looks.path_of(store.root, request.title)
    number = looks.append(path, wanted.runs, answer.claims_hash(asked), points)
    lines = [
        *wanted.lines,
        f"round {number}: {len(wanted.runs)} runs added; run the command without action=extend to "
        "train them",
    ]
    print("\n".join(lines))
    return 0

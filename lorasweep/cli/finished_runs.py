"""The actions on finished runs: export, import, adapter, verify, extend.

Verify and adapter train runs again, alone. They compare the difference of the results with the
standard deviation between seeds.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.cli import answer
from lorasweep.cli.answer import all_points, is_search, judged
from lorasweep.cli.printed import Answer, notifier
from lorasweep.errors import SpecError, TrainingError
from lorasweep.fleet.serving import ADAPTER
from lorasweep.launch.trainer import Trainer, trainer_named
from lorasweep.methods.lora import LoRA
from lorasweep.methods.registry import spec_from
from lorasweep.spec.execution import Exec
from lorasweep.spec.metric import metric_of
from lorasweep.spec.run import RunSpec
from lorasweep.spec.streams import stream
from lorasweep.store import folders, looks
from lorasweep.store.checkpoint import State, weights_of
from lorasweep.store.run_store import RunStore
from lorasweep.store.table import import_table, load_runs
from lorasweep.sweep.grid import Point, curve_key
from lorasweep.sweep.names import run_names
from lorasweep.sweep.request import Request, question
from lorasweep.tracking import provenance

if TYPE_CHECKING:
    from torch import Tensor

NO_FLOOR_NATS = 0.01
"""Accepted difference of the final NLL if no condition has two seeds. In the tiny sweep, seeds
differ by about as much (docs/log)."""


def export(request: Request, store: RunStore) -> Answer:
    """Write the finished runs of the sweep, or without a sweep of the store, as a table."""
    path = Path(request.table)
    if path.suffix not in (".parquet", ".csv"):
        raise SpecError(f"table={request.table!r}: expected a file name in .parquet or .csv.")
    ids = [p.id for p in judged(request, all_points(request, store))] if request.sweep else None
    table = load_runs(store.root, ids)
    if table.empty:
        raise SpecError(f"no finished runs in {store.root}. Run a sweep, or set exec.runs_dir.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False, compression="zstd", compression_level=12)
    else:
        table.to_csv(path, index=False)
    return Answer(text=f"{len(table)} runs written to {path}")


def import_(request: Request, store: RunStore) -> Answer:
    """Add the runs of an exported table to the store."""
    new = import_table(request.exec.runs_dir, request.table)
    return Answer(text=f"{new} runs imported into {request.exec.runs_dir}")


# ---------------------------------------------------------------- training again


def noise_floor(points: Sequence[Point], store: RunStore) -> float | None:
    """Return the standard deviation between seeds of the final metric, pooled over conditions.

    None if no condition has two seeds.
    """
    conditions: dict[tuple[Any, ...], list[float]] = {}
    for p in points:
        result = store.result(p.id) or {}
        if result.get("state") == "done":
            value = result[metric_of(result).name]
            conditions.setdefault((*curve_key(p), p.spec.lr), []).append(value)
    repeated = [values for values in conditions.values() if len(values) > 1]
    degrees = sum(len(values) - 1 for values in repeated)
    squares = sum(statistics.variance(v) * (len(v) - 1) for v in repeated)
    return math.sqrt(squares / degrees) if degrees else None


def train_again(
    spec: RunSpec, store: RunStore, exec_: Exec, trainer: Trainer
) -> tuple[dict[str, Any], State, dict[str, Any]]:
    """Train a finished run again, alone, with the same threads and micro-batch.

    Returns the comparison as JSON values (differences: alone minus recorded, None for a diverged
    run), the state at the end, and the result with the folders that were used, `models_dir`.

    Raises:
        TrainingError: the data or the base have changed.
    """
    before, env = store.result(spec.id) or {}, store.env(spec.id)  # no env: imported
    layout = {k: env[k] for k in ("threads", "micro_batch_size") if env}
    # the folders of the command, then those of the run
    dirs = {k: [*getattr(exec_, k), *env.get(k, [])] for k in ("models_dir", "data_dir")}
    events = trainer([spec], dataclasses.replace(exec_, **layout, **dirs), None)
    last = next(event for event in events if spec.id in event.ended)
    state, final = last.ended[spec.id]
    for key, what in (("data_sha256", "other data"), ("base_sha256", "another base")):
        then, here = before.get(key), final.get(key)
        if then and here and then != here:
            raise TrainingError(
                f"run {spec.id} was trained on {what} (fingerprint {then}) than is there now "
                f"({here}), so it cannot be trained again. Restore the original."
            )
    name, done = metric_of(before).name, state == before["state"] == "done"
    pairs = [(a[name], b[name]) for a, b in zip(before["curve"], final["curve"])]
    gaps = [abs(a - b) for a, b in pairs if a is not None and b is not None]
    comparison = {
        "run": spec.id,
        "pack_size": before.get("pack_size"),
        "recorded": before[name] if done else None,
        "alone": final[name] if done else None,
        "difference": final[name] - before[name] if done else None,
        "same_state": state == before["state"],
        "curve_difference": max(gaps, default=None) if done else None,
    }
    return comparison, last.snapshot()[spec.id], {**final, **dirs}


def _is_within(c: dict[str, Any], bound: float | None) -> bool:
    """Return whether both trainings ended in one state, with metrics at most `bound` apart."""
    bound = NO_FLOOR_NATS if bound is None else bound
    return c["same_state"] and abs(c["difference"] or 0.0) <= bound


def _outcome(c: dict[str, Any]) -> str:
    if c["difference"] is None:
        return "diverged both times" if c["same_state"] else "ENDED DIFFERENTLY"
    return "recorded {recorded:.6f}, alone {alone:.6f}, difference {difference:+.1e} nats".format(
        **c
    )


# ---------------------------------------------------------------- adapter, verify, extend


def adapter(request: Request, store: RunStore, trainer: Trainer | str | None = None) -> Answer:
    """Train a finished run again, alone; save its adapter in PEFT's format, or its weights.

    Weights of runs are not kept, as a sweep has thousands of runs. The retrained weights are equal
    up to rounding, and bit for bit if the run was trained alone on the same processor.

    Raises:
        TrainingError: the final metric differs from the recorded one by more than
            request.max_difference, or if unset, than the standard deviation between seeds.
    """
    if not request.run or not request.out:
        raise SpecError("action=adapter needs run=RUN_ID and out=FOLDER.")
    if (store.result(request.run) or {}).get("state") != "done":
        raise SpecError(
            f"run {request.run!r} is not a finished run in {store.root}. List the ids with "
            "action=export."
        )
    spec, out = spec_from(store.spec(request.run)), Path(request.out).expanduser()
    folders.check(out, ADAPTER, request.exec, [spec.model])
    if trainer is None or isinstance(trainer, str):
        trainer = trainer_named(trainer)
    comparison, state, final = train_again(spec, store, request.exec, trainer)
    bound = request.max_difference
    if bound is None and request.sweep and not request.parts:
        bound = noise_floor(all_points(request, store), store)
    then, here = store.env(spec.id), provenance.environment()
    differs = [k for k in here.keys() & then.keys() if here[k] != then[k]]
    why = f"{_outcome(comparison)}; recorded and now differ in: "
    why += ", ".join(sorted(differs)) or "nothing that is recorded"
    if not _is_within(comparison, bound):
        needed = math.ceil(100 * abs(comparison["difference"] or 0.0)) / 100
        raise TrainingError(
            f"run {spec.id} trained again: {why}. The difference is too large, so nothing was "
            f"written. To accept it, add max_difference={needed:g}. Or use the machine of the "
            "recorded run."
        )
    with folders.replaced(out, ADAPTER) as partial:
        commit = final.get("base_commit")
        write_adapter(partial, spec, weights_of(state), commit, final["models_dir"])
    lines = [f"trained again: {why}", f"weights of run {request.run} saved to {request.out}"]
    if isinstance(spec.method, LoRA):
        lines[1] = f"adapter of run {request.run} saved to {request.out}: load it with "
        lines[1] += "peft.PeftModel.from_pretrained"
        if spec.model.tied and "unembedding" in spec.method.target_layers():
            lines.append("do not merge this adapter: it changes the unembedding, which is tied")
    return Answer(text=lines)


def write_adapter(
    folder: Path,
    spec: RunSpec,
    weights: "dict[str, Tensor]",
    commit: str | None,
    models_dir: Sequence[str] = (),
) -> None:
    """Write a run's adapter as a folder that PEFT loads, without local paths; or its weights.

    Args:
        commit: the base's commit on the hub.
        models_dir: where the base lies; needed for full fine-tuning only.
    """
    from lorasweep.methods.stacked.peft_export import save_peft
    from lorasweep.models.load import save_trained

    if not isinstance(spec.method, LoRA):
        save_trained(spec.model, models_dir, weights, folder)
        return
    base = spec.model.location if spec.model.source == "hub" else spec.model.name
    experts = spec.model.n_experts, spec.method.scaling_of_experts(spec.model)
    save_peft(folder, weights, spec.method.rank, base, commit, spec.method.scaling, *experts)


def verify(request: Request, store: RunStore) -> Answer:
    """Train a fixed sample of the finished runs again, alone; return 1 if a result differs.

    Runs that shared a pack come first.
    """
    points = all_points(request, store)
    found = ((store.result(p.id) or {"imported": True}, p.spec) for p in points)
    sample = sorted(
        (result.get("pack_size", 1) == 1, stream("verify", spec.id).random(), spec.id, spec)
        for result, spec in found
        if not result.get("imported")
    )
    if not sample:
        raise SpecError(f"no run of this sweep was finished in {store.root}. Run the sweep first.")
    names, trainer, compared = run_names(points), trainer_named(None), []
    for *_, spec in sample[: request.sample]:
        notifier(request)(f"training again, alone: {names[spec.id]}")
        compared.append(train_again(spec, store, request.exec, trainer)[0])
    floor = noise_floor(points, store)
    differing = [c["run"] for c in compared if not _is_within(c, floor)]
    noise = "no condition has two seeds"
    if floor is not None:
        noise = f"standard deviation between seeds {floor:.1e} nats"
    form = "{:32} {}  pack of {}  {}".format
    rows = [form(names[c["run"]], c["run"], c["pack_size"], _outcome(c)) for c in compared]
    value = {"runs": compared, "noise_floor": floor, "differing": differing}
    return Answer(value, [*rows, noise], status=int(bool(differing)))


def extend(request: Request, store: RunStore) -> Answer:
    """Add the runs that help most to decide claims, as the next round; start none."""
    if request.sweep is None:
        raise SpecError("action=extend needs a sweep: +sweep=NAME.")
    if is_search(request):
        raise SpecError("a search adds runs itself: run it again with a larger budget.")
    points = all_points(request, store)
    missing = [p for p in points if not store.result(p.id)]
    if missing:
        raise SpecError(
            f"{len(missing)} of {len(points)} runs have not finished. Run the sweep first, without "
            "action=extend."
        )
    asked = question(request)
    runs, lines = answer.next_round(load_runs(store.root, [p.id for p in points]), asked)
    if not runs:
        return Answer(text="nothing to add: every claim is decided, or more runs cannot help")
    path = looks.path_of(store.root, request.title)
    number = looks.append(path, runs, answer.claims_hash(asked), points)
    added = (
        f"round {number}: {len(runs)} runs added; run the command without action=extend to train"
    )
    return Answer(text=[*lines, added])

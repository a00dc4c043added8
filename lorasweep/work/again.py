"""Train finished runs again, alone: to save the adapter of one, or to verify that results hold.

The difference of the results is compared with the standard deviation between seeds.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lorasweep.errors import SpecError, TrainingError
from lorasweep.fleet.serving import ADAPTER
from lorasweep.launch.torch_trainer import Trainer, trainer_named
from lorasweep.methods import peft
from lorasweep.methods.lora import LoRA
from lorasweep.methods.registry import spec_from
from lorasweep.spec.execution import Exec
from lorasweep.spec.metric import metric_of
from lorasweep.spec.run import RunSpec
from lorasweep.spec.streams import stream
from lorasweep.store import folders
from lorasweep.store.checkpoint import State, weights_of
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point, curve_key, run_names
from lorasweep.sweep.request import Request
from lorasweep.tracking import provenance
from lorasweep.work.printed import Answer, notifier, table
from lorasweep.work.search import all_points, final_loss

NO_FLOOR_NATS = 0.01
"""Accepted difference of the final NLL if no condition has two seeds. Assumption: seeds differ by
about as much (their standard deviation in analysis/results/lr_ratio-tiny is 0.02)."""


def noise_floor(points: Sequence[Point], store: RunStore) -> float | None:
    """Return the pooled standard deviation between seeds; None if no condition has two seeds."""
    conditions: dict[tuple[Any, ...], list[float]] = {}
    for p in points:
        if (loss := final_loss(store.result(p.id) or {})) is not None:
            conditions.setdefault((*curve_key(p), p.spec.lr), []).append(loss)
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
        SpecError: files of a foreign trainer are not given.
        TrainingError: the data or the base have changed.
    """
    before, env = store.result(spec.id) or {}, store.env(spec.id)  # no env: imported
    layout: dict[str, Any] = {k: env[k] for k in ("threads", "micro_batch_size") if env}
    # the folders of the command, then those of the run
    dirs: dict[str, Any] = {
        k: [*getattr(exec_, k), *env.get(k, [])] for k in ("models_dir", "data_dir")
    }
    program = exec_.trainer_files or env.get("trainer_files", [])
    if len(program) != len(spec.trainer.files):
        by = f"run {spec.id} was trained by {spec.trainer.name}"
        raise SpecError(f"{by}: add exec.trainer_files=[PATH, ...], its script and other files.")
    with TemporaryDirectory() if spec.trainer.command else nullcontext(exec_.runs_dir) as folder:
        if spec.trainer.command:
            RunStore(folder).claim(spec)  # its attempt needs a folder
        dirs |= {"runs_dir": folder, "trainer_files": program}
        events = trainer([spec], dataclasses.replace(exec_, **layout, **dirs), None)
        last = next(event for event in events if spec.id in event.ended)
        (state, final), weights = last.ended[spec.id], last.snapshot()[spec.id]
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
    return comparison, weights, {**final, **dirs}


def _is_within(c: dict[str, Any], bound: float | None) -> bool:
    """Return whether both trainings ended in one state, with metrics at most `bound` apart."""
    bound = NO_FLOOR_NATS if bound is None else bound
    return c["same_state"] and abs(c["difference"] or 0.0) <= bound


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
            "lorasweep export SWEEP out=runs.csv."
        )
    spec, out = spec_from(store.spec(request.run)), Path(request.out).expanduser()
    folders.check(out, ADAPTER, request.exec, [spec.model])
    if trainer is None or isinstance(trainer, str):
        trainer = trainer_named(trainer)
    comparison, state, final = train_again(spec, store, request.exec, trainer)
    bound = request.max_difference
    if bound is None and request.sweep and not request.parts:
        bound = noise_floor(all_points(request, store), store)
    envs = (store.env(spec.id), provenance.environment())
    then, here = ({**env, **env.get("packages", {})} for env in envs)
    shared = sorted(k for k in here.keys() & then.keys() if isinstance(here[k], str))
    differs = [f"{k} {then[k]} then, {here[k]} now" for k in shared if here[k] != then[k]]
    why = "ended differently"  # the recorded run is done
    if comparison["difference"] is not None:
        why = "recorded {recorded:.6f}, alone {alone:.6f}, difference {difference:+.1e} nats"
    why = f"{why.format(**comparison)}; what differs: {'; '.join(differs) or 'nothing recorded'}"
    if not _is_within(comparison, bound):
        needed = math.ceil(100 * abs(comparison["difference"] or 0.0)) / 100
        raise TrainingError(
            f"run {spec.id} trained again: {why}. The difference is too large, so nothing was "
            f"written. To accept it, add max_difference={needed:g}. Or use the machine of the "
            "recorded run."
        )
    from lorasweep.models.load import write_adapter  # only here: it imports torch

    with folders.replaced(out, ADAPTER) as partial:
        commit = final.get("base_commit")
        write_adapter(partial, spec, weights_of(state), commit, final["models_dir"])
    lines = [f"trained again: {why}", f"weights of run {request.run} saved to {request.out}"]
    if isinstance(spec.method, LoRA | peft.PEFT):
        lines[1] = f"adapter of run {request.run} saved to {request.out}: load it with "
        lines[1] += "peft.PeftModel.from_pretrained"
        if spec.model.tied and "unembedding" in spec.method.target_layers():
            lines.append("do not merge this adapter: it changes the unembedding, which is tied")
    return Answer(text=lines)


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
    keys = ("name", "run", "pack_size", "recorded", "alone", "difference")
    rows = table([{**c, "name": names[c["run"]]} for c in compared], *keys)
    value = {"runs": compared, "noise_floor": floor, "differing": differing}
    return Answer(value, [*rows, noise], status=int(bool(differing)))

"""The actions on runs: train and answer, cancel, export, import, adapter, verify, extend; searches.

Verify and adapter train runs again, alone. They compare the difference of the results with the
standard deviation between seeds.
"""

import dataclasses
import json
import math
import re
import shlex
import shutil
import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lorasweep.cli import answer
from lorasweep.cli.answer import all_points, final_loss, is_search, judged
from lorasweep.cli.plans import (
    check_available,
    plan_lines,
    search_lines,
    understood,
    unpinned_lines,
)
from lorasweep.cli.printed import Answer, Display, duration, notifier, table
from lorasweep.config.catalogue import conf_dir
from lorasweep.config.compose import quoted
from lorasweep.config.folders import exec_of
from lorasweep.data import text
from lorasweep.errors import (
    GaveUp,
    LorasweepError,
    SpecError,
    StoreError,
    TrainingError,
    check_installed,
)
from lorasweep.fleet import score
from lorasweep.fleet.rows import shown
from lorasweep.fleet.serving import ADAPTER
from lorasweep.launch import local
from lorasweep.launch.pack import END
from lorasweep.launch.process import Stopped
from lorasweep.launch.slurm.submit import Work, cancel, hardware_of, submit, updates_of
from lorasweep.launch.trainer import TorchTrainer, Trainer, trainer_named
from lorasweep.launch.worker import check_world_size
from lorasweep.methods import peft
from lorasweep.methods.lora import LoRA
from lorasweep.methods.registry import METHODS, spec_from
from lorasweep.models.find import recipe_file_name, recipe_weights
from lorasweep.plan import detect
from lorasweep.plan.budget import parse_budget
from lorasweep.plan.planner import Planner, make_plan, place
from lorasweep.spec.execution import Exec
from lorasweep.spec.metric import METRICS, metric_of
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import RunSpec
from lorasweep.spec.streams import stream
from lorasweep.store import checkpoint, files, folders, looks
from lorasweep.store.checkpoint import State, weights_of
from lorasweep.store.run_store import RunStore
from lorasweep.store.table import import_table, load_runs, read_exported, refuse_loss
from lorasweep.sweep.grid import Point, curve_key, lrs_around_optimum, run_names
from lorasweep.sweep.request import Request, question
from lorasweep.sweep.search import LOWEST, WORDS, arm_key, arm_names, is_short
from lorasweep.tracking import provenance, wandb

if TYPE_CHECKING:
    from torch import Tensor

STOPPED = 130
"""Exit status after Ctrl-C."""
MAX_IDLE = 3
"""Follow-up jobs in a row without a saved update, after which no more jobs are submitted."""
CHANGED_CLAIMS = "the claims were changed after a first answer from these runs"
"""Why the verdicts of such a sweep are exploratory."""
ANSWER = "lorasweep.json"
"""File with the results and the answer in the folder of the best run of a search."""
FLAGS = {
    "bounded_by_divergence": "next to one that diverges",
    "at_edge": "the last one that was tried",
    "few_points": "few were tried",
    "no_variance": "too few seeds",
    "mixed_versions": "of several versions of the trainer",
    "flat": "several are equally good",
    **{rf"{name} r(\d+)": rf"{words} rank \1" for name, words in WORDS.items()},
    "fullft": WORDS["fullft"],
}
"""Doubts about a best learning rate, and names of arms, in words."""
NO_FLOOR_NATS = 0.01
"""Accepted difference of the final NLL if no condition has two seeds. Assumption: seeds differ by
about as much (their standard deviation in analysis/results/lr_ratio-tiny is 0.02)."""


def run(request: Request, store: RunStore, trainer: Trainer | str | None = None) -> Answer:
    """Train the missing runs, judge and report; on a cluster, submit jobs and report later."""
    if request.sweep is not None and not request.task:  # not only after hours of training
        folder = Path(request.exec.reports_dir) / request.title
        files.check_writable(folder, "exec.reports_dir")
    points, status, sent = train(request, store, trainer)
    if sent or status == STOPPED:
        return sent or Answer(status=status)
    names, states = run_names(points), store.states(p.id for p in points)
    warn = notifier(request, always=True)
    for i in (i for i, state in states.items() if state in ("failed", "interrupted")):
        cause, log = "its process was killed (out of memory?)", store.folder(i) / "attempts"
        warn(
            f"run {i} ({names[i]}) failed: {store.failure(i) or cause}. Logs: {log}. Try again: "
            "exec.retry=true; after kills also fewer exec.workers, a smaller exec.micro_batch_size "
            "or a larger exec.max_attempts"
        )
    return answered(request, store, points, status)


def answered(request: Request, store: RunStore, points: Sequence[Point], status: int = 0) -> Answer:
    """Return the answer of the finished runs, and write the report; `status`: of their training."""
    warn = notifier(request, always=True)
    finished = [p.id for p in judged(request, points) if store.result(p.id)]
    if not finished:
        why = "no run of full length has finished" if is_search(request) else "no run has finished"
        if request.budget and not status:  # else runs failed
            why = f"budget={request.budget} ended before a full run; a larger one continues"
        warn(f"{why}, so there is no answer yet")
        return Answer(status=max(status, int(bool(request.out and is_search(request)))))
    if request.sweep_name is None:
        (rid,), names = finished, run_names(points)
        result = store.result(rid) or {}
        metric, measure = metric_of(result), ""
        value = metric.value(result)
        if value is not None:
            start = metric.value(result["curve"][0])
            measure = f", {metric.label} {value:.4f} (from {start:.4f})"
        text = f"run {rid} ({names[rid]}): {result['state']}{measure}. Folder: {store.folder(rid)}"
        text += f"\nDoubtful: {doubt}" if (doubt := result.get("doubt")) else ""
        return Answer({k: v for k, v in result.items() if k != "curve"}, text, status)
    asked, folder = question(request), Path(request.exec.reports_dir) / request.title
    searched, path = is_search(request), looks.path_of(store.root, request.title)
    if looks.first_claims(path) not in (None, answer.claims_hash(asked)):
        for claim in asked["claims"].values():
            earlier = claim.get("exploratory") or {}
            claim["exploratory"] = {request.scale: CHANGED_CLAIMS, **earlier}
    as_json = request.format == "json"
    runs = answer.table_of(request, store, [p for p in points if p.id in {*finished}])
    text = answer.judge(runs, asked, folder, as_json or searched)
    looks.note_look(path, answer.claims_hash(asked), asked["rounds"])
    if searched:
        return finish(request, store, points, json.loads(text), status)
    return Answer(json.loads(text) if as_json else None, text, status)


def report(request: Request, store: RunStore) -> Answer:
    """Judge the finished runs of a sweep; SpecError: there are none, or it is a search."""
    points, name = all_points(request, store), request.sweep_name
    if is_search(request):
        raise SpecError("action=report: a search answers itself. Give its command again.")
    missing = [p for p in points if not store.result(p.id)]
    if len(missing) == len(points):
        kept = any(answer.KEPT.glob(f"{name or 'lr_ratio'}-*"))
        raise SpecError(
            f"no run of this command has finished in {store.root}. Train them: the same command "
            "without report." + f" The kept answer: python -m analysis {name or 'lr_ratio'}" * kept
        )
    if missing:
        left = f"{len(missing)} of {len(points)} runs have not finished: this answer may change"
        notifier(request, always=True)(left)
    return answered(request, store, points)


def fit(request: Request, store: RunStore) -> Answer:
    """Fit every learning-rate curve of a user's table, and write the fits to request.out."""
    if not request.table:
        raise SpecError("action=fit needs table=FILE: one run per row, .csv, .parquet or .jsonl.")
    path = Path(request.out).expanduser() if request.out else None
    fits, lines, notes = answer.fit_table(Path(request.table).expanduser())
    for note in notes:
        notifier(request)(f"note: {note}")
    if path:
        content = answer.own_file(path, json.dumps(fits, indent=1), comment="")
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, content)
    return Answer(fits, lines)


# ---------------------------------------------------------------- before training


def within_limit(request: Request) -> Request:
    """Leave out the runs that need more than exec.max_gpus GPUs, and say how many."""
    parts, most = [within_limit(part) for part in request.parts], request.exec.max_gpus
    if most is None or not request.points:
        return dataclasses.replace(request, parts=parts)
    kept = Planner(hardware_of(request), request.exec).without_too_large(request.points)
    if gone := len(request.points) - len(kept):
        where = f"{request.title}: " * (request.sweep_name is not None)
        warn = notifier(request, always=True)
        warn(f"{where}{gone} runs need more than exec.max_gpus={most} GPUs: left out")
    return dataclasses.replace(request, points=kept)


def check(request: Request) -> None:
    """Raise an error if the user must correct something before training."""
    if request.mirror == "wandb":
        wandb.check()
    if request.cluster.kind == "slurm":
        check_installed("submitit", f"cluster={request.cluster.name}")
    if request.exec.world_size > 1:
        specs = [p.spec for p in request.points]
        check_world_size(specs, request.exec, request.cluster, detect.this_machine())
    if request.hardware and (hardware := hardware_of(request)).has_speeds:
        Planner(hardware, request.exec).settings(request.points)
    check_available(request)
    answer.outlooks(request.points, request.sweep, request.scale)  # refuses what cannot be judged


# ---------------------------------------------------------------- training


def train(
    request: Request, store: RunStore, trainer: Trainer | str | None = None
) -> tuple[list[Point], int, Answer | None]:
    """Train the missing runs of a request here, or submit them as jobs of a cluster.

    Returns the runs, those of the second stage that are known included; the exit status: 0, 1 if
    runs failed or were killed, STOPPED; and while runs are in jobs of a cluster, the answer.

    Raises GaveUp in a follow-up job if the last rounds of jobs saved no update.
    """
    store.prepare()
    notify, searched = notifier(request), is_search(request)
    lines = understood(request)  # also refuses rows
    if searched:
        check_search(request)
        lines += search_lines(request)
    for line in lines:
        notify(line)
    points = all_points(request, store)
    check(request)
    _check_versions(points, store)
    _check_bases(points, store, request.exec.models_dir)
    for _, outlook in answer.outlooks(request.points, request.sweep, request.scale):
        if outlook.warns and any(not store.result(p.id) for p in points):
            notify(outlook.line())
    copying: Any = nullcontext(lambda ids: None)
    if request.mirror == "wandb":  # of names, only those of shipped files are sent
        words = [*METHODS, "single", *(path.stem for path in conf_dir().glob("*/*.yaml"))]
        copying = wandb.mirroring(store, request.sweep_name or "single", words)
    with copying as name:
        name([p.id for p in points])
        if request.cluster.kind == "slurm":
            idle = 0
            for line in unpinned_lines(points):
                notify(line)
            if task := request.task:
                idle = task["idle"] + 1 if updates_of(points, store) <= task["updates"] else 0
                if idle >= MAX_IDLE:
                    raise GaveUp(
                        f"no run got further in {idle} rounds of jobs, so no more are submitted. "
                        "See the causes with action=status."
                    )
            named = trainer if isinstance(trainer, str) else None
            work = submit(request, store, lambda: all_points(request, store), notify, named, idle)
            points, sent = all_points(request, store), _submitted(request, work)
            if searched:
                prune(request, store, points)
            if work.queued or work.running:
                return points, 0, sent
            for line in sent.as_text().splitlines():
                notify(line)
        else:
            plan = make_plan(points, store, request.exec, detect.this_machine())
            lines = plan_lines(request, plan)
            try:
                with local.Workers(store, request.exec.world_size) as workers:
                    while plan.todo:  # results of the first stage choose the second
                        notify("\n".join(lines))
                        show = Display(plan.todo, request).event
                        local.run_points(points, store, request.exec, show, trainer, plan, workers)
                        if searched:
                            prune(request, store, points)
                        known, points = len(points), all_points(request, store)
                        if len(points) == known:
                            break
                        name([p.id for p in points])
                        plan = make_plan(points, store, request.exec, plan.hardware)
                        brief = request.members or searched  # the first plan has listed the arms
                        lines = plan_lines(request, plan)[: 1 if brief else None]
            except (Stopped, KeyboardInterrupt):
                notifier(request, always=True)(
                    "stopped; finished runs are kept, unfinished runs resume from their "
                    "checkpoints when you run the command again"
                )
                return points, STOPPED, None
    states = store.states(p.id for p in points).values()
    return points, int(not {"failed", "interrupted"}.isdisjoint(states)), None


def _check_versions(points: Sequence[Point], store: RunStore) -> None:
    """Raise StoreError if runs are missing, and others were trained with other versions."""
    now = {p.id: packages for p in points if (packages := provenance.packages_of(p.spec))}
    done = {i: store.result(i) for i in now}
    kept = {i: done[i] or (store.env(i) if store.saved_step(i) else {}) for i in now}
    then = {i: kept[i].get("packages" if done[i] else "offered_by") for i in now}  # or resumed
    for i in (i for i in now if None in done.values() and then[i] not in (None, now[i])):
        raise StoreError(
            f"run {i} was trained with {then[i]}, and {now[i]} is installed. Their runs share no "
            f"curve: install the first, or use a new run folder (exec.runs_dir={store.root}-2)."
        )


def _check_bases(points: Sequence[Point], store: RunStore, dirs: Sequence[str]) -> None:
    """Raise StoreError if runs are missing, and imported ones had another base than is here.

    Every machine trains other weights from a recipe, in their last bits.
    """
    results = {p: store.result(p.id) for p in points}
    lacking = {p.spec.model.name for p, result in results.items() if not result}
    known: dict[tuple[ModelSpec, str], set[str]] = {}
    for p, result in results.items():
        if result and result.get("imported") and result.get("base_sha256"):
            known.setdefault((p.spec.model, p.spec.precision), set()).add(result["base_sha256"])
    for (model, precision), digests in known.items():
        if model.source != "recipe" or model.name not in lacking:
            continue
        from lorasweep.models.load import load  # only here: it imports torch

        path = recipe_weights(model, dirs)
        here = load(model, dirs, precision).sha256 if path else "none"
        if others := ", ".join(sorted(digest[:8] for digest in digests - {here})):
            raise StoreError(
                f"imported runs had a base {model.name} with other weights ({others}) than here "
                f"({here[:8]}), and runs of two bases share no curve. Copy their "
                f"{recipe_file_name(model)} to {dirs[0]}, or use a new run folder "
                f"(exec.runs_dir={store.root}-2)."
            )


def _submitted(request: Request, work: Work) -> Answer:
    """Return what was submitted, and what stays in the queue."""
    jobs = ", ".join(f"{n} job(s) as {number}" for number, n in work.sent.items())
    lines = (
        (jobs, f"submitted {work.n_submitted} runs: {jobs}; records and logs in {work.folder}"),
        (work.refused, f"Slurm did not accept all jobs; the rest waits: {work.refused}"),
        (
            work.exhausted,
            f"{work.exhausted} runs were killed {request.exec.max_attempts} times and are not "
            "submitted again: see the causes with action=status, then raise exec.max_attempts",
        ),
        (
            work.queued or work.running,
            f"{work.queued} runs queued, {work.running} running. Watch them with action=status; "
            "the same command answers when they have finished.",
        ),
        (work.removed, work.removed),
    )
    names = ("queued", "refused", "running", "exhausted", "removed")
    values: dict[str, Any] = {key: getattr(work, key) for key in names}
    values |= {"submitted": work.n_submitted}
    values["jobs"] = [*work.sent, *filter(None, [work.follow])]
    return Answer(values, [line for said, line in lines if said])


def cancel_jobs(request: Request, store: RunStore) -> Answer:
    """Cancel the sweep's jobs on the cluster (Ctrl-C stops local runs)."""
    n_jobs, n_runs = cancel(request, store, notifier(request))
    text = f"cancelled {n_jobs} job(s) with {n_runs} unfinished run(s), which may be resumed"
    return Answer({"jobs": n_jobs, "runs": n_runs}, text if n_jobs else "nothing to cancel")


# ---------------------------------------------------------------- export, import


def export(request: Request, store: RunStore) -> Answer:
    """Write the finished runs of the sweep, or without a sweep of the store, as a table."""
    path = Path(request.out).expanduser()
    if path.suffix not in (".parquet", ".csv"):
        raise SpecError(f"out={request.out!r}: expected a file name in .parquet or .csv.")
    if path.is_symlink():
        raise SpecError(f"out={request.out!r} is a link. Name the file itself.")
    earlier = read_exported(path) if path.exists() else None
    ids = [p.id for p in judged(request, all_points(request, store))] if request.sweep else None
    found = load_runs(store.root, ids)
    if found.empty:
        raise SpecError(f"no finished runs in {store.root}. Run a sweep, or set exec.runs_dir.")
    if earlier is not None:
        refuse_loss(path, earlier, found)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        content = found.to_parquet(index=False, compression="zstd", compression_level=12)
    else:
        content = found.to_csv(index=False).encode()
    files.write_atomic(path, content)  # a full disk leaves an earlier table as it is
    return Answer(text=f"{len(found)} runs written to {path}")


def import_(request: Request, store: RunStore) -> Answer:
    """Add the runs of an exported table to the store."""
    new = import_table(request.exec.runs_dir, Path(request.table).expanduser())
    return Answer(text=f"{new} runs imported into {request.exec.runs_dir}")


# ---------------------------------------------------------------- training again


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
        models_dir: where the base lies; needed except for LoRA.
    """
    from lorasweep.methods.stacked import save_peft
    from lorasweep.models.load import find_targets, load, save_trained

    base = spec.model.location if spec.model.source == "hub" else spec.model.name
    if isinstance(spec.method, LoRA):
        save_peft(folder, weights, spec.method, base, commit, spec.model.n_experts)
    elif isinstance(spec.method, peft.PEFT):
        model = load(spec.model, models_dir).model
        targets = find_targets(model, spec.model, spec.method.target_layers())
        peft.save(folder, model, targets, spec, weights, (base, commit))
    else:
        save_trained(spec.model, models_dir, weights, folder)


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


# ---------------------------------------------------------------- a search of learning rates


def prune(request: Request, store: RunStore, points: Sequence[Point]) -> None:
    """Delete states and weights that no later run and no export needs.

    Kept: the weights of the best run at each of the learning rates around the best one, of each
    arm, for the best one may still change; weights that the user asked to keep; and the final
    states of short runs until full runs have begun from them.
    """
    fresh = any(p.spec.seed != request.points[0].spec.seed for p in points)
    full = {p.id for p in judged(request, points) if store.result(p.id)}
    curves: dict[tuple[str, str], list[Point]] = {}
    for p in points:
        if is_short(p, request.points):
            steps = request.points[0].spec.steps
            if fresh or dataclasses.replace(p.spec, steps=steps).id in full:
                shutil.rmtree(store.folder(p.id) / END, ignore_errors=True)
        elif p.id in full:
            curves.setdefault(arm_key(p), []).append(p)
    for mine in curves.values():
        by_lr = _by_lr(mine, store)
        means = {lr: sum(losses.values()) / len(losses) for lr, losses in by_lr.items()}
        near = lrs_around_optimum(means, request.sweep.search.n_lrs)
        kept = {min(by_lr[lr], key=by_lr[lr].__getitem__) for lr in near}
        for p in mine:
            name = request.exec.prune_weights  # empty: the user keeps them
            if p not in kept and name and store.env(p.id).get("prune_weights") == name:
                (store.folder(p.id) / checkpoint.WEIGHTS).unlink(missing_ok=True)


def _by_lr(points: Sequence[Point], store: RunStore) -> dict[float, dict[Point, float]]:
    """Return the runs of an arm by learning rate, each with its loss on the rows that choose."""
    found: dict[float, dict[Point, float]] = {}
    for p in points:
        loss = final_loss(store.result(p.id) or {}, p.spec.dataset.n_validation > 0)
        found.setdefault(p.spec.lr, {})[p] = math.inf if loss is None else loss
    return found


def check_search(request: Request) -> None:
    """Raise an error if an arm does not fit, or request.out cannot be written or served."""
    machine = hardware_of(request) if request.hardware else detect.this_machine()
    room, rows = machine.worker_gib or math.inf, request.exec.micro_batch_size
    for p in request.points if request.cluster.kind == "local" else ():
        if (need := place(p.spec, machine, rows=rows).memory_gib) > room:
            raise SpecError(
                f"{p.arm} takes {need:.0f} GiB, and the memory has {room:.0f}. Leave it out with "
                "arms=[NAME] of the others, or choose a smaller model or dataset.max_length."
            )
    if request.out:
        models = {p.spec.model for p in request.points}
        folders.check(Path(request.out).expanduser(), ANSWER, request.exec, models)
        _served(request)


def _served(request: Request) -> tuple[Any, dict[str, Any]]:
    """Return the tokenizer with the rows' chat template, and `shown`; nothing without text."""
    from lorasweep.models import load

    spec, fetched = request.points[0].spec, request.cluster.kind == "slurm"
    if spec.dataset.source == "synthetic":
        return None, {}
    tokenizer = load.tokenizer_of(spec.model, request.exec.models_dir, fetched)
    served = text.with_template(spec.dataset, tokenizer)
    form = shown(spec.dataset, [], tokenizer)
    text.check_served(spec.dataset, served, form["messages"], [], form["example"], "example")
    return served, form


def finish(
    request: Request, store: RunStore, points: Sequence[Point], results: dict[str, Any], status: int
) -> Answer:
    """Return the answer, and write the best run into request.out; if not, with exit status 1."""
    prune(request, store, points)
    names, arms = arm_names(request.points), dict[str, list[Point]]()
    for p in judged(request, points):
        arms.setdefault(names[arm_key(p)], []).append(p)
    lowest = max((min(p.spec.lr for p in own) for own in arms.values()), default=math.inf)
    conclusion, written = conclude(request, results, lowest), not request.out
    n_seeds = len({p.spec.seed for p in points})
    if lost := [p.id for p in points if store.last_attempt(p.id) and not store.result(p.id)]:
        conclusion["open"].insert(0, f"{len(lost)} runs that did not finish, such as {lost[0]}")
    if conclusion["open"] and n_seeds > request.sweep.search.seeds:
        conclusion["open"].append(f"all {n_seeds} seeds are used")
    if budget := parse_budget(request.budget, request.points[0].spec.steps):
        used = budget.used(points, store)
        words = f"{used:.3g} runs" if budget.unit == "runs" else duration(used)
        words += " of GPUs" * (budget.unit == "gpuh")
        conclusion["budget"] = {"given": budget.text, "used": words}
    if request.out and conclusion["method"] is None:
        conclusion["out"] = f"nothing is written to {request.out}"
    if conclusion["method"] is not None:
        arm = next(a for a in results["arms"] if a["arm"] == conclusion["arm"])
        by_lr = _by_lr(arms[arm["arm"]], store)
        tried = arm["best_tried"] or conclusion["lr"]
        # of the seeds at the learning rate that the answer chose
        lr = min(by_lr, key=lambda lr: abs(math.log(lr / tried)))
        best = min(by_lr[lr], key=by_lr[lr].__getitem__)
        conclusion["score"] = score.count(best.spec, request, TorchTrainer())
    if request.out and conclusion["method"] is not None:
        out, (served, form) = Path(request.out).expanduser(), _served(request)
        conclusion["out"] = f"written to {request.out} (learning rate {lr:g})"
        try:
            weights = checkpoint.load_weights(store.folder(best.id))
            if weights is None:
                raise StoreError(
                    f"the weights of run {best.id} were not kept (another command trained it, "
                    "several processes did, or the disk was nearly full). To train it again: "
                    + _command_of(best.id, request)
                )
            with folders.replaced(out, ANSWER) as partial:
                commit = (store.result(best.id) or {}).get("base_commit")
                write_adapter(partial, best.spec, weights, commit, request.exec.models_dir)
                if served:
                    text.save_tokenizer(served, form["stop"], partial)
                content = {k: v for k, v in conclusion.items() if k != "out"}
                content = {**results, "answer": content, "prompt_form": form}
                (partial / ANSWER).write_text(json.dumps(content, indent=1))
            written = True
        except LorasweepError as error:
            conclusion["out"] = f"not written to {request.out}: {error}"
    value, lines = {**results, "answer": conclusion}, _lines(request, results, conclusion)
    return Answer(value, lines, status if written else max(status, 1))


def _command_of(rid: str, request: Request) -> str:
    """Return the command that trains a run again and writes its weights, as a shell takes it."""

    def said(value: Any) -> str:
        if isinstance(value, list):
            return f"[{','.join(map(said, value))}]"
        return value if re.fullmatch(r"[\w./-]+", value) else quoted(value)

    words = ["lorasweep", "adapter", rid, f"out={said(request.out.rstrip('/') + f'-{rid}')}"]
    keys = ("runs_dir", "models_dir", "data_dir", "trainer_files")
    given = {k: v for k in keys if (v := getattr(request.exec, k)) != getattr(exec_of({}), k)}
    return shlex.join([*words, *(f"exec.{k}={said(v)}" for k, v in given.items())])


def conclude(request: Request, results: Mapping[str, Any], lowest: float = 0.0) -> dict[str, Any]:
    """Return the setting to use and why, and what the runs have not decided.

    `lowest`: the learning rate down to which all arms had full runs.
    """
    arms = {arm["arm"]: arm for arm in results["arms"]}
    best, spec, start = results["best"], request.points[0].spec, results["start"]
    outcome = next((v["outcome"] for v in results["verdicts"]), "")
    names = arm_names(request.points)
    methods = {names[arm_key(p)]: p.spec.method.plain() for p in request.points}
    absent = [name for name in methods if name not in arms]
    chosen, reference = (arms.get(results[k]) for k in ("best", "reference"))
    full, lora = (arm and arm["loss"] for arm in (reference, chosen))
    refuted = outcome == "REFUTED" and best == results["judged"]
    lost = 0.0  # share of full fine-tuning's gain that the best of the others gives up, as measured
    if None not in (full, lora, start) and start > full:
        lost = (lora - full) / (start - full)
    others = [(a["method"], a["rank"]) for a in arms.values() if a is not reference]
    by_rank = len({method for method, _ in others}) == 1 and len({*others}) == len(others)
    why = "the smallest rank" if by_rank else "the fewest trained weights"
    why += " within 1% of the gain of the best one"
    if chosen is None:
        chosen, why = reference, "the only method that trains"
    elif reference and (refuted or (outcome != "SUPPORTED" and lost > results["allowed"])):
        chosen, why = reference, f"{best} gives up {100 * lost:.0f}% of the gain"
        why += ", not decided" * (outcome == "UNDECIDED")
    lr = chosen and (chosen["best_lr"]["value"] or chosen["best_tried"])
    end, more, loss = LOWEST * request.sweep.search.wide, list[str](), chosen and chosen["loss"]
    if lr and chosen["best_tried"] and not 0.5 <= lr / chosen["best_tried"] <= 2:
        more = [f"the fit says {lr:.1e}, far from the best learning rate that was tried"]
        lr = chosen["best_tried"]  # such as of a curve with two valleys
    trains = lr and lr >= end
    if not trains or (None not in (start, loss) and loss >= start):
        why = f"no learning rate, tried from {lowest:.1e} on, lowers the loss on "
        why += f"{results['chosen_on']} and test rows"
        if not trains and lowest >= end:
            more += ["lower learning rates, which were not tried"]
        chosen, lr = dict.fromkeys(("arm", "method", "rank")), None
    more += [f"{name}, of which no run of full length has finished" for name in absent]
    return {
        **{k: chosen[k] for k in ("arm", "method", "rank")},
        "layers": methods[chosen["arm"]].get("layers") if lr else None,
        "lr": lr,
        "steps": spec.steps,
        "batch_size": spec.batch_size,
        "why": why,
        "open": [*more, *answer.open_questions(dict(results))],
    }


def _lines(request: Request, results: Mapping[str, Any], c: Mapping[str, Any]) -> list[str]:
    """Return the answer: the setting, a table of the arms, the gap, and what is open."""
    metric = METRICS[request.points[0].spec.objective]
    losses = {"base": results["start"]} | {a["arm"]: a["loss"] for a in results["arms"]}
    shown = {k: None if v is None else f"{metric.loss(v):.4f}" for k, v in losses.items()}
    arms: list[dict[str, Any]] = [{"arm": "base", metric.label: shown["base"]}]
    for a in results["arms"]:
        best, notes = a["best_lr"], ", ".join(a["flags"])
        arms.append(
            {
                "arm": a["arm"],
                "best learning rate": best["value"] or a["best_tried"],
                "interval": [best["low"], best["high"]],
                "good": a["good"],
                metric.label: shown[a["arm"]],
                "seconds": a["seconds"],
                "notes": notes if a["best_tried"] else "no learning rate trains",
            }
        )
    use = "the base as it is"
    if c["method"] is not None:
        use = f"{c['arm']}, learning rate {c['lr']:.1e}"
        use += f", {c['steps']} updates of {c['batch_size']} rows"
    use = "; ".join([f"Use {use} ({c['why']})", *filter(None, [c.get("out")])])
    used = ["used {used} of {given}".format(**c["budget"])] if "budget" in c else []
    last = "; ".join([f"open: {'; '.join(c['open']) or 'nothing'}", *used])
    exact = [f"exact answers: {c['score']['text']}"] if c.get("score") else []
    lines = [*table(arms, *arms[-1]), gap_line(results), last, *results.get("cautions", ())]
    for flag, words in FLAGS.items():
        lines = [re.sub(rf"\b{flag}\b", words, line) for line in lines]
    return [use, *exact, *lines]  # with a path of the user's


def gap_line(results: Mapping[str, Any]) -> str:
    """Say what the judged arm gives up, with the interval that decides the claim.

    It is wider than 95%, as the claim is judged several times.
    """
    arms, verdicts = {arm["arm"]: arm for arm in results["arms"]}, results["verdicts"]
    top, of = results["judged"], results["reference"]
    if top is None or not arms[top]["gap_percent"] or not verdicts:
        return "against full fine-tuning: not compared"
    gain, verdict = arms[of]["gain"], verdicts[0]
    nats = [verdict["estimate"][k] for k in ("value", "low", "high")]
    if not gain or None in nats:
        return f"{top} gives up: no interval ({verdict['why']})"
    gap, low, high = (100 * (results["allowed"] + value / gain) for value in nats)
    said = {"SUPPORTED": ": less than 5%", "REFUTED": ": more than 5%"}
    return (
        f"{top} gives up {gap:.1f}% [{low:.1f}%, {high:.1f}%] of the gain of {of} "
        f"on {results['n_test']} test rows"
        + said.get(verdict["outcome"], f": not decided at 5% ({verdict['why']})")
    )

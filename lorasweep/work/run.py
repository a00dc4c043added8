"""Train what is missing of a request, here or on a cluster, and answer."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lorasweep.config.catalogue import conf_dir
from lorasweep.errors import GaveUp, StoreError, check_installed
from lorasweep.launch import local
from lorasweep.launch.pool import Workers
from lorasweep.launch.process import Stopped
from lorasweep.launch.slurm.submit import Work, submit, updates_of
from lorasweep.launch.torch_trainer import Trainer
from lorasweep.launch.worker import check_world_size
from lorasweep.methods.registry import METHODS
from lorasweep.models.find import recipe_file_name, recipe_weights
from lorasweep.plan import detect
from lorasweep.plan.detect import hardware_of
from lorasweep.plan.planner import Plan, Planner, make_plan, summary
from lorasweep.spec.metric import metric_of
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import is_unpinned
from lorasweep.store import files, looks
from lorasweep.store.run_store import STATES, RunStore
from lorasweep.sweep.grid import Point, run_names
from lorasweep.sweep.request import Request, question
from lorasweep.tracking import provenance, wandb
from lorasweep.work import answer
from lorasweep.work.inputs import check_available, understood
from lorasweep.work.printed import Answer, Display, duration, notifier, table
from lorasweep.work.search import (
    all_points,
    check_search,
    finish,
    is_search,
    judged,
    prune,
    search_lines,
    table_of,
)

STOPPED = 130
"""Exit status after Ctrl-C."""
MAX_IDLE = 3
"""Follow-up jobs in a row without a saved update, after which no more jobs are submitted."""
CHANGED_CLAIMS = "the claims were changed after a first answer from these runs"
"""Why the verdicts of such a sweep are exploratory."""
BASIS = {"measured": "from finished runs", "assumed": "from an assumed speed"}
"""Basis of the expected time."""


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
    runs = table_of(request, store, [p for p in points if p.id in {*finished}])
    text = answer.judge(runs, asked, folder, as_json or searched)
    looks.note_look(path, answer.claims_hash(asked), asked["rounds"])
    if searched:
        return finish(request, store, points, json.loads(text), status)
    return Answer(json.loads(text) if as_json else None, text, status)


def within_limit(request: Request) -> Request:
    """Leave out the runs that need more than exec.max_gpus GPUs, and say how many."""
    parts, most = [within_limit(part) for part in request.parts], request.exec.max_gpus
    if most is None or not request.points:
        return dataclasses.replace(request, parts=parts)
    kept = Planner(hardware_of(request.hardware), request.exec).without_too_large(request.points)
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
    if request.hardware and (hardware := hardware_of(request.hardware)).has_speeds:
        Planner(hardware, request.exec).settings(request.points)
    check_available(request)
    answer.outlooks(request.points, request.sweep, request.scale)  # refuses what cannot be judged


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
                with Workers(store, request.exec.world_size) as workers:
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


def plan_lines(request: Request, plan: Plan) -> list[str]:
    """Return the plan as lines: a summary, arms, packs, and remarks."""
    values = summary(plan)
    runs, cost = values["runs"], values["cost"]
    name = request.sweep_name or "single run"
    if request.sweep_name and request.sweep:
        name = f"sweep {name}, scale {request.scale}"
    if plan.hardware.name != detect.NAME:
        name += f", on {plan.hardware.name}"
    states = ", ".join(f"{runs[s]} {s}" for s in STATES if s in runs)
    lines = [
        f"{name}: {runs['total']} runs ({states}); {runs['todo']} to do in {cost['packs']} packs "
        f"on {cost['workers']} worker(s) x {cost['threads']} thread(s), about "
        f"{duration(cost['hours'] * 3600)} ({BASIS[cost['basis']]}), {cost['flops']:.2g} FLOPs, "
        f"memory up to {cost['memory_gib']:.1f} GiB, checkpoints up to "
        f"{cost['checkpoint_gib']:.1f} GiB"
    ]
    arms = table(values["arms"], "arm", "rank", "model", "runs", "n_trainable")
    lines += [f"  {line}" for line in arms]
    lines += unpinned_lines(plan.points)
    if not plan.speeds and (trainer := plan.points[0].spec.trainer).command:
        program = shutil.which(word := trainer.command[0]) or f"{word} (which is not found here)"
        lines[0] = lines[0].partition(", about ")[0]
        lines.append(f"  time and memory of {program} are unknown before the first of these runs")
    if refused := ", ".join(request.refused):
        lines.append(f"  refused with this trainer, as they need more than final losses: {refused}")
    slow_bf16 = plan.hardware.fast_bf16 is False and request.cluster.name == "local"
    if slow_bf16 and any(p.spec.precision == "bf16" for p in plan.todo):
        fp32 = "precision=fp32 (with other run ids) is about 50 times as fast"
        lines.append(f"  this processor has no bf16 instructions: {fp32}")
    if request.sweep and request.sweep.replicate.seeds:
        second = request.sweep.replicate
        best = f"at the {second.n_lrs} best learning rates of each curve"
        lines.append(f"  then a second stage: seeds {second.seeds} {best}")
    return lines


def unpinned_lines(points: Sequence[Point]) -> list[str]:
    """Return a line for each model and data set whose content on the hub can change."""
    parts = {part.name: part for p in points for part in (p.spec.model, p.spec.dataset)}
    return [
        f"  {part.WHERE[:-1]} {part.name} ({part.location}) names no commit of the hub: the newest "
        f"one is taken and recorded with the results; pin it with {part.WHERE}revision=COMMIT"
        for part in parts.values()
        if is_unpinned(part)
    ]

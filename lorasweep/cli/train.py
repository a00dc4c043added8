"""Train the runs of a request, here or by jobs of a cluster, and return the answer.

A search of learning rates is trained the same way; its answer, and the folder of its best run, are
made at the end of this file.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasweep.cli import answer
from lorasweep.cli.answer import all_points, final_loss, is_search, judged, qualifying
from lorasweep.cli.finished_runs import write_adapter
from lorasweep.cli.plans import plan_lines, search_outlook_here, understood, unpinned_lines
from lorasweep.cli.printed import Answer, Display, duration, notifier, table
from lorasweep.config.preflight import check_available
from lorasweep.data import templates
from lorasweep.errors import GaveUp, LorasweepError, SpecError, StoreError, check_installed
from lorasweep.fleet.rows import shown
from lorasweep.launch import local
from lorasweep.launch.distributed import check_world_size
from lorasweep.launch.pack import END
from lorasweep.launch.process import Stopped
from lorasweep.launch.slurm.planning import hardware_of
from lorasweep.launch.slurm.submit import Outcome, cancel, submit, updates_of
from lorasweep.launch.trainer import Trainer
from lorasweep.plan import detect
from lorasweep.plan.budget import parse_budget
from lorasweep.plan.plan import make_plan
from lorasweep.plan.planner import Planner, place
from lorasweep.spec.metric import METRICS, metric_of
from lorasweep.store import checkpoint, files, folders, looks
from lorasweep.store.run_store import RunStore
from lorasweep.store.table import load_runs
from lorasweep.sweep.grid import Point, curve_key
from lorasweep.sweep.names import run_names
from lorasweep.sweep.replicates import lrs_around_optimum
from lorasweep.sweep.request import Request, question
from lorasweep.sweep.search import LOWEST, is_short
from lorasweep.tracking import wandb

STOPPED = 130
"""Exit status after Ctrl-C."""
ANSWER = "lorasweep.json"
"""File with the results and the answer in the folder of the best run of a search."""
MAX_IDLE = 3
"""Follow-up jobs in a row without a saved update, after which no more jobs are submitted."""
CHANGED_CLAIMS = "the claims were changed after a first answer from these runs"
"""Why the verdicts of such a sweep are exploratory."""


def run(
    request: Request,
    store: RunStore,
    trainer: Trainer | str | None = None,
    follow: dict[str, Any] | None = None,
) -> Answer:
    """Train the missing runs, judge and report; on a cluster, submit jobs and report later."""
    if request.sweep is not None and follow is None:  # not only after hours of training
        folder = Path(request.exec.reports_dir) / request.title
        files.check_writable(folder, "exec.reports_dir")
    points, status, sent = train(request, store, trainer, follow)
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
    if request.mirror == "wandb":
        wandb.mirror(points, store, request.sweep_name or "single")
    finished = [p.id for p in judged(request, points) if store.result(p.id)]
    if not finished:
        warn("no run has finished, so there is no answer yet")
        return Answer(status=status)
    if request.sweep_name is None:
        (rid,) = finished
        result = store.result(rid) or {}
        metric, measure = metric_of(result), ""
        value = metric.value(result)
        if value is not None:
            start = metric.value(result["curve"][0])
            measure = f", {metric.label} {value:.4f} (from {start:.4f})"
        text = f"run {rid} ({names[rid]}): {result['state']}{measure}. Folder: {store.folder(rid)}"
        return Answer({k: v for k, v in result.items() if k != "curve"}, text, status)
    asked, folder = question(request), Path(request.exec.reports_dir) / request.title
    searched, path = is_search(request), looks.path_of(store.root, request.title)
    if looks.first_claims(path) not in (None, answer.claims_hash(asked)):
        for claim in asked["claims"].values():
            earlier = claim.get("exploratory") or {}
            claim["exploratory"] = {request.scale: CHANGED_CLAIMS, **earlier}
    as_json = request.format == "json"
    text = answer.judge(load_runs(store.root, finished), asked, folder, as_json or searched)
    text = finish(request, store, points, text) if searched else text
    looks.note_look(path, answer.claims_hash(asked), asked["rounds"])
    return Answer(json.loads(text) if as_json else None, text, status)


def qualify(request: Request, store: RunStore, trainer: Trainer | str | None = None) -> Answer:
    """Train the runs that judge a sweep's tasks; return and save whether the tasks qualify."""
    if request.sweep is None or request.cluster.kind == "slurm":
        raise SpecError(
            "action=qualify judges the tasks of a sweep on this machine. Add +sweep=NAME and "
            "cluster=local."
        )
    path = Path(request.exec.reports_dir) / f"qualify-{request.title}.json"
    files.check_writable(path.parent, "exec.reports_dir")
    points, status, _ = train(request, store, trainer)
    if status == STOPPED:
        return Answer(status=STOPPED)
    finished = [p.id for p in points if store.result(p.id)]
    qualified, checks, lines = answer.qualify(load_runs(store.root, finished))
    content: dict[str, Any] = {"sweep": request.sweep_name, "scale": request.scale}
    content |= {"qualified": qualified, "checks": checks}
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())
    lines += [f"{g}: {'qualifies' if ok else 'DOES NOT QUALIFY'}" for g, ok in qualified.items()]
    return Answer(content, [*lines, f"saved: {path}"], int(not all(qualified.values())))


# ---------------------------------------------------------------- before training


def runs_of(request: Request, store: RunStore) -> list[Point]:
    """Return the runs of a sweep, or for action=qualify the runs that judge the tasks."""
    points = all_points(request, store)
    return qualifying(points) if request.action == "qualify" else points


def within_limit(request: Request) -> Request:
    """Leave out the runs that need more than exec.max_gpus GPUs, and say how many."""
    kept = Planner(hardware_of(request), request.exec).without_too_large(request.points)
    if len(kept) < len(request.points):
        notifier(request)(
            f"{len(request.points) - len(kept)} runs need more than "
            f"exec.max_gpus={request.exec.max_gpus} GPUs and are left out"
        )
    if request.points and not kept:
        raise SpecError(f"no run is left within exec.max_gpus={request.exec.max_gpus}.")
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
    answer.check_claims(request.sweep)


# ---------------------------------------------------------------- training


def train(
    request: Request,
    store: RunStore,
    trainer: Trainer | str | None = None,
    follow: dict[str, Any] | None = None,
) -> tuple[list[Point], int, Answer | None]:
    """Train the missing runs of a request here, or submit them as jobs of a cluster.

    Returns the runs, those of the second stage that are known included; the exit status: 0, 1 if
    runs failed or were killed, STOPPED; and while runs are in jobs of a cluster, the answer.

    `follow`: the task of a follow-up job.
    """
    store.prepare()
    notify, searched = notifier(request), is_search(request)
    lines = understood(request)  # also refuses rows
    if searched:
        check_search(request)
        lines += search_outlook_here(request, store)
    for line in lines:
        notify(line)
    points, sent = runs_of(request, store), None
    check(request)
    for _, outlook in answer.outlooks(request.points, request.sweep, request.scale):
        if outlook.warns and any(not store.result(p.id) for p in points):
            notify(outlook.line())
    if request.cluster.kind == "slurm":
        points, sent = _train_on_cluster(request, store, trainer, follow)
        if sent:
            return points, 0, sent
    else:
        try:
            points = _train_here(request, store, points, trainer)
        except (Stopped, KeyboardInterrupt):
            notifier(request, always=True)(
                "stopped; finished runs are kept, unfinished runs resume from their checkpoints "
                "when you run the command again"
            )
            return points, STOPPED, None
    states = store.states(p.id for p in points).values()
    return points, int(not {"failed", "interrupted"}.isdisjoint(states)), None


def _train_here(
    request: Request, store: RunStore, points: list[Point], trainer: Trainer | str | None
) -> list[Point]:
    """Train the missing runs on this machine, stage by stage; return the runs of all stages."""
    searched, notify = is_search(request), notifier(request)
    plan = make_plan(points, store, request.exec, detect.this_machine())
    lines = plan_lines(request, plan)
    with local.Workers(store, request.exec.world_size) as workers:
        while plan.todo:  # results of the first stage choose the second
            notify("\n".join(lines))
            with Display(plan.todo, request) as show:
                local.run_points(points, store, request.exec, show.event, trainer, plan, workers)
            if searched:
                prune(request, store, points)
            known, points = len(points), runs_of(request, store)
            if len(points) == known:
                break
            plan = make_plan(points, store, request.exec, plan.hardware)
            lines = plan_lines(request, plan)
            if request.members or searched:  # the first stage's plan has listed the arms
                lines = lines[:1]
    return points


def _train_on_cluster(
    request: Request, store: RunStore, trainer: Trainer | str | None, follow: dict[str, Any] | None
) -> tuple[list[Point], Answer | None]:
    """Submit the missing runs; return all runs, and while some are in jobs the answer.

    Raises GaveUp if the last rounds of jobs saved no update of any run.
    """
    notify, idle = notifier(request), 0
    for line in unpinned_lines(request.points):
        notify(line)
    if follow is not None:
        updates = updates_of(runs_of(request, store), store)
        idle = follow["idle"] + 1 if updates <= follow["updates"] else 0
        if idle >= MAX_IDLE:
            raise GaveUp(
                f"no run got further in {idle} rounds of jobs, so no more are submitted. "
                "See the causes with action=status."
            )
    named = trainer if isinstance(trainer, str) else None
    done = submit(request, store, lambda: runs_of(request, store), notify, named, idle)
    points = runs_of(request, store)
    if is_search(request):
        prune(request, store, points)
    sent = _submitted(request, store, done)
    if done.waiting:
        return points, sent
    for line in sent.as_text().splitlines():
        notify(line)
    return points, None


def _submitted(request: Request, store: RunStore, done: Outcome) -> Answer:
    """Return what was submitted, and what stays in the queue."""
    work, jobs = done.work, ", ".join(f"{n} job(s) as {number}" for number, n in done.sent.items())
    gone = f"{work.n_removed} queued run(s) that are no longer part of this command line"
    lines = (
        (jobs, f"submitted {done.n_submitted} runs: {jobs}; records and logs in {done.folder}"),
        (
            done.refused,
            f"Slurm did not accept all jobs: {done.refused}\n"
            "The rest is submitted when jobs have ended, or when you run the command again",
        ),
        (
            work.unknown,
            f"{work.unknown} runs may be in jobs of another cluster: run the command there. If "
            f"those jobs are gone, delete their folders in {store.root}/.slurm",
        ),
        (
            work.exhausted,
            f"{work.exhausted} runs were killed {request.exec.max_attempts} times and are not "
            "submitted again: see the causes with action=status, then raise exec.max_attempts",
        ),
        (
            work.n_removed,
            f"cancelled {gone}" if done.pruned else f"{gone}: prune=true cancels them",
        ),
        (
            done.waiting,
            f"{done.queued} runs queued, {work.running} running. Watch them with action=status; "
            "the same command answers when they have finished.",
        ),
    )
    values = {key: getattr(done, key) for key in ("queued", "pruned", "refused")}
    values |= {key: getattr(work, key) for key in ("running", "unknown", "exhausted")}
    values |= {"submitted": done.n_submitted, "removed": work.n_removed}
    values["jobs"] = [*done.sent, *filter(None, [done.follow])]
    return Answer(values, [line for said, line in lines if said])


def cancel_jobs(request: Request, store: RunStore) -> Answer:
    """Cancel the sweep's jobs on the cluster (Ctrl-C stops local runs)."""
    n_jobs, n_runs = cancel(request, store, notifier(request))
    text = (
        f"cancelled {n_jobs} job(s) with {n_runs} unfinished run(s); finished runs are kept, "
        "unfinished runs resume from their checkpoints when you run the sweep's command again"
    )
    return Answer({"jobs": n_jobs, "runs": n_runs}, text if n_jobs else "nothing to cancel")


# ---------------------------------------------------------------- a search of learning rates


def _used(request: Request, points: Sequence[Point], store: RunStore) -> dict[str, str]:
    """Return the budget that was given and the used amount, in words; empty without a budget."""
    budget = parse_budget(request.budget, request.points[0].spec.steps)
    if budget is None:
        return {}
    used = budget.used(points, store)
    words = f"{used:.3g} runs" if budget.unit == "runs" else duration(used)
    return {"given": budget.text, "used": words + " of GPUs" * (budget.unit == "gpuh")}


def prune(request: Request, store: RunStore, points: Sequence[Point]) -> None:
    """Delete states and weights that no later run and no export needs.

    Kept: the weights of the best run at each of the learning rates around the best one, of each arm
    and rank, for the best one may still change; and the final states of short runs until
    full runs have begun from them.
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
            curves.setdefault(curve_key(p), []).append(p)
    for mine in curves.values():
        by_lr = _by_lr(mine, store)
        means = {lr: sum(losses.values()) / len(losses) for lr, losses in by_lr.items()}
        near = lrs_around_optimum(means, request.sweep.search.n_lrs)
        kept = {min(by_lr[lr], key=by_lr[lr].__getitem__) for lr in near}
        for p in mine:
            if p not in kept:
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
    served = templates.with_template(spec.dataset, tokenizer)
    form = shown(spec.dataset, [], tokenizer)
    templates.check(spec.dataset, served, form["messages"], [], form["example"], "example")
    return served, form


def finish(request: Request, store: RunStore, points: Sequence[Point], results: str) -> str:
    """Return the answer in lines, or as JSON, and write the best run into request.out.

    `results`: the results of the analysis as JSON.
    """
    found = json.loads(results)
    prune(request, store, points)
    rates: dict[int | None, list[float]] = {}
    for p in judged(request, points):
        rates.setdefault(_rank(p), []).append(p.spec.lr)
    conclusion = conclude(request, found, max(map(min, rates.values()), default=math.inf))
    if used := _used(request, points, store):
        conclusion["budget"] = used
    if request.out and conclusion["method"] is None:
        conclusion["out"] = f"nothing is written to {request.out}"
    elif request.out:
        conclusion["out"] = _export(request, store, points, found, conclusion)
    if request.format == "json":
        return json.dumps({**found, "answer": conclusion})
    return "\n".join(_lines(request, found, conclusion))


def conclude(request: Request, results: Mapping[str, Any], lowest: float = 0.0) -> dict[str, Any]:
    """Return the setting to use and why, and what the runs have not decided.

    `lowest`: the learning rate down to which all arms had full runs.
    """
    arms = {arm["rank"]: arm for arm in results["arms"]}
    rank, spec, start = results["best_rank"], request.points[0].spec, results["start"]
    outcome = next((v["outcome"] for v in results["verdicts"]), "")
    methods = {_rank(p): p.spec.method.plain() for p in request.points}
    absent = [answer.arm_name(r) for r in methods if r not in arms]
    full, lora = (arms[r]["loss"] if r in arms else None for r in (None, rank))
    lost = 0.0  # share of full fine-tuning's gain that LoRA gives up, as measured
    if None not in (full, lora, start) and start > full:
        lost = (lora - full) / (start - full)
    chosen, why = arms.get(rank), "the smallest rank within 1% of the gain of the best one"
    if rank is None:
        why = "the only method that trains"
    elif None in arms and (
        outcome == "REFUTED" or (outcome != "SUPPORTED" and lost > results["allowed"])
    ):
        chosen, why = arms[None], f"LoRA gives up {100 * lost:.0f}% of the gain"
    lr = chosen and (chosen["best_lr"]["value"] or chosen["best_tried"])
    end, more, loss = LOWEST * request.sweep.search.wide, [], chosen and chosen["loss"]
    trains = lr and lr >= end
    if not trains or (None not in (start, loss) and loss >= start):
        why = f"no learning rate, tried from {lowest:.1e} on, lowers the loss on "
        why += f"{results['chosen_on']} and test rows"
        if not trains and lowest >= end:
            more = ["lower learning rates, which the budget did not allow"]
        chosen, lr = {"method": None, "rank": None}, None
    more += [f"{name}, of which no run of full length has finished" for name in absent]
    return {
        "method": chosen["method"],
        "rank": chosen["rank"],
        "layers": methods[chosen["rank"]]["layers"] if lr else None,
        "lr": lr,
        "steps": spec.steps,
        "batch_size": spec.batch_size,
        "why": why,
        "open": [*more, *answer.open_questions(dict(results))],
    }


def _lines(request: Request, results: Mapping[str, Any], c: Mapping[str, Any]) -> list[str]:
    """Return the answer: a table of the arms, the gap, the setting, and what is open."""
    metric = METRICS[request.points[0].spec.objective]
    losses = {"base": results["start"]} | {a["rank"]: a["loss"] for a in results["arms"]}
    shown = {k: None if v is None else f"{metric.loss(v):.4f}" for k, v in losses.items()}
    arms: list[dict[str, Any]] = [{"arm": "base", metric.label: shown["base"]}]
    for a in results["arms"]:
        best, notes = a["best_lr"], ", ".join(a["flags"])
        arms.append(
            {
                "arm": answer.arm_name(a["rank"]),
                "best learning rate": best["value"] or a["best_tried"],
                "interval": [best["low"], best["high"]],
                "good": a["good"],
                metric.label: shown[a["rank"]],
                "seconds": a["seconds"],
                "notes": notes if answer.trains(a) else "no learning rate trains",
            }
        )
    use = "the base as it is"
    if c["method"] is not None:
        use = answer.arm_name(c["rank"]) + (f" on {c['layers']}" if c["rank"] else "")
        use += f", learning rate {c['lr']:.1e}, {c['steps']} updates of {c['batch_size']} rows"
    use = "; ".join([f"use: {use} ({c['why']})", *filter(None, [c.get("out")])])
    used = ["used {used} of {given}".format(**c["budget"])] if "budget" in c else []
    last = "; ".join([f"open: {'; '.join(c['open']) or 'nothing'}", *used])
    return [*table(arms, *arms[-1]), gap_line(results), use, last]


def gap_line(results: Mapping[str, Any]) -> str:
    """Say what LoRA gives up at the highest rank, with the interval that decides the claim.

    It is wider than 95%, as the claim is judged several times.
    """
    arms, verdicts = {arm["rank"]: arm for arm in results["arms"]}, results["verdicts"]
    top = max((rank for rank in arms if rank), default=None)
    if top is None or not arms[top]["gap_percent"] or not verdicts:
        return "LoRA against full fine-tuning: not compared"
    gain, verdict = arms[None]["gain"], verdicts[0]
    nats = [verdict["estimate"][k] for k in ("value", "low", "high")]
    if not gain or None in nats:
        return f"LoRA at rank {top} gives up: no interval ({verdict['why']})"
    gap, low, high = (100 * (results["allowed"] + value / gain) for value in nats)
    said = {"SUPPORTED": ": less than 5%", "REFUTED": ": more than 5%"}
    return (
        f"LoRA at rank {top} gives up {gap:.1f}% [{low:.1f}%, {high:.1f}%] of full fine-tuning's "
        f"gain on {results['n_test']} test rows"
        + said.get(verdict["outcome"], f": not decided at 5% ({verdict['why']})")
    )


def _export(
    request: Request,
    store: RunStore,
    points: Sequence[Point],
    results: Mapping[str, Any],
    conclusion: Mapping[str, Any],
) -> str:
    """Write the weights of the best run; return a sentence that says where they are, or why not."""
    out, (served, form) = Path(request.out).expanduser(), _served(request)
    arm = next(a for a in results["arms"] if a["rank"] == conclusion["rank"])
    by_lr = _by_lr([p for p in judged(request, points) if _rank(p) == arm["rank"]], store)
    tried = arm["best_tried"] or conclusion["lr"]
    # of the seeds at the learning rate that the answer chose
    lr = min(by_lr, key=lambda lr: abs(math.log(lr / tried)))
    best = min(by_lr[lr], key=by_lr[lr].__getitem__)
    try:
        weights = checkpoint.load_weights(store.folder(best.id))
        if weights is None:
            raise StoreError(
                f"the weights of run {best.id} were not kept (another command trained it, several "
                "processes did, or the disk was nearly full): python -m lorasweep action=adapter "
                f"run={best.id} out=FOLDER"
            )
        with folders.replaced(out, ANSWER) as partial:
            commit = (store.result(best.id) or {}).get("base_commit")
            write_adapter(partial, best.spec, weights, commit, request.exec.models_dir)
            if served:
                templates.save(served, form["stop"], partial)
            content = json.dumps({**results, "answer": conclusion, "prompt_form": form}, indent=1)
            (partial / ANSWER).write_text(content)
    except LorasweepError as error:
        return f"not written to {request.out}: {error}"
    return f"written to {request.out} (learning rate {lr:g})"


def _rank(point: Point) -> int | None:
    """Return the rank of a LoRA run, None for full fine-tuning."""
    return getattr(point.spec.method, "rank", None)

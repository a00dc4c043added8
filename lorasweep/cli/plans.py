"""The actions that start no run: plan, matrices, rate, fetch, advise."""

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorasweep.advise import pages, rates
from lorasweep.advise.advice import answers, plain_of, totals
from lorasweep.advise.pages import render
from lorasweep.advise.read import EXPECTED, RowError, check_rows, read_customers
from lorasweep.data import sources
from lorasweep.errors import SpecError, unknown
from lorasweep.fleet.choice import counts, counts_line, outcome_of
from lorasweep.fleet.runs import planned
from lorasweep.launch.slurm.submit import difference
from lorasweep.plan.detect import Hardware, hardware_of
from lorasweep.plan.needs import TRAINING_SHARE, run_flops
from lorasweep.plan.planner import (
    MEMORY_ERROR,
    SPEED_ERROR,
    Kind,
    Plan,
    Planner,
    costs,
    make_plan,
    summary,
)
from lorasweep.store import files
from lorasweep.store.run_store import FINISHED, RunStore
from lorasweep.sweep.grid import Point, trained_by_set
from lorasweep.sweep.question import Replicates
from lorasweep.sweep.request import Request
from lorasweep.sweep.search import arm_key
from lorasweep.work import answer
from lorasweep.work.fleet import known
from lorasweep.work.inputs import check_tokenizer, understood
from lorasweep.work.printed import Answer, notifier, table
from lorasweep.work.run import plan_lines, unpinned_lines
from lorasweep.work.search import all_points, search_lines

COSTS = (
    *("name", "runs", "packs", "jobs", "gpus_a_run", "micro_batch", "memory_gib", "tokens"),
    *("flops", "tokens_s", "gpu_hours", "days", "cost_usd"),
)
"""Columns of the costs of sweeps on GPUs, by their keys in format=json."""
SMALLER = ("small", "tiny")
"""Scales whose standard deviation between seeds is used if a larger scale states none."""


def show(request: Request, store: RunStore) -> Answer:
    """Show the runs that would be trained and their cost; start none."""
    hardware = hardware_of(request.hardware)
    about: dict[str, Any] = {"scale": request.scale}
    about |= {"understood": understood(request)} if request.described else {}
    if request.hardware and hardware.has_speeds:
        return _on_gpus(request, store, hardware, about)
    for p in request.points:
        check_tokenizer(p.spec, request.exec)
    plan = make_plan(points := all_points(request, store), store, request.exec, hardware)
    queue, begun = difference(request, store, plan), {arm_key(p) for p in points}
    if later := [p for p in request.points if arm_key(p) not in begun]:
        plan = make_plan([*points, *later], store, request.exec, hardware)  # arms that yet wait
    outlooks = [o for _, o in answer.outlooks(request.points, request.sweep, request.scale)]
    found = {"sweep": request.sweep_name, **about, **summary(plan), **queue}
    found |= {"claims": [o.plain() for o in outlooks]} if outlooks else {}
    found |= {"refused": request.refused} if request.refused else {}
    if plan.points[0].spec.trainer.command and not plan.speeds:
        found["cost"] |= {"hours": None, "memory_gib": None, "basis": "unknown"}
    lines = [*about.get("understood", ()), *plan_lines(request, plan), *queue_lines(queue)]
    lines += search_lines(request)
    if request.members:
        found["fleet"], more = fleet_costs(request, store, plan)
        lines += more
    return Answer(found, [*lines, *(o.line() for o in outlooks)])


def matrices(request: Request, store: RunStore) -> Answer:
    """Show the matrices that each kind of run trains, by layer set."""
    kinds, lines = [], list[str]()
    columns = ("layer_set", "matrices", "shapes", "ranks", "trained", "weights")
    found = {(p.spec.model.name, p.spec.method.canonical): p.spec for p in request.points}
    for s in found.values():
        method, sets = s.method.plain(), trained_by_set(s.method, s.model)
        trained = s.method.n_trainable(s.model)
        names = {"model": s.model.name, "method": method}
        kinds.append({**names, "trained": trained, "layer_sets": sets})
        given = ", ".join(f"{k}={v}" for k, v in method.items() if k != "name")
        rows = [{**f, "shapes": ", ".join(f["shapes"])} for f in sets]
        rows.append({"layer_set": "total", "trained": trained, "weights": s.model.n_params})
        lines += [f"{s.method.name} on {s.model.name} ({given})", *table(rows, *columns), ""]
    return Answer({"sweep": request.sweep_name, "kinds": kinds}, lines[:-1])


def rate(request: Request, store: RunStore) -> Answer:
    """Predict one method's best learning rate from the other's; SpecError outside the scope."""
    (point,), known = request.points, (request.full_lr, request.lora_lr)
    spec, at = point.spec, request.at_steps or point.spec.steps
    if known.count(None) != 1 or (request.full_lr and (request.at_alpha or request.at_steps)):
        raise SpecError(
            "action=rate needs one of full_lr=LR, and lora_lr=LR with at_alpha=A and at_steps=N."
        )
    if "model" not in request.given or not ("steps" in request.given or request.at_steps):
        raise SpecError("action=rate needs model=MODEL, and steps=N, the number of updates.")
    if "steps" in request.given and at != spec.steps:
        raise SpecError(
            f"at_steps={at}, steps={spec.steps}: full fine-tuning's best learning rate, too, "
            "changes with the updates, and the law does not say how. Give both the same number."
        )
    found = rates.predict(dataclasses.replace(spec, steps=at), *known, request.at_alpha)
    return Answer(found, rates.lines(found))


def fetch(request: Request, store: RunStore) -> Answer:
    """Download the weights and rows of a request's runs from the hub.

    Raises ModelError, DataError: a download fails.
    """
    from lorasweep.models import find

    notify, lines = notifier(request), list[str]()
    specs = [p.spec for part in request.parts or [request] for p in part.points]
    for model in {s.model.name: s.model for s in specs if s.model.source == "hub"}.values():
        notify(f"model {model.name}: {model.location} ...")
        folder, size = find.fetch(model)
        lines.append(f"model {model.name}: {size / 1e9:.1f} GB in {folder}")
    for data in {s.dataset.name: s.dataset for s in specs if s.dataset.source == "hub"}.values():
        notify(f"dataset {data.name}: {data.location} ...")
        lines.append(f"dataset {data.name}: {sources.fetch(data):,} rows")
    return Answer(text=lines or "nothing of these runs comes from the hub")


def queue_lines(difference: dict[str, Any]) -> list[str]:
    """Return lines with the queue's changes by a submission; empty without a cluster."""
    queue = difference.get("queue", {})
    keys = ("jobs", "nodes", "gpus", "cpus", "mem_gib", "time_min")
    jobs = table(queue.get("jobs", ()), *keys)
    lines = [f"  to submit: {queue['to_submit']} runs, in jobs with, per node:"] if jobs else []
    lines += [f"    {line}" for line in jobs]
    said = {"queued": "{} runs are already queued", "removed": "{}"}
    said["unknown"] = "queued runs are unknown: {}"
    return [*lines, *(f"  {text.format(queue[k])}" for k, text in said.items() if queue.get(k))]


def fleet_costs(request: Request, store: RunStore, plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """Return customers, unfinished runs, packs and hours by base: JSON values, and lines."""
    bases, rows = dict[str, list[Point]](), list[dict[str, Any]]()
    for p in plan.todo:
        bases.setdefault(p.spec.model.canonical, []).append(p)
    for points in bases.values():
        ids, flops = {p.id for p in points}, sum(run_flops(p.spec) for p in points)
        row: dict[str, Any] = {"base": points[0].spec.model.name}
        row |= {"customers": len({p.arm for p in points}), "runs": len(points)}
        row["packs"] = sum(pack.points[0].id in ids for pack in plan.packs)
        rows.append({**row, "hours": plan.hours * flops / plan.flops})
    by_outcome = counts([outcome_of(m, store) for m in planned(request.members, request.points)])
    lines = table(rows, "base", "customers", "runs", "packs", "hours")
    value = {"customers": by_outcome, "bases": rows}
    return value, ["", counts_line(by_outcome), *(lines or ["nothing is left to train"])]


def _on_gpus(
    request: Request, store: RunStore, hardware: Hardware, about: dict[str, Any]
) -> Answer:
    """Show the cost of sweeps on GPUs, a row for each, without looking at this machine."""
    planner, parts, claims = Planner(hardware, request.exec), request.parts or [request], []
    sweeps: list[dict[str, Any]] = []
    total: dict[str, Kind] = {}  # runs that sweeps share count once
    for part in parts:
        states = store.states(p.id for p in part.points)
        missing = [p for p in part.points if states[p.id] not in FINISHED]
        second = part.sweep.replicate if part.sweep else Replicates()
        runs = planner.forecast(missing, second)
        total |= runs
        row = costs(part.sweep_name or "run", runs, hardware, request.cluster.work_max)
        outlooks = answer.outlooks(part.points, part.sweep, request.scale, *SMALLER)
        sweeps.append({**row, "claims": [{**o.plain(), "spread_from": s} for s, o in outlooks]})
        claims += [
            f"{part.sweep_name}: {o.line().strip()}"
            + f" (standard deviation at scale {s})" * (o.can_decide is not None)
            for s, o in outlooks
        ]
    names = ("name", "gpus", "price_per_gpu_h")
    found: dict[str, Any] = {
        "hardware": {name: getattr(hardware, name) for name in names},
        "error": {"memory": MEMORY_ERROR, "speed": SPEED_ERROR},
        **about,
        "sweeps": sweeps,
        "total": costs("total", total, hardware, request.cluster.work_max),
    }
    costly, queue = list[str](), dict[str, Any]()
    if request.points and (request.members or request.cluster.kind == "slurm"):
        with suppress(SpecError):  # the table says which runs fit nowhere, and why
            plan = make_plan(request.points, store, request.exec, hardware)
            if request.members:
                found["fleet"], costly = fleet_costs(request, store, plan)
            if request.cluster.kind == "slurm":
                queue = difference(request, store, plan)
    shown = [*sweeps, found["total"]] if len(sweeps) > 1 else sweeps  # one has no total
    text = render(
        "forecast.txt",
        name=request.sweep_name or "run",
        scale=request.scale,
        hardware=hardware,
        usd=hardware.price_per_gpu_h,
        table="\n".join(table(shown, *COSTS)),
        total=found["total"],
        unpinned=unpinned_lines([p for part in parts for p in part.points]),
        memory_error=f"{MEMORY_ERROR:.0%}",
        speed_error=f"{SPEED_ERROR:.0%}",
        training_share=TRAINING_SHARE,
    )
    lines = [*about.get("understood", ()), text.rstrip(), *claims, *queue_lines(queue)]
    return Answer(found | queue, [*lines, *search_lines(request), *costly])


def advise(request: Request, store: RunStore) -> Answer:
    """Advise customers and write the page; the status is 1 if a row has an error."""
    if bool(request.customers) == bool(request.customer):
        raise SpecError(
            "action=advise needs customers=FILE (CSV or YAML), or one customer by columns: "
            "+customer.model=llama-3.1-8b +customer.task=sft +customer.examples=50000. "
            + ("Give one of the two." if request.customers else EXPECTED)
        )
    if request.customers:
        rows = read_customers(Path(request.customers))
    else:
        rows = check_rows([("customer", {"name": "customer", **request.customer})])
    found = answers(rows, known(request))
    if request.why:
        mine = next((a for a in found if a.name == request.why), None)
        if mine is None:
            names = unknown("customer", request.why, (a.name for a in found))
            raise SpecError(f"{names} Write a name with blanks as 'why=\"Big Co\"'.")
        if isinstance(mine, RowError):
            raise SpecError(mine.error)
        reasons = [{**vars(r), "sure": r.sure.name.lower()} for r in mine.reasons.values()]
        return Answer(reasons, pages.render("reasons.txt", a=mine).rstrip())
    title = Path(request.customers).stem if request.customers else "customer"
    path = Path(request.out or Path(request.exec.reports_dir) / f"advice-{title}.html")
    if path.suffix != ".html":
        raise SpecError(f"out={path}: expected a file that ends in .html.")
    content = answer.own_file(path, pages.html(found, title))
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, content)
    errors = [f"error in {a.error}" for a in found if isinstance(a, RowError)]
    summary = pages.render("summary.txt", t=totals(found))
    lines = table([dict(zip(pages.HEAD, pages.cells(a))) for a in found], *pages.HEAD)
    lines += ["", *errors, *summary.splitlines(), pages.BASIS]
    lines += [f"page: {path}. Reasons, and the command that tests the advice: why=NAME"]
    return Answer([plain_of(a) for a in found], lines, int(bool(errors)))

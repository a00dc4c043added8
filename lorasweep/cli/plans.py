"""What a command would train and cost, and what was understood of the user's files.

The actions plan, matrices and fetch: none starts a run.
"""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from lorasweep.advise import rates
from lorasweep.advise.pages import render
from lorasweep.cli import answer
from lorasweep.cli.answer import all_points
from lorasweep.cli.printed import Answer, duration, notifier, table
from lorasweep.data import load, messages, rewards, sources, text
from lorasweep.data.synthetic.generators import generator
from lorasweep.errors import DataError, LorasweepError, ModelError, SpecError
from lorasweep.fleet.choice import counts, counts_line, outcome_of
from lorasweep.fleet.runs import planned
from lorasweep.launch.slurm.submit import difference, hardware_of
from lorasweep.launch.trainer import TOKENS
from lorasweep.models.describe import config_at
from lorasweep.plan import detect
from lorasweep.plan.detect import Hardware
from lorasweep.plan.load import TRAINING_SHARE, run_flops
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
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.execution import Exec
from lorasweep.spec.metric import METRICS
from lorasweep.spec.run import RunSpec, is_unpinned
from lorasweep.store.run_store import FINAL, STATES, RunStore
from lorasweep.sweep.grid import Point, trained_by_set
from lorasweep.sweep.question import Replicates
from lorasweep.sweep.request import Request
from lorasweep.sweep.search import MIN_SEEDS, arm_key

BASIS = {"measured": "from finished runs", "assumed": "from an assumed speed"}
"""Basis of the expected time."""
COSTS = (
    *("name", "runs", "packs", "jobs", "gpus_a_run", "micro_batch", "memory_gib", "tokens"),
    *("flops", "tokens_s", "gpu_hours", "days", "cost_usd"),
)
"""Columns of the costs of sweeps on GPUs, by their keys in format=json."""
SMALLER = ("small", "tiny")
"""Scales whose standard deviation between seeds is used if a larger scale states none."""
EXAMPLE = 300
"""Characters of an example."""


def show(request: Request, store: RunStore) -> Answer:
    """Show the runs that would be trained and their cost; start none."""
    hardware = hardware_of(request)
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


def check_available(request: Request) -> None:
    """Check that the weights and data of all runs are on this machine, and fit together.

    The first run that needs a file of the hub downloads it. On a cluster a missing file is an
    error, because jobs would hold GPUs during the download.

    Raises:
        ModelError, DataError: weights or data are missing; the message says how to get them.
        SpecError: a data set does not fit the model's vocabulary or tokenizer.
    """
    from lorasweep.models import find

    specs, exec_ = [p.spec for p in request.points], request.exec
    fetched, reads_text = request.cluster.kind == "slurm", {}
    for one in {s.model.name: s for s in specs}.values():
        check_tokenizer(one, exec_)
        model = one.model
        reads_text[model.name] = find.check_available(model, exec_.models_dir, fetched)
    for spec in {(s.dataset.name, s.objective): s for s in specs}.values():
        if METRICS[spec.objective].higher_is_better:
            rewards.check_available(spec.dataset)
        if not exec_.skip_broken_data:  # else bad data fails only its own runs
            load.check_available(spec.dataset, exec_.data_dir)
    for spec in {(s.model.name, s.dataset.name): s for s in specs}.values():
        is_text, model = spec.dataset.source != "synthetic", spec.model
        vocab = None if is_text else generator(spec.dataset.location).vocab
        if (vocab or 0) > model.vocab_size or (vocab is None and not reads_text[model.name]):
            few = f"only {model.vocab_size} of {vocab} symbols"
            raise SpecError(
                f"model {model.name!r} has {few if vocab else 'no tokenizer'} for dataset "
                f"{spec.dataset.name!r}. Choose a model made for it (conf/model), or put the "
                "tokenizer's files beside the weights."
            )


def check_tokenizer(run: RunSpec, exec_: Exec) -> None:
    """Raise SpecError if the run's program is TRL's, and its base is here without a tokenizer."""
    from lorasweep.models import find

    # TRL loads the tokenizer, also for rows of token ids
    trl = any(Path(w).name == "trl" or "trl/scripts/" in w for w in run.trainer.command)
    with suppress(ModelError):  # not here: reported before training
        if trl and not find.check_available(run.model, exec_.models_dir):
            raise SpecError(
                f"model {run.model.name!r} has no tokenizer, and trainer={run.trainer.name} (TRL) "
                "loads one. Put the tokenizer's files beside the weights, or use trainer=hf."
            )


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


# ---------------------------------------------------------------- here, or on given hardware


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


def search_lines(request: Request) -> list[str]:
    """Say what a search takes, if the sweep is one."""
    if request.sweep is None or request.sweep.search is None:
        return []
    how, n, steps = request.sweep.search, len(request.points), request.points[0].spec.steps
    known = next((p for p in request.points if p.spec.method.name == "lora"), request.points[0])
    lr = answer.start_of(known).spec.lr
    n_law = sum(p != known and bool(rates.law(p.spec, known.spec, lr)) for p in request.points)
    wide = how.n_full + (how.n_short - how.n_lrs) / how.prefix  # n_lrs short runs go on
    first = n_law * how.n_lrs + (n - n_law) * wide
    short = f"short runs of {how.short_steps(steps)} updates find the range, " * (how.prefix > 1)
    return [
        f"search of {n} arm(s): {short}runs of {steps} updates judge: about {first:.0f} of full "
        f"length, and {n * how.n_lrs} with each of up to {how.seeds} fresh seeds, of which an "
        f"answer needs {MIN_SEEDS - 1}"
    ]


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


# ---------------------------------------------------------------- on GPUs with a data sheet


def _on_gpus(
    request: Request, store: RunStore, hardware: Hardware, about: dict[str, Any]
) -> Answer:
    """Show the cost of sweeps on GPUs, a row for each, without looking at this machine."""
    planner, parts, claims = Planner(hardware, request.exec), request.parts or [request], []
    sweeps: list[dict[str, Any]] = []
    total: dict[str, Kind] = {}  # runs that sweeps share count once
    for part in parts:
        states = store.states(p.id for p in part.points)
        missing = [p for p in part.points if states[p.id] not in FINAL]
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


# ---------------------------------------------------------------- what was understood


def understood(request: Request) -> list[str]:
    """Describe the models and data sets that no configuration file describes.

    A line for each such model; for each data set and base a line, and a rendered example.

    Raises DataError if max_length leaves out or cuts more than half of the training rows.
    """
    from lorasweep.models import find

    exec_, mine, found = request.exec, {*request.described}, list[str]()
    specs = [p.spec for p in request.points]
    for m in {s.model.name: s.model for s in specs if s.model.name in mine}.values():
        path = find.cached_config(m) if m.source == "hub" else find.pinned_path(m, exec_.models_dir)
        found.append(
            f"model {m.name}: {config_at(m, path).model_type}, {m.n_params / 1e6:,.2f}M "
            f"parameters, {m.n_layers} layers, {m.weights_dtype}, context {m.context_length}"
        )
    on_nodes = request.action == "plan" or request.cluster.kind == "slurm"
    for data, base in dict.fromkeys((s.dataset, s.model) for s in specs if s.dataset.name in mine):
        from lorasweep.models.load import tokenizer_of  # only here: it imports torch

        tokenizer = None
        with suppress(LorasweepError, OSError, ValueError):
            tokenizer = tokenizer_of(base, exec_.models_dir, fetched=on_nodes)
        found += _data_lines(data, base.name, tokenizer, exec_)
    return list(dict.fromkeys(found))


def _data_lines(spec: DatasetSpec, base: str, tokenizer: Any, exec_: Exec) -> Iterator[str]:
    train, _ = load.sources_of(spec, exec_.data_dir)
    where, row = next(train.rows(), ("", None))
    if row is None:
        raise DataError(f"dataset {spec.name!r}: no row is left for training. Hold fewer out.")
    columns = messages.columns(spec)
    read = (*columns, messages.TOOLS) if spec.format == "messages" else columns
    others = ", ".join(str(name) for name in row if name not in read)
    pair = (spec.prompt_field, spec.completion_field)
    used = columns if spec.format in messages.LISTS else pair
    # all rows of the files, also those that are left out of training and held-out rows
    whole = dataclasses.replace(spec, holdout=0, held_out_by="")
    of_files = load.sources_of(whole, exec_.data_dir)
    given = chain(*(s.rows() for s in of_files[: 1 + (spec.test_split != spec.train_split)]))
    kinds = sources.each(given, lambda row, where: messages.read(spec, row, where).kinds)
    counted = messages.rows_line(Counter(chain.from_iterable(kinds)))
    about = (
        f"data {spec.name}: {spec.source}, {spec.format}, columns {' -> '.join(used)}"
        f"{f' (not read: {others})' if others else ''}"
    )
    if tokenizer is None:
        yield f"{about}; {counted}; tokens are not counted: no tokenizer of {base} is here"
        return
    kept = Path(exec_.runs_dir, TOKENS)
    data = load.load(spec, exec_.data_dir, tokenizer, str(kept) if kept.is_dir() else "")
    n_train = data.n_train or 0
    tokens = sum(len(e.tokens) for e in data.train(0, 0, n_train)) / n_train
    yield (
        f"{about}, {n_train:,} training, {len(data.validation):,} validation and "
        f"{len(data.test):,} test rows, {tokens:.0f} tokens a row; {counted}"
    )
    if warning := text.check_fit(spec, data.fits, "dataset.max_length="):
        yield f"warning ({base}): {warning}"
    pieces = text.rendered(spec, row, where, tokenizer)
    shown = "".join(f"[[{piece}]]" if in_loss else piece for piece, in_loss in pieces)
    shown = shown.replace("\n", "\\n")
    if len(shown) > EXAMPLE:
        shown = f"{shown[: EXAMPLE // 2]} ... {shown[-EXAMPLE // 2 :]}"
    yield f"example, [[in the loss]]: {shown}"

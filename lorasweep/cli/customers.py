"""The actions on customers: advise, measure, fleet, verify_served."""

import dataclasses
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lorasweep.advise import pages, rules
from lorasweep.advise.advice import answers, plain_of, totals
from lorasweep.advise.read import EXPECTED, Customer, RowError, check_rows, read_customers
from lorasweep.advise.rules import APART, INFORMATION, MOST_RATES, Known
from lorasweep.cli import answer
from lorasweep.cli.answer import all_points
from lorasweep.cli.plans import check_available, understood
from lorasweep.cli.printed import Answer, Display, notifier, table
from lorasweep.cli.runs import STOPPED, train, write_adapter
from lorasweep.config import catalogue
from lorasweep.data import column_names, sources
from lorasweep.data.examples import Example
from lorasweep.errors import LorasweepError, SpecError, TrainingError, check_installed, unknown
from lorasweep.fleet import adapters, runs, score, serving
from lorasweep.fleet.choice import outcome_of, with_further
from lorasweep.fleet.runs import Member
from lorasweep.fleet.serving import Server, problems
from lorasweep.launch import local
from lorasweep.launch.slurm import queue as slurm
from lorasweep.launch.slurm.submit import hardware_of
from lorasweep.launch.trainer import TorchTrainer, Trainer
from lorasweep.spec.dataset import FILES
from lorasweep.spec.run import RunSpec
from lorasweep.store import checkpoint, files, folders
from lorasweep.store.run_store import FINAL, RunStore
from lorasweep.sweep.grid import Point, around
from lorasweep.sweep.request import Request

COMMON_ROWS, OWN_ROWS, TOKENS = 8, 2, 5
"""Rows that all adapters of a base are asked, further rows of each customer, and answer tokens of a
row: 50 tokens an adapter, so 50 requests to vLLM for it, and 50 for its base."""
FITS, REFUSED, MISSING, NONE = "folder is right", "folder refused", "missing", "no adapter"
SILENT = "no answer"
SERVED_COLUMNS = ("name", "verdict", "exact", "change", "distance", "bound", "factor", "notes")


def known(request: Request) -> Known:
    """Return the inputs of the adviser's rules: models, machines, kept results, measured data."""
    own = [Path(folder) for folder in request.folders]
    return Known(
        models=catalogue.models(own),
        machines=catalogue.machines(own),
        kept=rules.read_kept(answer.KEPT, catalogue.widths(own)),
        hardware=hardware_of(request) if request.hardware else None,
        information=rules.read_information([Path(request.exec.reports_dir), answer.KEPT]),
    )


# ---------------------------------------------------------------- action=advise


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


# ---------------------------------------------------------------- action=measure

CODES = {"as_is": "under the base model", "prequential": "online, during training"}
HELD_OUT, CURVE = 32, 8
"""Held-out rows in the last evaluation and in earlier ones: few, as only training is measured."""


def _run_to_measure(request: Request) -> RunSpec:
    """Return the request's run with few held-out rows; its training loss is the code length.

    Raises:
        SpecError: nothing can be measured with the settings of the request.
    """
    spec, dataset = request.points[0].spec, request.points[0].spec.dataset
    if not 1 <= request.rates <= MOST_RATES or request.cluster.kind == "slurm":
        raise SpecError(
            f"rates={request.rates} cluster={request.cluster.kind}: expected 1 to {MOST_RATES} "
            "learning rates, and cluster=local (in a job: srun python -m ...)."
        )
    if spec.objective != "sft":
        raise SpecError(f"objective={spec.objective}: a reward has one bit. Leave objective out.")
    if request.data:
        named = ("format", "prompt_field", "completion_field")
        stated = {n: getattr(dataset, n) for n in named if f"dataset.{n}" in request.given}
        dataset = column_names.dataset_of(request.data, named=stated)
    elif dataset.name in request.described:  # all rows are measured, as with data=FILE
        dataset = dataclasses.replace(dataset, holdout=0, held_out_by="")
    n_test = min(dataset.n_test, HELD_OUT)
    few: dict[str, Any] = dict.fromkeys(("n_retain", "n_validation"), 0)
    few |= {"n_test": n_test, "n_test_curve": min(dataset.n_test_curve, n_test, CURVE)}
    return dataclasses.replace(spec, dataset=dataclasses.replace(dataset, **few))


def measure(request: Request, store: RunStore) -> Answer:
    """Measure the information in a data set, and save it for action=advise.

    It is a code length, the summed log-loss of a first pass, of two models. One is the base. The
    other is the model in training, which codes each batch just before the update on it (a
    prequential code, Dawid 1984). So this code length is the sum of the recorded training losses.

    Raises:
        TrainingError: a run failed, or all diverged.
    """
    from lorasweep.train.objectives.sft import first_pass

    folder, notify = Path(request.exec.reports_dir) / INFORMATION, notifier(request)
    files.check_writable(folder, "exec.reports_dir")
    spec = _run_to_measure(request)
    one = dataclasses.replace(request, points=[Point(spec.method.name, spec)])
    check_available(one)
    for line in understood(one):  # also refuses rows
        notify(line)
    store.prepare()
    trainer, dataset = TorchTrainer(), spec.dataset
    data = trainer.data(spec, request.exec)
    if data.n_train is not None:
        if data.n_train < spec.batch_size:
            raise SpecError(
                f"batch_size={spec.batch_size}: {dataset.name} has {data.n_train} rows."
            )
        most = data.n_train // spec.batch_size  # one pass over the rows
        spec = dataclasses.replace(spec, steps=min(spec.steps, most))
    rates = around(spec.lr, request.rates, APART)
    points = [Point(spec.method.name, dataclasses.replace(spec, lr=lr)) for lr in rates]
    local.run_points(points, store, request.exec, Display(points, request).event, trainer)
    base = trainer.base(spec, request.exec)
    at_once = request.exec.micro_batch_size or 4  # few, as logits take much memory
    losses = first_pass(spec, base, trainer.data(spec, request.exec, base), at_once)
    codes = []  # run, nats of each batch
    for run in (p.spec for p in points):
        result = store.result(run.id)
        if result is None:
            raise TrainingError(f"run {run.id} failed: {store.failure(run.id)}.")
        if result["state"] == "done":
            by_step = {record["step"]: record["train_nll"] for record in store.records(run.id)}
            codes.append((run, [by_step[k] * batch.tokens for k, batch in enumerate(losses, 1)]))
    if not codes:
        raise TrainingError(f"all {len(points)} runs diverged. Set lr below {rates[0]:g}.")
    shortest, nats = min(codes, key=lambda code: sum(code[1]))
    rows, tokens = spec.steps * spec.batch_size, sum(b.tokens for b in losses)
    all_tokens = None  # endless generated data
    if data.n_train is not None:
        all_tokens = sum(int(r.loss.sum()) for r in data.train(spec.seed, 0, data.n_train))
    left = None if all_tokens is None else all_tokens - tokens
    as_is = [b.nats for b in losses]
    whole = answer.code_length(as_is, nats, [b.tokens for b in losses], left)
    lengths, shown = dict[str, Any](), list[dict[str, Any]]()
    # the shortest code also has to name the learning rate
    which = (0.0, math.log(len(points)))
    for key, coded, extra, ends in zip(CODES, (as_is, nats), which, whole, strict=True):
        bits = (sum(coded) + extra) / math.log(2)
        total = {k: None if v is None else (v + extra) / math.log(2) for k, v in ends.items()}
        each = {"per_token": bits / tokens, "per_example": bits / rows, "measured": bits}
        lengths[key] = {"bits": {**each, "all": total}}
        text = None if total["value"] is None else "{value:,.0f} [{low:,.0f}, {high:,.0f}]"
        more = {"measured": f"{bits:,.0f}", "all rows [95%]": text and text.format(**total)}
        shown.append({"bits": CODES[key], **each, **more})
    rows_sha256 = None  # set if the rows are a whole file
    if dataset.source in FILES and dataset.n_train is None:
        place = sources.find_file(dataset, dataset.train_split, request.exec.data_dir)
        rows_sha256 = place[1][: column_names.DIGITS]
    settings = {key: getattr(spec, key) for key in ("batch_size", "precision")}
    found = {
        "model": spec.model.name,
        "dataset": dataset.name,
        "rows": {"measured": rows, "all": data.n_train},
        "loss_tokens": {"measured": tokens, "all": all_tokens},
        **lengths,
        "settings": {"method": spec.method.plain(), **settings, "lr": shortest.lr},
        "runs": [{"run": run.id, "lr": run.lr, "nats": sum(code)} for run, code in codes],
        "diverged": len(points) - len(codes),
        "rows_sha256": rows_sha256,
    }
    path = folder / f"{dataset.name}-{spec.model.name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, json.dumps(found, indent=1).encode())
    columns = ("bits", "per_token", "per_example", "measured", "all rows [95%]")
    words = {"table": "\n".join(table(shown, *columns)), "ln2": math.log(2), "path": path}
    return Answer(found, pages.render("measured.txt", found=found, **words).rstrip())


# ---------------------------------------------------------------- action=fleet


def fleet(request: Request, store: RunStore, trainer: Trainer | str | None = None) -> Answer:
    """Train and export an adapter for each customer of a request that `plan_fleet` made.

    The status is 1 if a customer could not be planned or got no adapter, unless its runs are in
    jobs.
    """
    from lorasweep.models import load

    points, status, sent = request.points, 0, None
    if points:
        points, status, sent = train(request, store, trainer)
    if status == STOPPED:
        return Answer(status=STOPPED)
    outcomes = [outcome_of(m, store) for m in runs.planned(request.members, points)]
    waiting = 0  # customers whose unfinished runs are all in jobs of a cluster
    if request.cluster.kind == "slurm":
        there = slurm.look(store.root).covered().keys()
        over = (*FINAL, "running")
        unfinished = [[i for i, s in o.states.items() if s not in over] for o in outcomes if o.open]
        waiting = sum(there >= set(ids) for ids in unfinished)
    own, asked = TorchTrainer(), [o for o in outcomes if o.spec and o.member.rows.held_out]
    for o in sorted(asked, key=lambda o: o.spec.model.name):  # each base is loaded once
        o.result["score"] = score.count(o.spec, request, own)
    folder, title = Path(request.out), Path(request.customers).stem
    tokenizer_of = cache(lambda model: load.tokenizer_of(model, request.exec.models_dir))
    profile = catalogue.profiles([Path(f) for f in request.folders])[request.serve]()
    outcomes = adapters.export(outcomes, store, folder, title, write_adapter, tokenizer_of, profile)
    chosen = [Point(o.member.folder, o.spec) for o in outcomes if o.spec]
    facts, head = [o.facts() for o in outcomes], adapters.HEAD
    rows = [dict(zip(head, adapters.cells(p))) for p in facts]
    for row, m in zip(rows, (o.member for o in outcomes)):
        if m.problem:  # printed before training
            row["notes"] = f"{m.where}: see above"
    lines = [*([sent.as_text()] if sent else []), *table(rows, *head)]
    lines += ["", *adapters.summary_lines(outcomes)]
    lines += [f"adapters, cards and the page: {folder / adapters.PAGE}"]
    value = sent.plain() if sent else facts
    return Answer(value, lines, int(len(chosen) + waiting < len(outcomes)))


def plan_fleet(request: Request) -> Request:
    """Return the request for the runs of a table's customers; print the problems of rows.

    With action=fleet, folders that will be written are checked first, and the licenses of the bases
    are added. A folder that cannot be written is the problem of its customer alone.

    Raises:
        SpecError: a fleet cannot use the settings, or the table cannot be read.
        LorasweepError: the fleet's own folder cannot be written.
    """
    from lorasweep.models import find, load

    check_installed("jinja2", f"action={request.action} with a table of customers")
    if request.members:  # planned before; a follow-up job does not read the table again
        return request
    if request.exec.world_size > 1:
        raise SpecError("a fleet trains each pack in one process. Leave exec.world_size out.")
    customers = read_customers(Path(request.customers))
    profiles = catalogue.profiles([Path(folder) for folder in request.folders])
    name = "fleet-" + re.sub(r"[^\w.-]+", "_", Path(request.customers).stem)
    folder = Path(request.out or Path(request.exec.reports_dir) / name).expanduser().absolute()
    request = dataclasses.replace(request, out=str(folder))
    reading, basis = runs.rules_of(request), known(request)
    if reading.serve not in profiles:
        raise SpecError(unknown("serve", reading.serve, profiles))
    dirs, training = request.exec.models_dir, request.action == "fleet"
    fetched = request.cluster.kind == "slurm" and request.action != "fetch"
    tokenizer_of = cache(lambda model: load.tokenizer_of(model, dirs, fetched))
    profile, data_dir = profiles[reading.serve](), [os.getcwd(), *request.exec.data_dir]
    members = runs.build_runs(customers, basis, request, reading, tokenizer_of, profile)
    exec_ = dataclasses.replace(
        request.exec, data_dir=data_dir, keep_weights=True, skip_broken_data=True
    )
    if training:
        data = {c.data for c in customers if isinstance(c, Customer) and c.data}
        inputs = {request.customers, *filter(os.path.exists, data)}
        points = [p for m in members for p in m.points]
        models = {p.spec.model for p in points}
        folders.check(folder, runs.RULES, exec_, models, inputs)
        store, license_of = RunStore(exec_.runs_dir), cache(find.license_of)
        every = with_further(points, store, go_on="rates" not in request.given)
        unfinished = {p.arm for p in every if not store.result(p.id)}
        for k, m in enumerate(members):
            try:
                if m.folder in unfinished:  # else it is checked only if it is written
                    folders.check(folder / m.folder, adapters.FACTS, exec_, models, inputs)
                found = license_of(m.points[0].spec.model, tuple(dirs)) if m.points else {}
                members[k] = dataclasses.replace(m, license=found)
            except LorasweepError as error:
                members[k] = Member(m.where, m.name, m.folder, f"{m.where}: {error}")
    notify = notifier(request, always=True)
    for m in members:
        if m.problem:
            notify(f"error in {pages.printable(m.problem)}")
        elif m.rows.warning:
            notify(f"{pages.printable(m.name)}: {m.rows.warning}")
    left_out = Counter(why for m in members if (why := m.served.get("left_out")))
    for why, count in left_out.items():
        of = f"{count} of {len(members)} customers"
        notify(f"serve={reading.serve}: no adapter of the unembedding for {of}: {why}")
    if left_out and "method.layers" in request.given:
        raise SpecError(
            f"method.layers={reading.layers} with serve={reading.serve}: the unembedding is left "
            "out. Add method.layers=attention+mlp, or leave method.layers out, or add serve=peft."
        )
    if training:
        with folders.replaced(folder, runs.RULES, whole=False) as partial:
            (partial / runs.RULES).write_text(json.dumps(vars(reading), indent=1))
    planned = dataclasses.replace(
        request,
        action="run" if training else request.action,
        serve=reading.serve,
        exec=exec_,
        points=[p for m in members for p in m.points],
        sweep_name=name,
        members=[m.plain() for m in members],
    )
    return dataclasses.replace(planned, points=all_points(planned, RunStore(exec_.runs_dir)))


# ---------------------------------------------------------------- action=verify_served


def verify_served(request: Request, store: RunStore) -> Answer:
    """Check a fleet's folders, and with url= the servers; the status is 1 unless all is right.

    Raises:
        SpecError: there is no vLLM at a url, it serves another base, or it returns no
            log-probabilities.
    """
    outcomes = [outcome_of(m, store) for m in runs.planned(request.members, request.points)]
    profile = catalogue.profiles([Path(folder) for folder in request.folders])[request.serve]()
    rows: dict[str, dict[str, Any]] = {}  # by folder, the adapter's name on a server
    groups: dict[Any, dict[str, RunSpec]] = {}
    for o in outcomes:
        member, spec, verdict, notes = o.member, o.spec, NONE, [o.problem]
        if spec is not None:  # what would the server refuse or ignore in the folder?
            folder, class_of = Path(request.out) / member.folder, member.served.get("architecture")
            notes = problems(folder, profile, spec.model, spec.method, class_of or "")
            verdict = REFUSED if notes else FITS
            groups.setdefault((spec.model, spec.precision), {})[member.folder] = spec
        row = {"name": member.name, "folder": member.folder, "verdict": verdict, "notes": notes}
        # a wrong row may have the name of another
        rows[member.folder if spec else member.where] = {**row, "found": None}
    urls = [request.url] if isinstance(request.url, str) else request.url
    servers = [Server(str(url)) for url in urls if url]
    at = {name: s for s in servers for name in s.bases if name in rows}

    def compare(specs: Mapping[str, RunSpec]) -> str:
        """Compare the adapters of one base with the trainer; return a line on the noise.

        The reference are the weights in the run's folder, never those of the exported folder.
        """
        from lorasweep.train.loop import log_p

        trainer, spec = TorchTrainer(), next(iter(specs.values()))
        there = {name: at[name] for name in specs if name in at}
        for name in specs.keys() - there.keys():
            rows[name]["verdict"] = MISSING
        if not there:
            return f"{spec.model.name}: no adapter is served"
        own: dict[str, list[Example]] = {}
        for name, one in specs.items():  # the first held-out rows, cut after TOKENS answers
            data, count = trainer.data(one, request.exec), COMMON_ROWS + OWN_ROWS
            found = data.test or data.validation
            found = found or data.train(one.seed, 0, min(count, data.n_train or count))
            ends = [int(np.flatnonzero(row.loss)[:TOKENS][-1]) + 1 for row in found[:count]]
            own[name] = [Example(r.tokens[:end], r.loss[:end]) for r, end in zip(found, ends)]
        each = -(-COMMON_ROWS // len(own))
        common = [row for mine in own.values() for row in mine[:each]][:COMMON_ROWS]
        asked = {name: [*common, *mine[each : each + OWN_ROWS]] for name, mine in own.items()}
        model = trainer.base(spec, request.exec)
        here = {name: log_p(model, spec, mine) for name, mine in asked.items()}
        # before the adapters: a server may load these at their first request, and mix them up
        base = {name: s.log_p(s.bases[name], asked[name]) for name, s in there.items()}
        noise = serving.rms(np.concatenate([base[name] - here[name] for name in there]))
        spread = float(np.std(np.concatenate([*here.values()])))
        if noise > serving.OTHER_BASE * spread:
            name, server = next(iter(there.items()))
            raise SpecError(
                f"url={server.url}: {server.bases[name]!r} is another base than the trainer's "
                f"{spec.model.name!r}. Their log-probabilities of the same tokens differ by "
                f"{noise:.2g} nats; between tokens they vary by {spread:.2g}. Serve the base that "
                "the adapters were trained on. On a CPU, vLLM gives its base the adapter in its "
                "last slot: set --max-loras above the number of adapters."
            )
        trained = {}
        for name, one in specs.items():
            weights = checkpoint.load_weights(store.folder(one.id))
            if weights is None:
                rows[name]["verdict"] = NONE
                rows[name]["notes"].append(f"the weights of run {one.id} were not kept")
            else:
                trained[name] = log_p(model, one, asked[name], weights)
        n_common = sum(int(row.loss.sum()) for row in common)
        shared = {name: values[:n_common] for name, values in trained.items()}
        for name in (n for n in there if n in trained):
            row = rows[name]
            try:
                answers = there[name].log_p(name, asked[name])
            except SpecError as error:  # such as an adapter that the server cannot load
                row["verdict"], row["notes"] = SILENT, [*row["notes"], str(error)]
                continue
            logs = (here[name], trained[name], base[name], answers)
            row["found"] = judged = serving.judge(name, *logs, shared, noise)
            if row["verdict"] == FITS:
                row["verdict"] = judged["verdict"]
            row["exact"] = score.served(specs[name], request, trainer, there[name], name)
            if judged["verdict"] == serving.ANOTHERS:
                row["notes"].append(f"it is the adapter of {rows[judged['nearest']]['name']}")
        return f"{spec.model.name}: noise {noise:.2g} nats (the server's base to the trainer's)"

    lines = [compare(specs) for specs in groups.values() if servers]
    cells = [{**(r["found"] or {}), **r, "notes": "; ".join(r["notes"])} for r in rows.values()]
    counts = Counter(row["verdict"] for row in rows.values())
    total = ", ".join(f"{n} {v}" for v, n in counts.items())
    lines = [*table(cells, *SERVED_COLUMNS), "", *lines, total]
    return Answer([*rows.values()], lines, int(not {*counts} <= {serving.SERVED, FITS}))

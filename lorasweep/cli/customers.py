"""The actions on customers: advise, measure, fleet, verify_served."""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lorasweep.advise import measure as measuring
from lorasweep.advise import pages
from lorasweep.advise.advice import answers, plain_of
from lorasweep.advise.evidence import INFORMATION, Known, read_information, read_kept
from lorasweep.advise.read import EXPECTED, Customer, RowError, check_rows, read_customers
from lorasweep.advise.rules import APART
from lorasweep.cli import answer
from lorasweep.cli.answer import all_points
from lorasweep.cli.plans import check_available, understood
from lorasweep.cli.printed import Answer, Display, notifier, table
from lorasweep.cli.runs import STOPPED, train, write_adapter
from lorasweep.config import catalogue
from lorasweep.data.examples import Data, Example
from lorasweep.errors import LorasweepError, SpecError, check_installed, unknown
from lorasweep.fleet import adapters, runs, serving
from lorasweep.fleet.choice import Outcome, outcome_of, with_further
from lorasweep.fleet.runs import Member
from lorasweep.fleet.serving import Server, problems
from lorasweep.launch import local
from lorasweep.launch.slurm import queue as slurm
from lorasweep.launch.slurm.submit import hardware_of
from lorasweep.launch.trainer import TorchTrainer, Trainer
from lorasweep.spec.execution import Exec
from lorasweep.store import checkpoint, files, folders
from lorasweep.store.run_store import FINAL, RunStore
from lorasweep.sweep.grid import Point, aligned, around
from lorasweep.sweep.request import Request

WIDTH = 34
"""Characters of a cell in a table for the terminal; the last column is not cut."""
COMMON_ROWS, OWN_ROWS, TOKENS = 8, 2, 5
"""Rows that all adapters of a base are asked, further rows of each customer, and answer tokens of a
row: 50 tokens an adapter, and as many requests to a vLLM server."""
FITS, REFUSED, MISSING, NONE = "folder is right", "folder refused", "missing", "no adapter"
SERVED_COLUMNS = ("name", "verdict", "change", "distance", "bound", "factor", "notes")


def known(request: Request) -> Known:
    """Return the inputs of the adviser's rules: models, machines, kept results, measured data."""
    own = [Path(folder) for folder in request.folders]
    return Known(
        models=catalogue.models(own),
        machines=catalogue.machines(own),
        kept=read_kept(answer.KEPT, catalogue.widths(own)),
        hardware=hardware_of(request) if request.hardware else None,
        information=read_information([Path(request.exec.reports_dir), answer.KEPT]),
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str]) -> list[str]:
    cut = [[pages.printable(c)[:WIDTH] for c in r[:-1]] + [pages.printable(r[-1])] for r in rows]
    return aligned([list(head), *cut], [head.index(h) for h in numbers])


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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(pages.html(found, title))
    errors = [f"error in {a.error}" for a in found if isinstance(a, RowError)]
    lines = _table(pages.HEAD, [pages.cells(a) for a in found], pages.NUMBERS)
    lines += ["", *errors, *pages.summary_lines(found), pages.BASIS]
    lines += [f"page: {path}. Reasons, and the command that tests the advice: why=NAME"]
    return Answer([plain_of(a) for a in found], lines, int(bool(errors)))


# ---------------------------------------------------------------- action=measure


def measure(request: Request, store: RunStore) -> Answer:
    """Measure the information in a data set, and save it for action=advise."""
    from lorasweep.train.objectives.sft import first_pass

    folder, notify = Path(request.exec.reports_dir) / INFORMATION, notifier(request)
    files.check_writable(folder, "exec.reports_dir")
    spec = measuring.run_of(request)
    one = dataclasses.replace(request, points=[Point(spec.method.name, spec)])
    check_available(one)
    for line in understood(one):  # also refuses rows
        notify(line)
    store.prepare()
    trainer = TorchTrainer()
    data = trainer.data(spec, request.exec)
    if data.n_train is not None:
        if data.n_train < spec.batch_size:
            raise SpecError(
                f"batch_size={spec.batch_size}: {spec.dataset.name} has {data.n_train} rows."
            )
        most = data.n_train // spec.batch_size  # one pass over the rows
        spec = dataclasses.replace(spec, steps=min(spec.steps, most))
    rates = around(spec.lr, request.rates, APART)
    points = [Point(spec.method.name, dataclasses.replace(spec, lr=lr)) for lr in rates]
    local.run_points(points, store, request.exec, Display(points, request).event, trainer)
    base, specs = trainer.base(spec, request.exec), [p.spec for p in points]
    at_once = request.exec.micro_batch_size or 4  # few, as logits take much memory
    losses = first_pass(spec, base, trainer.data(spec, request.exec, base), at_once)
    found = measuring.information(specs, data, losses, request, store, answer.code_length)
    path = folder / f"{spec.dataset.name}-{spec.model.name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, json.dumps(found, indent=1).encode())
    return Answer(found, measuring.text_of(found, path).rstrip())


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
    folder, title = Path(request.out), Path(request.customers).stem
    tokenizer_of = cache(lambda model: load.tokenizer_of(model, request.exec.models_dir))
    profile = catalogue.profiles([Path(f) for f in request.folders])[request.serve]()
    outcomes = adapters.export(outcomes, store, folder, title, write_adapter, tokenizer_of, profile)
    chosen = [Point(o.member.folder, o.spec) for o in outcomes if o.spec]
    if request.mirror == "wandb":
        from lorasweep.tracking.wandb import mirror

        mirror(chosen, store, request.sweep_name or "")
    facts = [o.facts() for o in outcomes]
    rows = [adapters.cells(p) for p in facts]
    for row, o in zip(rows, outcomes, strict=True):
        if o.member.problem:
            row[-1] = f"{o.member.where}: see above"
    lines = [sent.as_text()] if sent else []
    lines += _table(adapters.HEAD, rows, adapters.NUMBERS)
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
    name = runs.fleet_name(request)
    folder = Path(request.out or Path(request.exec.reports_dir) / name).expanduser().absolute()
    request = dataclasses.replace(request, out=str(folder))
    rules, basis = runs.rules_of(request), known(request)
    if rules.serve not in profiles:
        raise SpecError(unknown("serve", rules.serve, profiles))
    dirs, training = request.exec.models_dir, request.action == "fleet"
    fetched = request.cluster.kind == "slurm" and request.action != "fetch"
    tokenizer_of = cache(lambda model: load.tokenizer_of(model, dirs, fetched))
    profile, data_dir = profiles[rules.serve](), [os.getcwd(), *request.exec.data_dir]
    members = runs.build_runs(customers, basis, request, rules, tokenizer_of, profile)
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
        notify(f"serve={rules.serve}: no adapter of the unembedding for {of}: {why}")
    if left_out and "method.layers" in request.given:
        raise SpecError(
            f"method.layers={rules.layers} with serve={rules.serve}: the unembedding is left out. "
            "Add method.layers=attention+mlp, or leave method.layers out, or add serve=peft."
        )
    if training:
        runs.write_rules(folder, rules)
    planned = dataclasses.replace(
        request,
        action="run" if training else request.action,
        serve=rules.serve,
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
        SpecError: there is no server at a url, it serves another base, or it returns no
            log-probabilities.
    """
    outcomes = [outcome_of(m, store) for m in runs.planned(request.members, request.points)]
    profile = catalogue.profiles([Path(folder) for folder in request.folders])[request.serve]()
    rows: dict[str, dict[str, Any]] = {}  # by folder, the adapter's name on a server
    groups: dict[Any, list[Outcome]] = {}
    for o in outcomes:
        member, spec, verdict, notes = o.member, o.spec, NONE, [o.problem]
        if spec is not None:  # what would the server refuse or ignore in the folder?
            profile.largest_rank(member.advised["rank"])
            folder, class_of = Path(request.out) / member.folder, member.served.get("architecture")
            notes = problems(folder, profile, spec.model, spec.method, class_of or "")
            verdict = REFUSED if notes else FITS
            groups.setdefault((spec.model, spec.precision), []).append(o)
        row = {"name": member.name, "folder": member.folder, "verdict": verdict, "notes": notes}
        rows[member.folder] = {**row, "found": None}
    urls = [request.url] if isinstance(request.url, str) else request.url
    servers = [Server(str(url)) for url in urls if url]
    at = {name: s for s in servers for name in s.models if name in rows}
    trainer, lines = TorchTrainer(), list[str]()
    for group in groups.values() if servers else ():
        lines.append(_compare(group, at, rows, trainer, store, request.exec))
    cells = [{**(r["found"] or {}), **r, "notes": "; ".join(r["notes"])} for r in rows.values()]
    counts = Counter(row["verdict"] for row in rows.values())
    total = ", ".join(f"{n} {v}" for v, n in counts.items())
    lines = [*table(cells, *SERVED_COLUMNS), "", *lines, total]
    return Answer([*rows.values()], lines, int(not {*counts} <= {serving.SERVED, FITS}))


def _compare(
    group: Sequence[Outcome],
    at: Mapping[str, Server],
    rows: Mapping[str, dict[str, Any]],
    trainer: TorchTrainer,
    store: RunStore,
    exec_: Exec,
) -> str:
    """Compare the adapters of one base with the trainer, in `rows`; return a line on the noise.

    The reference is computed from the weights in the run's folder, never from the exported folder.
    """
    from lorasweep.train.loop import log_p

    spec = group[0].spec
    assert spec is not None
    specs = {o.member.folder: o.spec for o in group}
    there = {name: at[name] for name in specs if name in at}
    for name in specs.keys() - there.keys():
        rows[name]["verdict"] = MISSING
    if not there:
        return f"{spec.model.name}: no adapter is served"
    own = {name: _rows(trainer.data(s, exec_), spec.seed) for name, s in specs.items()}
    each = -(-COMMON_ROWS // len(own))
    common = [row for mine in own.values() for row in mine[:each]][:COMMON_ROWS]
    own = {name: mine[each : each + OWN_ROWS] for name, mine in own.items()}
    model = trainer.base(spec, exec_)
    of_common = log_p(model, spec, common)
    here = {n: np.append(of_common, log_p(model, spec, mine)) for n, mine in own.items()}
    # before the adapters: a server may load these at their first request, and mix them up
    first = {s.url: (s, s.base_of(name, at)) for name, s in there.items()}
    by_url = {url: s.log_p(of, common) for url, (s, of) in first.items()}
    base = {
        name: np.append(by_url[s.url], s.log_p(s.base_of(name, at), own[name]))
        for name, s in there.items()
    }
    noise = serving.rms(np.concatenate([base[name] - here[name] for name in there]))
    spread = float(np.std(np.concatenate([*here.values()])))
    if noise > serving.OTHER_BASE * spread:
        name, server = next(iter(there.items()))
        raise SpecError(
            f"url={server.url}: {server.base_of(name, at)!r} is another base than the trainer's "
            f"{spec.model.name!r}. Their log-probabilities of the same tokens differ by "
            f"{noise:.2g} nats; between tokens they vary by {spread:.2g}. Serve the base that the "
            "adapters were trained on. On a CPU, vLLM gives its base the adapter in its last slot: "
            "set --max-loras above the number of adapters."
        )
    trained = {}
    for name, one in specs.items():
        weights = checkpoint.load_weights(store.folder(one.id))
        if weights is None:
            rows[name]["verdict"] = NONE
            rows[name]["notes"].append(f"the weights of run {one.id} were not kept")
        else:
            trained[name] = log_p(model, one, [*common, *own[name]], weights)
    shared = {name: values[: len(of_common)] for name, values in trained.items()}
    for name in (n for n in there if n in trained):
        answers = there[name].log_p(name, [*common, *own[name]])
        logs = (here[name], trained[name], base[name], answers)
        row, found = rows[name], serving.judge(name, *logs, shared, noise)
        row["found"] = found
        if row["verdict"] == FITS:
            row["verdict"] = found["verdict"]
        if found["verdict"] == serving.ANOTHERS:
            row["notes"].append(f"it is the adapter of {rows[found['nearest']]['name']}")
    return f"{spec.model.name}: noise {noise:.2g} nats (the server's base against the trainer's)"


def _rows(data: Data, seed: int) -> list[Example]:
    """Return the first test rows (or validation or training rows), cut after their first TOKENS."""
    found, count = data.test or data.validation, COMMON_ROWS + OWN_ROWS
    if not found:
        found = data.train(seed, 0, min(count, data.n_train or count))
    ends = [int(np.flatnonzero(row.loss)[:TOKENS][-1]) + 1 for row in found[:count]]
    return [Example(row.tokens[:end], row.loss[:end]) for row, end in zip(found, ends)]

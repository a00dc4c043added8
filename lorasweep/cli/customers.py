"""The actions on customers: advise, measure, fleet."""

import dataclasses
import json
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

from lorasweep.advise import measure as measuring
from lorasweep.advise import pages
from lorasweep.advise.advice import Advice, answers, plain_of
from lorasweep.advise.evidence import INFORMATION, Known, read_information, read_kept
from lorasweep.advise.read import Customer, Failed, Row, check_rows, expected, read_customers
from lorasweep.advise.rules.rates import APART
from lorasweep.cli import answer, understood
from lorasweep.cli.finished_runs import write_adapter
from lorasweep.cli.points import all_points
from lorasweep.cli.progress import Display
from lorasweep.cli.train import STOPPED, Trained
from lorasweep.config import catalogue
from lorasweep.config.preflight import check_available
from lorasweep.data.messages import rows_line
from lorasweep.errors import LorasweepError, SpecError, check_installed, unknown
from lorasweep.fleet import adapters, runs
from lorasweep.fleet.outcome import outcome_of, with_further
from lorasweep.fleet.rows import FEWEST_NAMED
from lorasweep.fleet.runs import Member
from lorasweep.fleet.serving import Profile
from lorasweep.launch import local
from lorasweep.launch.slurm import queue as slurm
from lorasweep.launch.slurm.planning import hardware_of
from lorasweep.launch.trainer import TorchTrainer
from lorasweep.store import files, folders
from lorasweep.store.run_store import FINAL, RunStore
from lorasweep.sweep.grid import Point, around
from lorasweep.sweep.names import aligned
from lorasweep.sweep.request import Request

WIDTH = 34
"""Characters of a cell in a table for the terminal; the last column is not cut."""


def known(request: Request) -> Known:
    """Return the inputs of the adviser's rules: models, machines, kept results, measured data."""
    folders = [Path(folder) for folder in request.folders]
    return Known(
        models=catalogue.models(folders),
        machines=catalogue.machines(folders),
        kept=read_kept(answer.KEPT, catalogue.widths(folders)),
        hardware=hardware_of(request) if request.hardware else None,
        information=read_information([Path(request.exec.reports_dir), answer.KEPT]),
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str]) -> list[str]:
    cut = [[pages.printable(c)[:WIDTH] for c in r[:-1]] + [pages.printable(r[-1])] for r in rows]
    return aligned([list(head), *cut], [head.index(h) for h in numbers])


# ---------------------------------------------------------------- action=advise


def advise(request: Request) -> int:
    """Print the advice for customers and write the page; return 1 if a row has an error."""
    if bool(request.customers) == bool(request.customer):
        raise SpecError(
            "action=advise needs customers=FILE (CSV or YAML), or one customer by columns: "
            "+customer.model=llama-3.1-8b +customer.task=sft +customer.examples=50000. "
            + ("Give one of the two." if request.customers else expected())
        )
    if request.customers:
        table = read_customers(Path(request.customers))
    else:
        table = check_rows([Row("customer", {"name": "customer", **request.customer})])
    found = answers(table, known(request))
    if request.why:
        return _one(request, found)
    title = Path(request.customers).stem if request.customers else "customer"
    out = request.out
    if not out and request.format != "json":
        out = str(Path(request.exec.reports_dir) / f"advice-{title}.html")
    if out:
        path = Path(out)
        if path.suffix != ".html":
            raise SpecError(f"out={out}: expected a file that ends in .html.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(pages.html(found, title))
    if request.format == "json":
        print(json.dumps([plain_of(a) for a in found]))
    else:
        errors = [f"error in {a.error}" for a in found if isinstance(a, Failed)]
        lines = _table(pages.HEAD, [pages.cells(a) for a in found], pages.NUMBERS)
        lines += ["", *errors, *([""] if errors else []), *pages.summary_lines(found), pages.BASIS]
        lines += [f"page: {out}. Reasons, and the command that tests the advice: why=NAME"]
        print("\n".join(lines))
    return 1 if any(isinstance(a, Failed) for a in found) else 0


def _one(request: Request, found: Sequence[Advice | Failed]) -> int:
    """Print the reasons of one customer's advice."""
    name, plain = request.why, runs.plain_name
    fitting = [a for a in found if a.name == name] or [a for a in found if plain(a.name) == name]
    if not fitting:
        names = unknown("customer", name, (a.name for a in found))
        raise SpecError(f"{names} A name in small letters and underscores will do: big_co.")
    if len(fitting) > 1:
        raise SpecError(
            f"{name} may be {' or '.join(repr(a.name) for a in fitting)}. Write the name as in the "
            f"table, in quotes: 'why=\"{fitting[0].name}\"'."
        )
    (mine,) = fitting
    if isinstance(mine, Failed):
        raise SpecError(mine.error)
    if request.format == "json":
        reasons = mine.reasons.values()
        print(json.dumps([{**vars(r), "sure": r.sure.name.lower()} for r in reasons]))
    else:
        print(pages.render("reasons.txt", a=mine, search=_search_of(mine)).rstrip())
    return 0


def _search_of(advice: Advice) -> str:
    """Return the command that tests the advice on the customer's rows; '' if a search cannot."""
    c, model = advice.customer, advice.customer.model.removesuffix("/config.json")
    few = advice.work.rows is not None and advice.work.rows < FEWEST_NAMED
    there = model.lower() in advice.known.models or Path(model).is_dir() or model.count("/") == 1
    if c.task != "sft" or few or not there:
        return ""
    values = {"model": model, "dataset": c.data or "ROWS"}
    named = [_option(key, value) for key, value in values.items()]
    return shlex.join(
        ["python", "-m", "lorasweep", "+sweep=tune", *named]
        + [f"sweep.arms.lora.rank={advice.choice.rank}"]
    )


def _option(key: str, value: str) -> str:
    """Write an option; Hydra needs quotes around a value with other characters than in names."""
    if re.fullmatch(r"[\w./:@-]+", value):
        return f"{key}={value}"
    escaped = value.replace('"', '\\"')
    return f'{key}="{escaped}"'


# ---------------------------------------------------------------- action=measure


def measure(request: Request) -> int:
    """Measure the information in a data set, print it, and save it for action=advise."""
    folder = Path(request.exec.reports_dir) / INFORMATION
    files.check_writable(folder, "exec.reports_dir")
    store, spec = RunStore(request.exec.runs_dir), measuring.run_of(request)
    one = dataclasses.replace(request, points=[Point(spec.method.name, spec)])
    check_available(one)
    lines = understood.lines(one)  # also refuses rows
    for line in lines if request.format != "json" else ():
        print(line, file=sys.stderr, flush=True)
    store.prepare()
    trainer = TorchTrainer()
    data = trainer.data(spec, request.exec)
    if data.n_train is not None and spec.steps * spec.batch_size > data.n_train:
        steps = data.n_train // spec.batch_size  # one pass over the rows
        if not steps:
            raise SpecError(
                f"batch_size={spec.batch_size}: {spec.dataset.name} has {data.n_train} rows. Set a "
                f"batch_size of at most {data.n_train}."
            )
        rows = f"{data.n_train:,} rows are enough for {steps} updates of {spec.batch_size}"
        print(f"{rows}: steps={steps}", file=sys.stderr)
        spec = dataclasses.replace(spec, steps=steps)
    rates = around(spec.lr, request.rates, APART)
    specs = [dataclasses.replace(spec, lr=lr) for lr in rates]
    points = [Point(s.method.name, s) for s in specs]
    with Display(points, request) as display:
        local.run_points(points, store, request.exec, display.event, trainer)
    base = trainer.first_pass(spec, request.exec)
    found = measuring.information(specs, data, base, request, store, answer.code_length)
    path = folder / f"{spec.dataset.name}-{spec.model.name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, json.dumps(found, indent=1).encode())
    as_json = request.format == "json"
    print(json.dumps(found) if as_json else measuring.text_of(found, path).rstrip())
    return 0


# ---------------------------------------------------------------- action=fleet


def _profiles(request: Request) -> dict[str, Callable[[], Profile]]:
    return catalogue.profiles([Path(folder) for folder in request.folders])


def plan_fleet(request: Request) -> Request:
    """Return the request for the runs of a table's customers; print the problems of rows.

    Raises:
        SpecError: a fleet cannot use the settings, or the table cannot be read.
    """
    check_installed("jinja2", f"action={request.action} with a table of customers")
    if request.members:  # a follow-up job trains the planned runs, without reading the table again
        return request
    customers = read_customers(Path(request.customers))
    rules, members = runs.fleet_of(request, customers, known(request), _profiles(request))
    folder, dirs = runs.fleet_folder(request), runs.data_dirs(request)
    exec_ = dataclasses.replace(
        request.exec, data_dir=dirs, keep_weights=True, skip_broken_data=True
    )
    if request.action == "fleet":
        points = [p for m in members for p in m.points]
        data = {c.data for c in customers if isinstance(c, Customer) and c.data}
        inputs = {request.customers, *filter(os.path.exists, data)}
        models = {p.spec.model for p in points}
        check = partial(folders.check, exec_=exec_, models=models, inputs=inputs)
        check(folder, runs.RULES)
        store = RunStore(exec_.runs_dir)
        every = with_further(points, store, go_on="rates" not in request.given)
        unfinished = {p.arm for p in every if not store.result(p.id)}
        for k, m in enumerate(members):
            try:
                if m.folder in unfinished:  # else it is checked only if it is written
                    check(folder / m.folder, adapters.FACTS)
            except LorasweepError as error:
                members[k] = Member(m.where, m.name, m.folder, f"{m.where}: {error}")
    for m in members:
        if m.problem:
            print(f"error in {pages.printable(m.problem)}", file=sys.stderr)
        elif m.rows.warning:
            print(f"{pages.printable(m.name)}: {m.rows.warning}", file=sys.stderr)
    kinds = sum((Counter(m.rows.kinds) for m in members if not m.problem), Counter())
    if kinds and request.format != "json":
        print(rows_line(kinds), file=sys.stderr)
    left_out = Counter(why for m in members if (why := m.served.get("left_out")))
    for why, count in left_out.items():
        of = f"{count} of {len(members)} customers"
        print(
            f"serve={rules.serve}: no adapter of the unembedding for {of}: {why}", file=sys.stderr
        )
    if request.action == "fleet":
        from lorasweep.models import find

        runs.write_rules(folder, rules)
        license_of = cache(lambda model: find.license_of(model, request.exec.models_dir))
        members = [
            dataclasses.replace(m, license=license_of(m.points[0].spec.model)) if m.points else m
            for m in members
        ]
    fleet = dataclasses.replace(
        request,
        action="run" if request.action == "fleet" else request.action,
        out=str(folder),
        serve=rules.serve,
        exec=exec_,
        points=[p for m in members for p in m.points],
        sweep_name=runs.fleet_name(request),
        members=[m.plain() for m in members],
    )
    return dataclasses.replace(fleet, points=all_points(fleet, RunStore(fleet.exec.runs_dir)))


def fleet(
    request: Request, store: RunStore, training: Callable[[Request, RunStore], Trained]
) -> int:
    """Train and export an adapter for each customer; `training` trains the missing runs.

    Returns 1 if a customer could not be planned or got no adapter, unless its runs are in jobs.
    """
    from lorasweep.models import load

    plan = plan_fleet(request)
    trained = training(plan, store) if plan.points else Trained([], 0)
    if trained.status == STOPPED:
        return STOPPED
    if trained.sent:
        trained.sent.show(plan.format == "json")
    outcomes = [outcome_of(m, store) for m in runs.planned(plan.members, trained.points)]
    waiting = 0  # customers whose unfinished runs are all in jobs of a cluster
    if plan.cluster.kind == "slurm":
        queue = slurm.look(store.root)
        there = queue.covered().keys() | queue.elsewhere
        unfinished = [
            [i for i, state in o.states.items() if state not in FINAL and state != "running"]
            for o in outcomes
            if o.open
        ]
        waiting = sum(there.issuperset(ids) for ids in unfinished)
    folder, title = Path(plan.out), Path(plan.customers).stem
    tokenizer_of = cache(lambda model: load.tokenizer_of(model, plan.exec.models_dir))
    profile = _profiles(plan)[plan.serve]()
    outcomes = adapters.export(outcomes, store, folder, title, write_adapter, tokenizer_of, profile)
    chosen = [Point(o.member.folder, o.spec) for o in outcomes if o.spec]
    if plan.mirror == "wandb":
        from lorasweep.tracking.wandb import mirror

        mirror(chosen, store, plan.sweep_name or "")
    if plan.format != "json":
        rows = [adapters.cells(o) for o in outcomes]
        for row, o in zip(rows, outcomes, strict=True):
            if o.member.problem:
                row[-1] = f"{o.member.where}: see above"
        lines = _table(adapters.HEAD, rows, adapters.NUMBERS)
        print("\n".join([*lines, "", *adapters.summary_lines(outcomes)]))
        print(f"adapters, cards and the page: {folder / adapters.PAGE}")
    elif not waiting:
        print(json.dumps([o.plain() for o in outcomes]))
    return 0 if len(chosen) + waiting == len(outcomes) else 1

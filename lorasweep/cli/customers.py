"""The actions on customers: advise, measure, fleet."""

import dataclasses
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from lorasweep.advise import measure as measuring
from lorasweep.advise import pages
from lorasweep.advise.advice import Advice, answers, plain_of
from lorasweep.advise.evidence import INFORMATION, Known, read_information, read_kept
from lorasweep.advise.read import Customer, Failed, Row, check_rows, expected, read_customers
from lorasweep.advise.rules.rates import APART
from lorasweep.cli import answer, understood
from lorasweep.cli.finished_runs import write_adapter
from lorasweep.cli.points import all_points
from lorasweep.cli.printed import Answer
from lorasweep.cli.progress import Display, notifier
from lorasweep.cli.train import STOPPED, Trained, train
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
from lorasweep.launch.trainer import TorchTrainer, Trainer
from lorasweep.store import files, folders
from lorasweep.store.run_store import FINAL, RunStore
from lorasweep.sweep.grid import Point, around
from lorasweep.sweep.names import aligned
from lorasweep.sweep.request import Request

WIDTH = 34
"""Characters of a cell in a table for the terminal; the last column is not cut."""


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
            + ("Give one of the two." if request.customers else expected())
        )
    if request.customers:
        table = read_customers(Path(request.customers))
    else:
        table = check_rows([Row("customer", {"name": "customer", **request.customer})])
    found = answers(table, known(request))
    if request.why:
        mine = _named(request.why, found)
        reasons = [{**vars(r), "sure": r.sure.name.lower()} for r in mine.reasons.values()]
        return Answer(
            reasons, lambda: pages.render("reasons.txt", a=mine, search=_search_of(mine)).rstrip()
        )
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
    errors = [f"error in {a.error}" for a in found if isinstance(a, Failed)]

    def text() -> list[str]:
        lines = _table(pages.HEAD, [pages.cells(a) for a in found], pages.NUMBERS)
        lines += ["", *errors, *([""] if errors else []), *pages.summary_lines(found), pages.BASIS]
        return [*lines, f"page: {out}. Reasons, and the command that tests the advice: why=NAME"]

    return Answer([plain_of(a) for a in found], text, int(bool(errors)))


def _named(name: str, found: Sequence[Advice | Failed]) -> Advice:
    """Return the advice for the customer of a name, as it is written or in plain letters."""
    plain = runs.plain_name
    fitting = [a for a in found if a.name == name] or [a for a in found if plain(a.name) == name]
    if len(fitting) != 1:
        names = unknown("customer", name, (a.name for a in fitting or found))
        raise SpecError(f"{names} Write big_co, or in quotes 'why=\"Big Co\"', for Big Co.")
    if isinstance(fitting[0], Failed):
        raise SpecError(fitting[0].error)
    return fitting[0]


def _search_of(advice: Advice) -> str:
    """Return the command that tests the advice on the customer's rows; '' if a search cannot."""
    c, model = advice.customer, advice.customer.model.removesuffix("/config.json")
    few = advice.work.rows is not None and advice.work.rows < FEWEST_NAMED
    there = model.lower() in advice.known.models or Path(model).is_dir() or model.count("/") == 1
    if c.task != "sft" or few or not there:
        return ""
    named = []
    for key, value in (("model", model), ("dataset", c.data or "ROWS")):
        if not re.fullmatch(r"[\w./:@-]+", value):  # Hydra needs quotes
            value = '"{}"'.format(value.replace('"', '\\"'))
        named.append(f"{key}={value}")
    rank = f"sweep.arms.lora.rank={advice.choice.rank}"
    return shlex.join(["python", "-m", "lorasweep", "+sweep=tune", *named, rank])


# ---------------------------------------------------------------- action=measure


def measure(request: Request, store: RunStore) -> Answer:
    """Measure the information in a data set, and save it for action=advise."""
    folder, notify = Path(request.exec.reports_dir) / INFORMATION, notifier(request)
    files.check_writable(folder, "exec.reports_dir")
    spec = measuring.run_of(request)
    one = dataclasses.replace(request, points=[Point(spec.method.name, spec)])
    check_available(one)
    for line in understood.lines(one):  # also refuses rows
        notify(line)
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
        notify(f"{rows}: steps={steps}")
        spec = dataclasses.replace(spec, steps=steps)
    rates = around(spec.lr, request.rates, APART)
    points = [Point(spec.method.name, dataclasses.replace(spec, lr=lr)) for lr in rates]
    with Display(points, request) as display:
        local.run_points(points, store, request.exec, display.event, trainer)
    base, specs = trainer.first_pass(spec, request.exec), [p.spec for p in points]
    found = measuring.information(specs, data, base, request, store, answer.code_length)
    path = folder / f"{spec.dataset.name}-{spec.model.name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, json.dumps(found, indent=1).encode())
    return Answer(found, lambda: measuring.text_of(found, path).rstrip())


# ---------------------------------------------------------------- action=fleet


def fleet(
    request: Request,
    store: RunStore,
    trainer: Trainer | str | None = None,
    follow: dict[str, Any] | None = None,
) -> Answer:
    """Train and export an adapter for each customer.

    The status is 1 if a customer could not be planned or got no adapter, unless its runs are in
    jobs.
    """
    from lorasweep.models import load

    plan = plan_fleet(request)  # the table, the advice, and the runs of each customer
    trained = train(plan, store, trainer, follow) if plan.points else Trained([], 0)
    if trained.status == STOPPED:
        return Answer(status=STOPPED)
    outcomes = [outcome_of(m, store) for m in runs.planned(plan.members, trained.points)]
    waiting = 0  # customers whose unfinished runs are all in jobs of a cluster
    if plan.cluster.kind == "slurm":
        queue = slurm.look(store.root)
        there = queue.covered().keys() | queue.elsewhere
        over = (*FINAL, "running")
        unfinished = [[i for i, s in o.states.items() if s not in over] for o in outcomes if o.open]
        waiting = sum(there.issuperset(ids) for ids in unfinished)
    folder, title = Path(plan.out), Path(plan.customers).stem
    tokenizer_of = cache(lambda model: load.tokenizer_of(model, plan.exec.models_dir))
    profile = _profiles(plan)[plan.serve]()
    outcomes = adapters.export(outcomes, store, folder, title, write_adapter, tokenizer_of, profile)
    chosen = [Point(o.member.folder, o.spec) for o in outcomes if o.spec]
    if plan.mirror == "wandb":
        from lorasweep.tracking.wandb import mirror

        mirror(chosen, store, plan.sweep_name or "")
    facts = [o.facts() for o in outcomes]

    def text() -> list[str]:
        rows = [adapters.cells(p) for p in facts]
        for row, o in zip(rows, outcomes, strict=True):
            if o.member.problem:
                row[-1] = f"{o.member.where}: see above"
        lines = [trained.sent.as_text()] if trained.sent else []
        lines += _table(adapters.HEAD, rows, adapters.NUMBERS)
        lines += ["", *adapters.summary_lines(outcomes)]
        return [*lines, f"adapters, cards and the page: {folder / adapters.PAGE}"]

    value = trained.sent.plain() if trained.sent else facts
    return Answer(value, text, int(len(chosen) + waiting < len(outcomes)))


def _profiles(request: Request) -> dict[str, Callable[[], Profile]]:
    return catalogue.profiles([Path(folder) for folder in request.folders])


def plan_fleet(request: Request) -> Request:
    """Return the request for the runs of a table's customers; print the problems of rows.

    Raises:
        SpecError: a fleet cannot use the settings, or the table cannot be read.
    """
    check_installed("jinja2", f"action={request.action} with a table of customers")
    if request.members:  # planned before; a follow-up job does not read the table again
        return request
    if request.exec.world_size > 1:
        raise SpecError("a fleet trains each pack in one process. Leave exec.world_size out.")
    customers, profiles = read_customers(Path(request.customers)), _profiles(request)
    rules, basis = runs.rules_of(request), known(request)
    if rules.serve not in profiles:
        raise SpecError(unknown("serve", rules.serve, profiles))
    tokenizer_of, profile = runs.tokenizers(request), profiles[rules.serve]()
    members = runs.build_runs(customers, basis, request, rules, tokenizer_of, profile)
    folder, training = runs.fleet_folder(request), request.action == "fleet"
    exec_ = dataclasses.replace(
        request.exec, data_dir=runs.data_dirs(request), keep_weights=True, skip_broken_data=True
    )
    if training:
        members = _for_training(
            members, customers, dataclasses.replace(request, exec=exec_), folder
        )
    notify = notifier(request, always=True)
    for m in members:
        if m.problem:
            notify(f"error in {pages.printable(m.problem)}")
        elif m.rows.warning:
            notify(f"{pages.printable(m.name)}: {m.rows.warning}")
    kinds = sum((Counter(m.rows.kinds) for m in members if not m.problem), Counter())
    if kinds:
        notifier(request)(rows_line(kinds))
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
        out=str(folder),
        serve=rules.serve,
        exec=exec_,
        points=[p for m in members for p in m.points],
        sweep_name=runs.fleet_name(request),
        members=[m.plain() for m in members],
    )
    return dataclasses.replace(planned, points=all_points(planned, RunStore(exec_.runs_dir)))


def _for_training(
    members: Sequence[Member],
    customers: Sequence[Customer | Failed],
    request: Request,
    folder: Path,
) -> list[Member]:
    """Check the folders that will be written, and add the licenses of the bases.

    A folder that cannot be written is the problem of its customer alone.

    Raises:
        LorasweepError: the fleet's own folder cannot be written.
    """
    from lorasweep.models import find

    exec_, points = request.exec, [p for m in members for p in m.points]
    data = {c.data for c in customers if isinstance(c, Customer) and c.data}
    inputs = {request.customers, *filter(os.path.exists, data)}
    models = {p.spec.model for p in points}
    check = partial(folders.check, exec_=exec_, models=models, inputs=inputs)
    check(folder, runs.RULES)
    store, license_of = RunStore(exec_.runs_dir), cache(find.license_of)
    every = with_further(points, store, go_on="rates" not in request.given)
    unfinished = {p.arm for p in every if not store.result(p.id)}
    found = []
    for m in members:
        try:
            if m.folder in unfinished:  # else it is checked only if it is written
                check(folder / m.folder, adapters.FACTS)
            of = license_of(m.points[0].spec.model, tuple(exec_.models_dir)) if m.points else {}
            found.append(dataclasses.replace(m, license=of))
        except LorasweepError as error:
            found.append(Member(m.where, m.name, m.folder, f"{m.where}: {error}"))
    return found

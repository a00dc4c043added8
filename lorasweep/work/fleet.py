"""Train, export and verify an adapter for each customer of a table."""

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lorasweep.advise import pages, rules
from lorasweep.advise.read import Customer, read_customers
from lorasweep.advise.rules import Known
from lorasweep.config import catalogue
from lorasweep.data.examples import Example
from lorasweep.errors import LorasweepError, SpecError, check_installed, unknown
from lorasweep.fleet import adapters, runs, score, serving
from lorasweep.fleet.choice import outcome_of, with_further
from lorasweep.fleet.runs import Member
from lorasweep.fleet.serving import Server, problems
from lorasweep.launch.slurm import queue as slurm
from lorasweep.launch.torch_trainer import TorchTrainer, Trainer
from lorasweep.plan.detect import hardware_of
from lorasweep.spec.run import RunSpec
from lorasweep.store import checkpoint, folders
from lorasweep.store.run_store import FINISHED, RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import Request
from lorasweep.work import answer
from lorasweep.work.printed import Answer, notifier, table
from lorasweep.work.run import STOPPED, train
from lorasweep.work.search import all_points

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
        hardware=hardware_of(request.hardware) if request.hardware else None,
        information=rules.read_information([Path(request.exec.reports_dir), answer.KEPT]),
    )


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
        over = (*FINISHED, "running")
        unfinished = [[i for i, s in o.states.items() if s not in over] for o in outcomes if o.open]
        waiting = sum(there >= set(ids) for ids in unfinished)
    own, asked = TorchTrainer(), [o for o in outcomes if o.spec and o.member.rows.held_out]
    for o in sorted(asked, key=lambda o: o.spec.model.name):  # each base is loaded once
        o.result["score"] = score.count(o.spec, request, own)
    folder, title = Path(request.out), Path(request.customers).stem
    tokenizer_of = cache(lambda model: load.tokenizer_of(model, request.exec.models_dir))
    profile = catalogue.profiles([Path(f) for f in request.folders])[request.serve]()
    outcomes = adapters.export(outcomes, store, folder, title, tokenizer_of, profile)
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

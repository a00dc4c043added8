"""Train an adapter for each customer of a table: plan, status, training, folders, the page."""

import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lorasweep.advise import table
from lorasweep.advise.advice import Failed
from lorasweep.advise.page import printable
from lorasweep.cli.customers import advise, folders
from lorasweep.errors import ModelError, SpecError
from lorasweep.fleet import pages
from lorasweep.fleet.members import Member, Setup, check, fleet_plain, members_of, planned
from lorasweep.fleet.outcome import Outcome, outcome_of, plain_of
from lorasweep.fleet.rows import BY_ROW, CHAT, PLAIN, Rules
from lorasweep.launch.slurm import submissions
from lorasweep.launch.slurm.planning import hardware_of
from lorasweep.plan.forecast import Forecaster
from lorasweep.plan.placement import Misfit
from lorasweep.spec.dataset import FIRST_RENDER
from lorasweep.spec.model import ModelSpec
from lorasweep.store.run_store import FINAL, RunStore
from lorasweep.sweep.aligned import aligned
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import Request

WIDTH = 34
"""Letters of a cell in the table of the terminal."""
STOPPED = 130


def show(request: Request, store: RunStore, act: Callable[[Request], int]) -> int:
    """Do what a request asks for the customers of its table; return the exit status.

    `act` trains, plans or shows the runs of a request, as those of any other. The status is 1 if a
    customer could not be planned or got no adapter; those whose runs wait in jobs of a cluster do
    not count.
    """
    if request.members:  # in the job that follows: as planned when it was asked for
        found, runs = planned(request.members, request.points), request
    else:
        rules, found = _decided(request)
        runs = _request_of(request, found)
        if runs.action == "run":
            folders.write_rules(Path(runs.out), rules)
    wrong = [f for f in found if isinstance(f, Failed)]
    for failed in wrong:
        _say(failed.error)
    status = act(runs) if runs.points else 0
    if runs.action != "run":
        return max(status, int(bool(wrong)))
    if status == STOPPED:
        return status
    outcomes = [outcome_of(f, store) if isinstance(f, Member) else f for f in found]
    waiting = _waiting(runs, outcomes, store)
    folder, title = Path(runs.out), Path(request.customers).stem
    outcomes = folders.write(outcomes, store, folder, title)
    if runs.mirror == "wandb":
        from lorasweep.tracking.wandb import mirror

        chosen = [Point(o.member.folder, o.spec) for o in _trained(outcomes)]
        mirror(chosen, store, runs.sweep_name or "")
    if request.format != "json":
        print("\n".join([*_table(outcomes), "", *pages.summary_lines(outcomes)]))
        print(f"adapters, cards and the page: {folder / folders.PAGE}")
    elif not waiting:
        print(json.dumps([plain_of(o) for o in outcomes]))
    return 0 if len(_trained(outcomes)) + waiting == len(found) else 1


def _say(error: str) -> None:
    print(f"error in {printable(error)}", file=sys.stderr)


def _trained(outcomes: Sequence[Outcome | Failed]) -> list[Outcome]:
    return [o for o in outcomes if isinstance(o, Outcome) and o.spec is not None]


def _waiting(runs: Request, outcomes: Sequence[Outcome | Failed], store: RunStore) -> int:
    """Count the customers whose unfinished runs are all in jobs of a cluster."""
    if runs.cluster.kind != "slurm":
        return 0
    queue = submissions.look(store.root)
    there = queue.covered().keys() | queue.unknown_runs()
    open_ = [
        [t for t in o.tried if t.state not in FINAL]
        for o in outcomes
        if isinstance(o, Outcome) and o.open
    ]
    return sum(all(t.run in there or t.state == "running" for t in tried) for tried in open_)


def members_asked_for(request: Request) -> list[Member | Failed]:
    """Return the customers of the table that a request names: their runs, or what is wrong.

    Raises:
        SpecError: no fleet can be trained so, or the table cannot be read.
    """
    return _decided(request)[1]


def _decided(request: Request) -> tuple[Rules, list[Member | Failed]]:
    """Return by which rules rows are read, and the customers.

    What stands on the command line comes first, then what the fleet's folder keeps. A fleet from
    before folders kept them goes on by the rules of then, if a run is there that other rules would
    train anew.

    Raises:
        SpecError: no fleet can be trained so, or the table cannot be read.
    """
    if request.exec.world_size > 1:
        raise SpecError("a fleet trains each pack in one process. Leave exec.world_size out.")
    spec = request.points[0].spec
    setup = Setup(
        base=spec,
        rates=request.rates,
        instead_of_full=request.instead_of_full,
        tokenizer_of=_tokenizers(request),
        data_dirs=_data_dirs(request),
    )
    check(setup)
    given = _given(request)
    kept = folders.read_rules(Path(_out(request)))
    if kept is not None:
        rules = dataclasses.replace(kept, **given)
        return rules, _members(request, dataclasses.replace(setup, rules=rules))
    rules = dataclasses.replace(Rules(layers=spec.method.plain()["layers"]), **given)
    found = _members(request, dataclasses.replace(setup, rules=rules))
    there = set(RunStore(request.exec.runs_dir).existing())
    if not there:
        return rules, found
    of_scale = {"template": spec.dataset.template, "render": spec.dataset.render}
    past = dataclasses.replace(rules, **of_scale, split=BY_ROW)
    then = _members(request, dataclasses.replace(setup, rules=past))
    if (_ids(then) - _ids(found)).isdisjoint(there):
        return rules, found
    print(
        "This fleet was trained before its folder recorded how rows are read. It keeps the prompt "
        f"form of scale={request.scale}, and held-out rows may share prompts with training rows. "
        "To train it by today's rules, add exec.runs_dir=DIR out=DIR.",
        file=sys.stderr,
    )
    return past, then


def _ids(found: Sequence[Member | Failed]) -> set[str]:
    return {p.id for m in found if isinstance(m, Member) for p in m.points}


READ = {"template", "render", "mask"}
"""Fields of a data set that a fleet takes from the command line."""


def _given(request: Request) -> dict[str, Any]:
    """Return the rules that stand on the command line.

    Raises:
        SpecError: a setting of the data set would have no effect.
    """
    keys, spec = set(request.given), request.points[0].spec
    asked = {k.removeprefix("dataset.") for k in keys if k.startswith("dataset.")}
    if asked - READ:
        raise SpecError(
            f"dataset.{min(asked - READ)} has no effect in a fleet, whose rows the table names. "
            f"Allowed: {', '.join(f'dataset.{name}' for name in sorted(READ))}; of one customer "
            "the column max_length."
        )
    form = asked & {"template", "render"} | ({"template", "render"} if "dataset" in keys else set())
    found: dict[str, Any] = {}
    if form:
        found["render"] = spec.dataset.render if "render" in form else FIRST_RENDER
        by_default = PLAIN if found["render"] == FIRST_RENDER else CHAT
        found["template"] = spec.dataset.template if "template" in form else by_default
    if "mask" in asked:
        found["mask"] = spec.dataset.mask
    if "method.layers" in keys:
        found["layers"] = spec.method.plain()["layers"]
    return found


def _members(request: Request, setup: Setup) -> list[Member | Failed]:
    rows = table.read(Path(request.customers).expanduser())
    found = members_of(rows, advise.known(request), setup)
    if not (request.hardware and hardware_of(request).has_speeds):
        return found
    planner = Forecaster(hardware_of(request), request.exec)
    return [_on_one_gpu(f, planner) if isinstance(f, Member) else f for f in found]


def _on_one_gpu(member: Member, planner: Forecaster) -> Member | Failed:
    """Refuse a customer whose base takes more than one GPU: its adapter would not be kept."""
    place = planner.kind(member.points[0].spec).place
    if isinstance(place, Misfit):
        why = f"{place.why}. It fits with {place.remedy}."
    elif place.layout.gpus > 1:
        why = (
            f"{member.points[0].spec.model.name} takes {place.layout.gpus} GPUs "
            f"({planner.hardware.name}), and a fleet trains on one each. Choose a smaller model, "
            "or larger GPUs (hardware=...)."
        )
    else:
        return member
    return Failed(member.where, member.name, [why])


def _tokenizers(request: Request) -> Callable[[ModelSpec], Any]:
    """Return a look-up of tokenizers that raises what is wrong with a base; each is tried once."""
    from lorasweep.models import load

    dirs = request.exec.models_dir
    fetched = request.cluster.kind == "slurm" and request.action != "fetch"

    @cache
    def look(model: ModelSpec) -> Any:
        try:
            load.check_available(model, dirs, fetched)
            found = load.tokenizer_of(model, dirs)
        except (ModelError, OSError, ValueError) as error:
            return error
        return found or ModelError(
            f"model {model.name!r} has no tokenizer, and customers' rows are text. Put its "
            "tokenizer's files beside the weights, or choose a model that reads text."
        )

    def tokenizer_of(model: ModelSpec) -> Any:
        found = look(model)
        if isinstance(found, Exception):
            raise found if isinstance(found, ModelError) else ModelError(str(found))
        return found

    return tokenizer_of


def _data_dirs(request: Request) -> list[str]:
    """Return where data are looked for: as the adviser does, first from the current folder."""
    return [os.getcwd(), *request.exec.data_dir]


def _request_of(request: Request, found: Sequence[Member | Failed]) -> Request:
    """Return the request for the runs of all customers."""
    exec_ = dataclasses.replace(
        request.exec, data_dir=_data_dirs(request), keep_weights=True, skip_broken_data=True
    )
    return dataclasses.replace(
        request,
        action="run" if request.action == "fleet" else request.action,
        out=_out(request),
        exec=exec_,
        points=[p for m in found if isinstance(m, Member) for p in m.points],
        sweep_name=_name(request),
        members=fleet_plain(found),
    )


def _name(request: Request) -> str:
    return "fleet-" + re.sub(r"[^\w.-]+", "_", Path(request.customers).stem)


def _out(request: Request) -> str:
    """Return the fleet's folder."""
    out = request.out or Path(request.exec.reports_dir) / _name(request)
    return str(Path(out).expanduser().absolute())


def _table(outcomes: Sequence[Outcome | Failed]) -> list[str]:
    """Return the outcomes for the terminal; what is wrong with a row was said before."""
    rows = [list(pages.HEAD)]
    for o in outcomes:
        cells = pages.cells(o)
        rows.append([*cells[:-1], f"{o.where}: see above"] if isinstance(o, Failed) else cells)
    last = len(pages.HEAD) - 1
    rows = [[printable(c)[: None if k == last else WIDTH] for k, c in enumerate(r)] for r in rows]
    return aligned(rows, [pages.HEAD.index(h) for h in pages.NUMBERS])

"""Train an adapter for each customer of a table: plan, status, training, folders, the page."""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lorasweep.advise import table
from lorasweep.advise.advice import Failed
from lorasweep.advise.page import printable
from lorasweep.cli.customers import advise
from lorasweep.cli.finished_runs import write_adapter
from lorasweep.errors import ModelError, SpecError
from lorasweep.fleet import pages
from lorasweep.fleet.members import Member, Setup, check, members_of
from lorasweep.fleet.outcome import Outcome, outcome_of, plain_of
from lorasweep.spec.model import ModelSpec
from lorasweep.store import checkpoint
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.aligned import aligned
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import Request

ADAPTER = "adapter_model.safetensors"
CARD, FACTS, PAGE = "README.md", "facts.json", "index.html"
WIDTH = 34
"""Letters of a cell in the table of the terminal."""
STOPPED = 130


def show(request: Request, store: RunStore, act: Callable[[Request], int]) -> int:
    """Do what a request asks for the customers of its table; return the exit status.

    `act` trains, plans or shows the runs of a request, as those of any other. The status is 1 if a
    customer could not be planned or got no adapter.
    """
    found = _members(request)
    members = [m for m in found if isinstance(m, Member)]
    wrong = [f for f in found if isinstance(f, Failed)]
    quiet = request.format == "json"
    for failed in wrong:
        print(f"error in {printable(failed.error)}", file=sys.stderr)
    runs = _request_of(request, [p for m in members for p in m.points])
    if request.action != "fleet":
        return max(act(runs) if members else 0, int(bool(wrong)))
    status = act(runs) if members else 0
    if status == STOPPED:
        return status
    outcomes = [outcome_of(f, store) if isinstance(f, Member) else f for f in found]
    name = runs.sweep_name or ""
    folder = Path(request.out or Path(request.exec.reports_dir) / name)
    outcomes = [_kept(o, store, folder) if isinstance(o, Outcome) else o for o in outcomes]
    folder.mkdir(parents=True, exist_ok=True)
    pages.write(folder / PAGE, pages.page(outcomes, Path(request.customers).stem))
    if request.mirror == "wandb":
        from lorasweep.tracking.wandb import mirror

        chosen = [Point(o.member.folder, o.spec) for o in _trained(outcomes)]
        mirror(chosen, store, name)
    if quiet:
        print(json.dumps([plain_of(o) for o in outcomes]))
    else:
        print("\n".join([*_table(outcomes), "", *pages.summary_lines(outcomes)]))
        print(f"adapters, cards and the page: {folder / PAGE}")
    return 0 if len(_trained(outcomes)) == len(found) else 1


def _trained(outcomes: Sequence[Outcome | Failed]) -> list[Outcome]:
    return [o for o in outcomes if isinstance(o, Outcome) and o.spec is not None]


def _members(request: Request) -> list[Member | Failed]:
    if request.cluster.kind == "slurm" or request.exec.world_size > 1:
        raise SpecError(
            "a fleet is trained on this machine, one process a pack. Leave cluster=slurm and "
            "exec.world_size out."
        )
    exec_ = request.exec
    setup = Setup(
        base=request.points[0].spec,
        rates=request.rates,
        instead_of_full=request.instead_of_full,
        tokenizer_of=cache(lambda model: _tokenizer(model, exec_.models_dir)),
        data_dirs=_data_dirs(request),
    )
    check(setup)
    rows = table.read(Path(request.customers).expanduser())
    return members_of(rows, advise.known(request), setup)


def _tokenizer(model: ModelSpec, models_dirs: Sequence[str]) -> Any:
    from lorasweep.models.load import tokenizer_of

    found = tokenizer_of(model, models_dirs)
    if found is None:
        raise SpecError(
            f"model {model.name!r} has no tokenizer, and customers' rows are text. Choose a model "
            "that reads text."
        )
    return found


def _data_dirs(request: Request) -> list[str]:
    """Return where data are looked for: as the adviser does, first from the current folder."""
    return [os.getcwd(), *request.exec.data_dir]


def _request_of(request: Request, points: list[Point]) -> Request:
    """Return the request for the runs of all customers."""
    exec_ = dataclasses.replace(
        request.exec, data_dir=_data_dirs(request), keep_weights=True, skip_broken_data=True
    )
    action = "run" if request.action == "fleet" else request.action
    name = f"fleet-{Path(request.customers).stem}"
    changes: dict[str, Any] = {"action": action, "customers": "", "mirror": "none"}
    return dataclasses.replace(request, **changes, exec=exec_, points=points, sweep_name=name)


def _kept(outcome: Outcome, store: RunStore, folder: Path) -> Outcome:
    """Write a customer's folder, unless it is there already; drop what other rates trained.

    A folder is exchanged as a whole, so a reader never meets a new adapter with an old card.
    """
    if outcome.spec is None:
        return outcome
    mine, facts = folder / outcome.member.folder, json.dumps(outcome.plain(), indent=1)
    there = mine / FACTS
    if not (there.is_file() and there.read_text() == facts and (mine / ADAPTER).is_file()):
        try:
            _write(outcome, store, mine, facts)
        except ModelError as error:
            return dataclasses.replace(outcome, spec=None, result={}, problem=str(error))
    for tried in outcome.tried:
        if tried.run != outcome.spec.id:
            (store.folder(tried.run) / checkpoint.WEIGHTS).unlink(missing_ok=True)
    return outcome


def _write(outcome: Outcome, store: RunStore, folder: Path, facts: str) -> None:
    """Write a customer's folder.

    Raises:
        ModelError: its weights are not there, or are not what PEFT would read.
    """
    spec = outcome.spec
    assert spec is not None
    weights = checkpoint.load_weights(store.folder(spec.id))
    if weights is None:
        raise ModelError(
            f"the weights of run {spec.id} were not kept, as other rates were chosen before or it "
            "was trained in a sweep. Train it again: python -m lorasweep action=adapter "
            f"run={spec.id} out=FOLDER"
        )
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    write_adapter(partial, spec, weights, outcome.result.get("base_commit"))
    pages.write(partial / CARD, pages.card(outcome))
    (partial / FACTS).write_text(facts)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _table(outcomes: Sequence[Outcome | Failed]) -> list[str]:
    rows = [list(pages.HEAD), *(pages.cells(o) for o in outcomes)]
    last = len(pages.HEAD) - 1
    rows = [[printable(c)[: None if k == last else WIDTH] for k, c in enumerate(r)] for r in rows]
    return aligned(rows, [pages.HEAD.index(h) for h in pages.NUMBERS])

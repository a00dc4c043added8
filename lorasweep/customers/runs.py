"""Build the runs from which each customer's adapter is chosen, or say what is wrong.

Also decides the rules by which a fleet reads rows: from the command line, else from the folder.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from lorasweep.customers.advice import advise
from lorasweep.customers.customer_sweep import middle_rates, plain_name
from lorasweep.customers.evidence import Known
from lorasweep.customers.read import COLUMNS, Customer, Failed, RowError, shape_of
from lorasweep.customers.rows import BY_ROW, CHAT, PLAIN, SPLITS, Rows, Rules, rows_of, with_lengths
from lorasweep.customers.rules.rates import ALPHA
from lorasweep.errors import DataError, ModelError, SpecError
from lorasweep.methods.lora import LoRA
from lorasweep.plan.forecast import Forecaster
from lorasweep.plan.placement import Misfit
from lorasweep.spec.canonical import not_allowed
from lorasweep.spec.dataset import FIRST_RENDER
from lorasweep.spec.evaluations import why_not_early
from lorasweep.spec.method import parse_layers
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import validate
from lorasweep.store import files
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point, around
from lorasweep.sweep.request import Request

APART = 3.0
"""Factor between the learning rates that are tried, as in public grids (rules/rates.py, STEP): a
learning rate between two of them is within a factor 1.7 of one."""
MOST_RATES = 9
FORM = {"template", "render", "mask"}
"""Fields of a data set that a fleet takes from the command line."""
SAFE = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
RULES = "fleet.json"
"""File in a fleet's folder that records how rows are read and what is adapted."""


@dataclass(frozen=True)
class Member:
    """A customer of a fleet with the runs that are trained for it, or with what is wrong."""

    where: str
    """Its place in the table, such as 'row 3'."""
    name: str
    folder: str
    """Its name, safe as the name of a folder; also of its data set and in what is printed."""
    problem: str = ""
    """Why it has no runs. Then the fields below have no values."""
    advised: dict[str, Any] = field(default_factory=dict)
    """What its card repeats of the advice: method, why, rank, load, lr_source and warnings."""
    rows: Rows = None  # type: ignore[assignment]
    points: list[Point] = field(default_factory=list)
    """A run for each learning rate, lowest first."""
    not_early: str = ""
    """Why it is trained without the early stopping that was requested."""

    def plain(self) -> dict[str, Any]:
        """Return it as JSON values without its runs, for `planned`."""
        values = {**vars(self), "points": []}
        if self.points:
            values["rows"] = {k: v for k, v in vars(self.rows).items() if k != "dataset"}
        return values


def planned(fleet: Iterable[dict[str, Any]], points: Iterable[Point]) -> list[Member]:
    """Rebuild a fleet from the values of `Member.plain` and the runs of all its members."""
    runs: dict[str, list[Point]] = {}
    for p in points:
        runs.setdefault(p.arm, []).append(p)
    found = []
    for values in fleet:
        if values["rows"] is not None:  # else it has no runs
            mine = runs[values["folder"]]
            rows = Rows(dataset=mine[0].spec.dataset, **values["rows"])
            values = {**values, "rows": rows, "points": mine}
        found.append(Member(**values))
    return found


def folder_of(name: str) -> str:
    """Return a name that is safe as a folder's on any file system, unique for each customer."""
    if SAFE.fullmatch(name):
        return name
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{plain_name(name)[:48]}-{digest}"


# ---------------------------------------------------------------- customers to runs


def build_runs(
    customers: Iterable[Customer | Failed],
    known: Known,
    request: Request,
    rules: Rules,
    tokenizer_of: Callable[[ModelSpec], Any],
) -> list[Member]:
    """Advise each customer and build its runs; one that is wrong does not affect the others.

    Args:
        customers: rows of the table.
        known: what the advice is based on. If it names GPUs, a base must fit on one of them.
        request: its one run is the start of all runs; model, data set, rank, alpha, layers,
            learning rate, batch and updates are replaced.
        rules: how rows are read.
        tokenizer_of: raises a ModelError where a base cannot be had.

    Raises:
        SpecError: adapters cannot be trained with the settings of the request.
    """
    base = request.points[0].spec
    if not isinstance(base.method, LoRA) or base.objective != "sft":
        raise SpecError(
            f"method={base.method.name} objective={base.objective}: a fleet trains adapters on "
            "given answers. Set method=lora and objective=sft."
        )
    if request.rates != 1 and not 3 <= request.rates <= MOST_RATES:
        raise SpecError(
            f"rates={request.rates}. Expected advised, or the number of learning rates around the "
            f"advised one: 3 to {MOST_RATES}."
        )
    if base.early_stopping < 0:
        raise SpecError(
            f"early_stopping={base.early_stopping}. Expected 0 (off), or the number of evaluations "
            "in a row without improvement after which a run ends: 2 or 3."
        )
    if request.instead_of_full not in ("", "lora"):
        raise SpecError(not_allowed("instead_of_full", request.instead_of_full, ("", "lora")))
    hardware = known.hardware
    planner = Forecaster(hardware, request.exec) if hardware and hardware.has_speeds else None
    found = []
    for c in customers:
        try:
            if not isinstance(c, Failed):
                found.append(_member(c, known, request, rules, tokenizer_of, planner))
                continue
            failed = c
        except (RowError, SpecError) as error:
            failed = Failed(c.where, c.name, getattr(error, "problems", [str(error)]))
        found.append(Member(failed.where, failed.name, folder_of(failed.name), failed.error))
    return found


def _member(
    c: Customer,
    known: Known,
    request: Request,
    rules: Rules,
    tokenizer_of: Callable[[ModelSpec], Any],
    planner: Forecaster | None,
) -> Member:
    """Read and tokenize a customer's rows, take advice, and make a run for each learning rate.

    Raises:
        RowError, SpecError: they cannot be trained.
    """
    model = shape_of(c, known.models)
    if c.task != "sft":
        raise RowError(f"column task: a fleet is trained on answers, not by {c.task}.")
    if c.data is None:
        raise RowError(
            "column data: missing. It holds a .jsonl file, a folder with train.jsonl, or a "
            "data set of the hub as owner/name."
        )
    try:
        tokenizer = tokenizer_of(model)
    except ModelError as error:
        raise RowError(f"column model: {error}") from None
    folder = folder_of(c.name)
    try:
        rows = rows_of(folder, c.data, rules, tokenizer)
        rows, tokens = with_lengths(rows, tokenizer, c.max_length, data_dirs(request))
    except (DataError, OSError) as error:
        raise RowError(f"column data: {error}") from None
    if tokens < COLUMNS["tokens_per_example"].low:
        raise RowError(f"column data: {tokens:.2g} tokens of a mean row bear loss. Expected 1.")
    counted: dict[str, Any] = {
        "max_length": c.max_length or rows.dataset.max_length,
        "tokens_per_example": c.tokens_per_example or round(tokens, 1),
    }
    on_hub = rows.dataset.source == "hub"
    if on_hub:  # counted here, as the adviser does not use the network
        counted |= {"examples": c.examples or rows.n_train, "data": None}
    advice = advise(dataclasses.replace(c, **counted), known)
    choice, batch, base = advice.choice, advice.work.batch_size, request.points[0].spec
    if choice.method == "full" and not request.instead_of_full:
        raise RowError(
            f"the adviser says full fine-tuning: {choice.why}. Add instead_of_full=lora to "
            f"train LoRA of rank {choice.rank} nevertheless; its card will say so."
        )
    size: dict[str, Any] = {"rank": choice.rank, "alpha": ALPHA, "layers": rules.layers}
    steps = c.steps or max(1, math.ceil(rows.n_train * (c.epochs or 1.0) / batch))
    rate, patience = middle_rates(advice)[0], base.early_stopping
    not_early = why_not_early(patience, steps, rows.dataset.n_validation) if patience else ""
    spec = dataclasses.replace(
        base,
        model=advice.model,
        dataset=rows.dataset,
        method=dataclasses.replace(base.method, **size),
        batch_size=batch,
        steps=steps,
        lr=rate,
        early_stopping=0 if not_early else patience,
    )
    tried = request.rates if rows.held_out else 1
    rates = [rate] if tried == 1 else around(rate, tried, APART)
    points = [Point(folder, dataclasses.replace(spec, lr=lr)) for lr in rates]
    for p in points:
        validate(p.spec)
    if planner is not None:  # the adapter of a base on several GPUs would not be kept
        place = planner.kind(points[0].spec).place
        if isinstance(place, Misfit):
            raise RowError(f"{place.why}. It fits with {place.remedy}.")
        if place.layout.gpus > 1:
            raise RowError(
                f"{model.name} takes {place.layout.gpus} GPUs ({planner.hardware.name}), and a "
                "fleet trains on one each. Choose a smaller model, or larger GPUs (hardware=...)."
            )
    warnings = advice.warnings
    if not on_hub:  # a card names no folder of this machine
        warnings = [text.replace(c.data, Path(c.data).name) for text in warnings]
    advised = {key: getattr(choice, key) for key in ("method", "why", "rank", "load")}
    advised |= {"lr_source": advice.rate.source, "warnings": warnings}
    return Member(c.where, c.name, folder, "", advised, rows, points, not_early)


# ---------------------------------------------------------------- a request's fleet


def fleet_of(
    request: Request, customers: Sequence[Customer | Failed], known: Known
) -> tuple[Rules, list[Member]]:
    """Return the rules by which rows are read, and the customers with their runs.

    The command line comes first, then the rules in the fleet's folder. A fleet that was trained
    before folders recorded rules keeps the rules of that time, if runs exist that today's rules
    would train again.

    Raises:
        SpecError: the settings are not those of a fleet.
    """
    if request.exec.world_size > 1:
        raise SpecError("a fleet trains each pack in one process. Leave exec.world_size out.")
    spec, given = request.points[0].spec, _given(request)
    members = partial(build_runs, customers, known, request, tokenizer_of=_tokenizers(request))
    kept = read_rules(fleet_folder(request))
    rules = dataclasses.replace(kept or Rules(layers=spec.method.plain()["layers"]), **given)
    found = members(rules)
    there = set() if kept else set(RunStore(request.exec.runs_dir).existing())
    if not there:
        return rules, found
    data = spec.dataset
    past = dataclasses.replace(rules, template=data.template, render=data.render, split=BY_ROW)
    then = members(past)
    now, before = ({p.id for m in fleet for p in m.points} for fleet in (found, then))
    if (before - now).isdisjoint(there):
        return rules, found
    print(
        "This fleet was trained before its folder recorded how rows are read. It keeps the prompt "
        f"form of scale={request.scale}, and held-out rows may share prompts with training rows. "
        "To train it by today's rules, add exec.runs_dir=DIR out=DIR.",
        file=sys.stderr,
    )
    return past, then


def _given(request: Request) -> dict[str, Any]:
    """Return the rules that the command line sets.

    Raises:
        SpecError: a setting of the data set would have no effect.
    """
    keys, spec = set(request.given), request.points[0].spec
    data, named = spec.dataset, {k[len("dataset.") :] for k in keys if k.startswith("dataset.")}
    if named - FORM:
        raise SpecError(
            f"dataset.{min(named - FORM)} has no effect in a fleet, whose rows the table names. "
            f"Allowed: {', '.join(f'dataset.{name}' for name in sorted(FORM))}; of one customer "
            "the column max_length."
        )
    found: dict[str, Any] = {}
    if "dataset" in keys or named - {"mask"}:
        whole = "dataset" in keys
        found["render"] = data.render if whole or "render" in named else FIRST_RENDER
        by_default = PLAIN if found["render"] == FIRST_RENDER else CHAT
        found["template"] = data.template if whole or "template" in named else by_default
    if "mask" in named:
        found["mask"] = data.mask
    if "method.layers" in keys:
        found["layers"] = spec.method.plain()["layers"]
    return found


def _tokenizers(request: Request) -> Callable[[ModelSpec], Any]:
    """Return a function that loads a base's tokenizer, once each, or raises a ModelError."""
    from lorasweep.models import load

    dirs = request.exec.models_dir
    fetched = request.cluster.kind == "slurm" and request.action != "fetch"

    @cache
    def load_once(model: ModelSpec) -> Any:
        try:
            load.check_available(model, dirs, fetched)
            return load.tokenizer_of(model, dirs) or ModelError(
                f"model {model.name!r} has no tokenizer, and customers' rows are text. Put its "
                "tokenizer's files beside the weights, or choose a model that reads text."
            )
        except (ModelError, OSError, ValueError) as error:
            return ModelError(str(error))

    def tokenizer_of(model: ModelSpec) -> Any:
        found = load_once(model)
        if isinstance(found, ModelError):
            raise found
        return found

    return tokenizer_of


def data_dirs(request: Request) -> list[str]:
    """Return where data are looked for: as the adviser does, first in the current folder."""
    return [os.getcwd(), *request.exec.data_dir]


def fleet_name(request: Request) -> str:
    """Return the name of a table's fleet."""
    return "fleet-" + re.sub(r"[^\w.-]+", "_", Path(request.customers).stem)


def fleet_folder(request: Request) -> Path:
    """Return the fleet's folder: out, or below the reports."""
    out = request.out or Path(request.exec.reports_dir) / fleet_name(request)
    return Path(out).expanduser().absolute()


# ---------------------------------------------------------------- rules kept in a fleet's folder


def read_rules(folder: Path) -> Rules | None:
    """Return the rules that a fleet's folder keeps; None if there are none.

    Raises:
        SpecError: they cannot be read.
    """
    path = folder / RULES
    if not path.exists():
        return None
    try:
        found = Rules(**json.loads(path.read_text()))
        parse_layers(found.layers)
        if found.split not in SPLITS or (found.render is None) != (found.template is None):
            raise ValueError(f"{json.dumps(vars(found))} is not known")
        return found
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise SpecError(
            f"{path} cannot be read ({error}). It records how this fleet's rows are read. Restore "
            "it, or name another folder with out=DIR, or delete it: then runs may be trained again "
            "by other rules."
        ) from None


def write_rules(folder: Path, rules: Rules) -> None:
    """Keep the rules in a fleet's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomic(folder / RULES, json.dumps(vars(rules), indent=1).encode())

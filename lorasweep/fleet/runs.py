"""Build the runs of each customer, one for each learning rate, or report the row's problem.

The rules by which a fleet reads rows come from the command line or the fleet's folder.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasweep.advise.advice import advise
from lorasweep.advise.read import Customer, RowError, shape_of
from lorasweep.advise.rules import APART, MOST_RATES, Known
from lorasweep.data.column_names import CHAT, EXPECTED, PLAIN
from lorasweep.errors import DataError, ModelError, SpecError
from lorasweep.fleet.rows import Rows, Rules, rows_of
from lorasweep.fleet.serving import PEFT, Profile, adapted
from lorasweep.methods.lora import LoRA
from lorasweep.plan.planner import Planner
from lorasweep.spec.dataset import FIRST_RENDER
from lorasweep.spec.method import parse_layers
from lorasweep.spec.metric import why_not_early
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.recommended import ALPHA, LAYERS
from lorasweep.spec.run import validate
from lorasweep.sweep.grid import Point, around
from lorasweep.sweep.request import Request

FACTOR = 10.0
"""LoRA's learning rate / full fine-tuning's, where the adviser says full fine-tuning."""
RULES = "fleet.json"
"""File in a fleet's folder that keeps its Rules."""
FORM = ("dataset", "dataset.mask", "dataset.render", "dataset.template")
"""Settings that say for all customers how rows are read, beside the columns of the table."""
BY_CUSTOMER = re.compile(r"model(\..*)?|dataset\..*|lr|batch_size|steps|method\.(rank|alpha)")
"""Settings that each customer has its own values of."""


@dataclass(frozen=True)
class Member:
    """A customer of a fleet, with runs or with a problem."""

    where: str
    name: str
    folder: str
    """Name of the customer's folder; also the arm of the runs, and the name of the data set."""
    problem: str = ""
    """Why there are no runs; in this case the fields below have no values."""
    advised: dict[str, Any] = field(default_factory=dict)
    """Fields of the advice that the card shows: method, why, rank, load, lr_source, warnings."""
    rows: Rows = None  # type: ignore[assignment]
    points: list[Point] = field(default_factory=list)
    """A run for each learning rate, lowest first; in `planned`, all that `with_further` returns."""
    not_early: str = ""
    served: dict[str, str] = field(default_factory=dict)
    """For a server: its name, the architecture of the base if it matters, and why the unembedding
    was left out."""
    license: dict[str, str] = field(default_factory=dict)
    """License of the base, as in the head of a model card; empty: not known."""

    def plain(self) -> dict[str, Any]:
        """Return JSON values, from which `planned` rebuilds the Member together with the runs."""
        rows = {k: v for k, v in vars(self.rows).items() if k != "dataset"} if self.rows else None
        return {**vars(self), "points": [], "rows": rows}


def planned(fleet: Iterable[dict[str, Any]], points: Iterable[Point]) -> list[Member]:
    """Rebuild a fleet from the values of `Member.plain` and the runs of all customers."""
    found, runs = [], list(points)
    for values in fleet:
        if values["rows"] is not None:  # None: the customer has no runs
            mine = [p for p in runs if p.arm == values["folder"]]
            rows = Rows(dataset=mine[0].spec.dataset, **values["rows"])
            values = {**values, "rows": rows, "points": mine}
        found.append(Member(**values))
    return found


def folder_of(name: str) -> str:
    """Return a name for a customer's folder, safe on any file system and unique."""
    if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
        return name
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "customer"
    return f"{plain[:48]}-{digest}"


# ---------------------------------------------------------------- customers to runs


def build_runs(
    customers: Iterable[Customer | RowError],
    known: Known,
    request: Request,
    rules: Rules,
    tokenizer_of: Callable[[ModelSpec], Any],
    profile: Profile = PEFT,
) -> list[Member]:
    """Advise each customer and build its runs; a wrong row does not affect other customers.

    Args:
        known: basis of the advice. If the hardware has speeds, a base must fit on one GPU.
        request: all runs are copies of the one run in it, with other model, data set, rank, alpha,
            layers, learning rate, batch size and number of updates.
        tokenizer_of: returns the tokenizer of a base; None: it reads no text.

    Raises:
        SpecError: adapters cannot be trained with the settings of the request.
    """
    base, hardware = request.points[0].spec, known.hardware
    known = dataclasses.replace(known, layers=rules.counted_layers)
    if not isinstance(base.method, LoRA) or base.objective != "sft":
        raise SpecError(
            f"method={base.method.name} objective={base.objective}: a fleet trains adapters on "
            "given answers. Set method=lora and objective=sft."
        )
    if request.rates != 1 and not 3 <= request.rates <= MOST_RATES:
        raise SpecError(
            f"rates={request.rates}. Expected advised, or a number of 3 to {MOST_RATES}."
        )
    planner = Planner(hardware, request.exec) if hardware and hardware.has_speeds else None

    def member(c: Customer) -> Member:
        """Read a customer's rows, advise, and build the runs."""
        model, folder = shape_of(c, known.models), folder_of(c.name)
        if c.task != "sft":
            raise RowError(f"column task: a fleet is trained on answers, not by {c.task}.")
        if c.data is None:
            raise RowError(f"column data: missing. It holds {EXPECTED}.")
        try:
            tokenizer = tokenizer_of(model)
        except (ModelError, OSError, ValueError) as error:
            raise RowError(f"column model: {error}") from None
        if tokenizer is None:
            raise RowError(f"column model: {model.name} has no tokenizer, and rows are text.")
        try:
            rows, tokens = rows_of(folder, c.data, rules, tokenizer, c.validation, c.max_length)
        except (DataError, OSError, RuntimeError) as error:  # RuntimeError: no home for ~user
            raise RowError(f"column data: {error}") from None
        if tokens < 1:
            raise RowError(
                f"column data: a mean row has {tokens:.2g} loss tokens. Expected 1 or more."
            )
        counted: dict[str, Any] = {
            "max_length": rows.dataset.max_length,
            "tokens_per_example": c.tokens_per_example or round(tokens, 1),
        }
        on_hub = rows.dataset.source == "hub"
        if on_hub:  # pass the counts, as the adviser does not use the network
            counted |= {"examples": c.examples or rows.n_train, "data": None}
        advice = advise(dataclasses.replace(c, **counted), known)
        rate = advice.rate.rate
        if advice.method == "full":  # the advised learning rate is full fine-tuning's
            if not request.instead_of_full:
                raise RowError(
                    f"the adviser says full fine-tuning: {advice.why}. Add instead_of_full=lora to "
                    f"train LoRA of rank {advice.rank} nevertheless; its card will say so."
                )
            rate *= FACTOR
        layers, by = rules.layers, dict[str, str]()
        if profile != PEFT:
            from lorasweep.models.load import architecture_of

            profile.largest_rank(advice.rank)
            architecture = architecture_of(model, models_dirs=request.exec.models_dir)
            layers, left_out = adapted(profile, layers, model, architecture)
            by = {"by": profile.server, "architecture": architecture, "left_out": left_out}
        steps = c.steps or max(1, math.ceil(rows.n_train * (c.epochs or 1.0) / advice.batch_size))
        size: dict[str, Any] = {"rank": advice.rank, "alpha": ALPHA, "layers": layers}
        patience = base.early_stopping
        not_early = (
            why_not_early(patience, steps, rows.dataset.n_validation) if patience > 0 else ""
        )
        spec = dataclasses.replace(
            base,
            model=advice.model,
            dataset=rows.dataset,
            method=dataclasses.replace(base.method, **size),
            batch_size=advice.batch_size,
            steps=steps,
            lr=rate,
            early_stopping=0 if not_early else patience,
        )
        tried = request.rates if rows.held_out else 1
        rates = [rate] if tried == 1 else around(rate, tried, APART)
        points = [Point(folder, dataclasses.replace(spec, lr=lr)) for lr in rates]
        for p in points:
            validate(p.spec)
        if planner is not None:  # a run on several GPUs would not keep the adapter
            place = planner.kind(points[0].spec).place
            if place.why:
                raise RowError(f"{place.why}. It fits with {place.remedy.replace('dataset.', '')}.")
            if place.layout.gpus > 1:
                raise RowError(
                    f"{model.name} takes {place.layout.gpus} GPUs ({planner.hardware.name}), but a "
                    "run of a fleet uses one. Choose a smaller model, or larger GPUs (hardware=)."
                )
        warnings = [*advice.warnings, *filter(None, [rows.warning])]
        # a card names no folder of this machine
        for path in filter(os.path.exists, (c.data or "", c.model.removesuffix("/config.json"))):
            warnings = [text.replace(path, Path(path).name) for text in warnings]
        advised = {key: getattr(advice, key) for key in ("method", "why", "rank", "load")}
        advised |= {"lr_source": advice.rate.source, "warnings": warnings}
        return Member(c.where, c.name, folder, "", advised, rows, points, not_early, by)

    found = []
    for c in customers:
        try:
            if isinstance(c, RowError):
                raise c
            found.append(member(c))
        except (RowError, SpecError, ModelError) as error:
            wrong = RowError(*getattr(error, "problems", [str(error)]), where=c.where)
            found.append(Member(c.where, c.name, folder_of(c.name), wrong.error))
    return found


# ---------------------------------------------------------------- the fleet's folder and its rules


def rules_of(request: Request) -> Rules:
    """Return how the rows of a fleet are read: the command line's rules, then the folder's.

    Raises:
        SpecError: a setting has no effect in a fleet, or the folder's rules cannot be read.
    """
    given, spec = set(request.given), request.points[0].spec
    if unread := sorted(k for k in given - {*FORM} if BY_CUSTOMER.fullmatch(k)):
        raise SpecError(
            f"{unread[0]} has no effect: a fleet takes model, data, batch_size, steps and "
            "max_length from the table's columns, and rank, alpha and learning rates from the "
            f"adviser. Allowed: {', '.join(FORM)}."
        )
    new: dict[str, Any] = {}
    whole, render = "dataset" in given, "dataset.render" in given
    if whole or render or "dataset.template" in given:
        new["render"] = spec.dataset.render if whole or render else FIRST_RENDER
        new["template"] = PLAIN if new["render"] == FIRST_RENDER else CHAT
        if whole or "dataset.template" in given:
            new["template"] = spec.dataset.template
    layers = spec.method.plain()["layers"] if "method.layers" in given else LAYERS
    for key, name, value in (
        ("dataset.mask", "mask", spec.dataset.mask),
        ("serve", "serve", request.serve),
        ("method.layers", "layers", layers),
    ):
        if key in given:
            new[name] = value
    kept = read_rules(Path(request.out))
    return dataclasses.replace(
        kept or Rules(None, None, None, layers, layers, "all", whole_prompt=True), **new
    )


def read_rules(folder: Path) -> Rules | None:
    """Return the rules kept in a fleet's folder, if any; SpecError: they cannot be read."""
    path = folder / RULES
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        split, found = values.pop("split", "prompt"), Rules(**values)
        parse_layers(found.layers)
        known = split == "prompt" and found.answers in ("last", "all")
        if not known or (found.render is None) != (found.template is None):
            raise ValueError(f"{values} is not known")
        return found
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise SpecError(
            f"{path}, which says how this fleet's rows are read, cannot be read ({error}). Restore "
            "it, or name another folder with out=DIR."
        ) from None

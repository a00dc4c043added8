"""Build the runs of each customer, one for each learning rate, or report the row's problem.

The rules by which a fleet reads rows come from the command line or the fleet's folder.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from lorasweep.advise.advice import advise
from lorasweep.advise.evidence import Known
from lorasweep.advise.read import COLUMNS, Customer, Failed, RowError, shape_of
from lorasweep.advise.rules.rates import ALPHA, APART, MOST_RATES
from lorasweep.data.own import CHAT, EXPECTED, PLAIN
from lorasweep.errors import DataError, ModelError, SpecError, unknown
from lorasweep.fleet.rows import SPLITS, Rows, Rules, rows_of, with_lengths
from lorasweep.fleet.serving import PEFT, Profile, adapted
from lorasweep.methods.lora import LoRA
from lorasweep.plan.planner import Planner
from lorasweep.spec.dataset import FIRST_RENDER
from lorasweep.spec.evaluations import why_not_early
from lorasweep.spec.method import parse_layers
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import validate
from lorasweep.store import folders
from lorasweep.sweep.grid import Point, around
from lorasweep.sweep.request import Request

FACTOR = 10.0
"""LoRA's learning rate / full fine-tuning's, where the adviser says full fine-tuning."""
FORM = {"template", "render", "mask"}
"""Fields of a data set that the command line may set for a fleet."""
SAFE = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
RULES = "fleet.json"
"""File in a fleet's folder that keeps its Rules."""


@dataclass(frozen=True)
class Member:
    """A customer of a fleet, with runs or with a problem."""

    where: str
    """Place in the table, such as 'row 3'."""
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
    """Why early stopping, although requested, is off."""
    served: dict[str, str] = field(default_factory=dict)
    """For a server: its name, the architecture of the base if it matters, and why the unembedding
    was left out."""
    license: dict[str, str] = field(default_factory=dict)
    """License of the base, as in the head of a model card; empty: not known."""

    def plain(self) -> dict[str, Any]:
        """Return JSON values, from which `planned` rebuilds the Member together with the runs."""
        values = {**vars(self), "points": []}
        if self.points:
            values["rows"] = {k: v for k, v in vars(self.rows).items() if k != "dataset"}
        return values


def planned(fleet: Iterable[dict[str, Any]], points: Iterable[Point]) -> list[Member]:
    """Rebuild a fleet from the values of `Member.plain` and the runs of all customers."""
    runs: dict[str, list[Point]] = {}
    for p in points:
        runs.setdefault(p.arm, []).append(p)
    found = []
    for values in fleet:
        if values["rows"] is not None:  # None: the customer has no runs
            mine = runs[values["folder"]]
            rows = Rows(dataset=mine[0].spec.dataset, **values["rows"])
            values = {**values, "rows": rows, "points": mine}
        found.append(Member(**values))
    return found


def plain_name(name: str) -> str:
    """Return a name in small letters, digits and underscores, for files and options."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "customer"


def folder_of(name: str) -> str:
    """Return a name for a customer's folder, safe on any file system and unique."""
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
    profile: Profile = PEFT,
    architecture_of: Callable[[ModelSpec], str] = lambda model: "",
) -> list[Member]:
    """Advise each customer and build its runs; a wrong row does not affect other customers.

    Args:
        known: basis of the advice. If the hardware has speeds, a base must fit on one GPU.
        request: all runs are copies of the one run in it, with other model, data set, rank, alpha,
            layers, learning rate, batch size and number of updates.
        tokenizer_of: returns the tokenizer of a base, or the error why there is none.
        architecture_of: returns the class that a base's config.json names; '' if it names none.

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
    hardware = known.hardware
    planner = Planner(hardware, request.exec) if hardware and hardware.has_speeds else None
    found = []
    for c in customers:
        if not isinstance(c, Failed):
            try:
                served = partial(_served, profile, rules.layers, architecture_of)
                found.append(_member(c, known, request, rules, tokenizer_of, planner, served))
                continue
            except (RowError, SpecError, ModelError) as error:
                c = Failed(c.where, c.name, getattr(error, "problems", [str(error)]))
        found.append(Member(c.where, c.name, folder_of(c.name), c.error))
    return found


def _member(
    c: Customer,
    known: Known,
    request: Request,
    rules: Rules,
    tokenizer_of: Callable[[ModelSpec], Any],
    planner: Planner | None,
    served: Callable[[ModelSpec, int], tuple[str, dict[str, str]]],
) -> Member:
    """Read a customer's rows, advise, and build the runs; RowError, SpecError: the row is wrong."""
    model = shape_of(c, known.models)
    if c.task != "sft":
        raise RowError(f"column task: a fleet is trained on answers, not by {c.task}.")
    if c.data is None:
        raise RowError(f"column data: missing. It holds {EXPECTED}.")
    tokenizer = tokenizer_of(model)
    if isinstance(tokenizer, Exception):
        raise RowError(f"column model: {tokenizer}")
    folder = folder_of(c.name)
    try:
        rows = rows_of(folder, c.data, rules, tokenizer, c.validation)
        rows, tokens = with_lengths(rows, tokenizer, c.max_length, data_dirs(request))
    except (DataError, OSError) as error:
        raise RowError(f"column data: {error}") from None
    if tokens < COLUMNS["tokens_per_example"].low:
        raise RowError(f"column data: a mean row has {tokens:.2g} loss tokens. Expected 1 or more.")
    counted: dict[str, Any] = {
        "max_length": c.max_length or rows.dataset.max_length,
        "tokens_per_example": c.tokens_per_example or round(tokens, 1),
    }
    on_hub = rows.dataset.source == "hub"
    if on_hub:  # pass the counts, as the adviser does not use the network
        counted |= {"examples": c.examples or rows.n_train, "data": None}
    advice = advise(dataclasses.replace(c, **counted), known)
    choice, batch, base = advice.choice, advice.work.batch_size, request.points[0].spec
    if choice.method == "full" and not request.instead_of_full:
        raise RowError(
            f"the adviser says full fine-tuning: {choice.why}. Add instead_of_full=lora to "
            f"train LoRA of rank {choice.rank} nevertheless; its card will say so."
        )
    layers, by = served(advice.model, choice.rank)
    size: dict[str, Any] = {"rank": choice.rank, "alpha": ALPHA, "layers": layers}
    steps = c.steps or max(1, math.ceil(rows.n_train * (c.epochs or 1.0) / batch))
    rate, patience = advice.rate.rate, base.early_stopping
    if choice.method == "full":  # the advised learning rate is full fine-tuning's
        rate *= FACTOR
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
    if planner is not None:  # a run on several GPUs would not keep the adapter
        place = planner.kind(points[0].spec).place
        if place.why:
            raise RowError(f"{place.why}. It fits with {place.remedy}.")
        if place.layout.gpus > 1:
            raise RowError(
                f"{model.name} takes {place.layout.gpus} GPUs ({planner.hardware.name}), but a run "
                "of a fleet uses one. Choose a smaller model, or larger GPUs (hardware=...)."
            )
    warnings = [*advice.warnings, *filter(None, [rows.warning])]
    if not on_hub:  # a card names no folder of this machine
        warnings = [text.replace(c.data, Path(c.data).name) for text in warnings]
    advised = {key: getattr(choice, key) for key in ("method", "why", "rank", "load")}
    advised |= {"lr_source": advice.rate.source, "warnings": warnings}
    return Member(c.where, c.name, folder, "", advised, rows, points, not_early, by)


def _served(
    profile: Profile,
    layers: str,
    architecture_of: Callable[[ModelSpec], str],
    model: ModelSpec,
    rank: int,
) -> tuple[str, dict[str, str]]:
    """Return the layers to adapt, and Member.served; SpecError: the server takes none."""
    if profile == PEFT:
        return layers, {}
    profile.largest_rank(rank)
    architecture = architecture_of(model)
    layers, left_out = adapted(profile, layers, model, architecture)
    by = {"by": profile.server, "architecture": architecture}
    return layers, {**by, "left_out": left_out}


# ---------------------------------------------------------------- a request's fleet


def fleet_of(
    request: Request,
    customers: Sequence[Customer | Failed],
    known: Known,
    profiles: Mapping[str, Callable[[], Profile]],
) -> tuple[Rules, list[Member]]:
    """Return the rules by which rows are read, and the customers with their runs.

    The command line has precedence over the rules in the fleet's folder.

    Raises:
        SpecError: a fleet cannot use the settings.
    """
    if request.exec.world_size > 1:
        raise SpecError("a fleet trains each pack in one process. Leave exec.world_size out.")
    from lorasweep.models import load

    @cache
    def tokenizer_of(model: ModelSpec) -> Any:
        fetched = request.cluster.kind == "slurm" and request.action != "fetch"
        try:
            return load.tokenizer_of(model, request.exec.models_dir, fetched) or ModelError(
                f"model {model.name!r} has no tokenizer, and customers' rows are text. Put its "
                "tokenizer's files beside the weights, or choose a model that reads text."
            )
        except (ModelError, OSError, ValueError) as error:
            return error

    spec, given = request.points[0].spec, _given(request)
    kept = read_rules(fleet_folder(request))
    new = Rules(layers=spec.method.plain()["layers"], answers="all", whole_prompt=True)
    rules = dataclasses.replace(kept or new, **given)
    if rules.serve not in profiles:
        raise SpecError(unknown("serve", rules.serve, profiles))
    profile = profiles[rules.serve]()
    found = build_runs(
        customers,
        known,
        request,
        rules,
        tokenizer_of,
        profile,
        partial(load.architecture_of, models_dirs=request.exec.models_dir),
    )
    changed = [m for m in found if m.served.get("left_out")]
    if changed and "layers" in given:
        raise SpecError(
            f"method.layers={given['layers']} with serve={rules.serve}: the unembedding of "
            f"customer {changed[0].name!r} is left out, as {changed[0].served['left_out']}. Add "
            "method.layers=attention+mlp, or leave method.layers out, or add serve=peft."
        )
    return rules, found


BY_CUSTOMER = ("model", "lr", "batch_size", "steps", "method.rank", "method.alpha")
"""Settings that each customer has its own values of."""


def _given(request: Request) -> dict[str, Any]:
    """Return the fields of Rules that the command line sets."""
    keys, spec = set(request.given), request.points[0].spec
    if unread := [k for k in request.given if k in BY_CUSTOMER or k.startswith("model.")]:
        raise SpecError(
            f"{unread[0]} has no effect: a fleet takes model, batch_size and steps from the "
            "table's columns, and rank, alpha and learning rates from the adviser. Leave it out."
        )
    data, named = spec.dataset, {k[len("dataset.") :] for k in keys if k.startswith("dataset.")}
    if named - FORM:
        raise SpecError(
            f"dataset.{min(named - FORM)} has no effect: the table names the data of a fleet. "
            f"Allowed: {', '.join(f'dataset.{name}' for name in sorted(FORM))}, and in the table "
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
    if "serve" in keys:
        found["serve"] = request.serve
    if "method.layers" in keys:
        found["layers"] = spec.method.plain()["layers"]
    return found


def data_dirs(request: Request) -> list[str]:
    """Return the folders that are searched for data, the current folder first."""
    return [os.getcwd(), *request.exec.data_dir]


def fleet_name(request: Request) -> str:
    """Return the name of a table's fleet."""
    return "fleet-" + re.sub(r"[^\w.-]+", "_", Path(request.customers).stem)


def fleet_folder(request: Request) -> Path:
    """Return the fleet's folder: request.out, or a folder below the reports."""
    out = request.out or Path(request.exec.reports_dir) / fleet_name(request)
    return Path(out).expanduser().absolute()


# ---------------------------------------------------------------- rules kept in a fleet's folder


def read_rules(folder: Path) -> Rules | None:
    """Return the rules kept in a fleet's folder, if any; SpecError: they cannot be read."""
    path = folder / RULES
    if not path.exists():
        return None
    try:
        found = Rules(**json.loads(path.read_text()))
        parse_layers(found.layers)
        known = found.split in SPLITS and found.answers in ("last", "all")
        if not known or (found.render is None) != (found.template is None):
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
    with folders.replaced(folder, RULES, whole=False) as partial:
        (partial / RULES).write_text(json.dumps(vars(rules), indent=1))

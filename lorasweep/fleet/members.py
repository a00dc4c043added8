"""Which runs a customer's adapter is chosen from: those of the advice, or what is wrong with it."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorasweep.advise import settle
from lorasweep.advise.advice import Advice, Failed, Known, answers
from lorasweep.advise.customer import RowError, customer_of
from lorasweep.advise.rules.rates import ALPHA
from lorasweep.advise.shapes import shape_of
from lorasweep.advise.table import Row
from lorasweep.errors import DataError, ModelError, SpecError
from lorasweep.fleet.rows import Rows, Rules, rows_of, with_lengths
from lorasweep.methods.lora import LoRA
from lorasweep.spec.evaluations import why_not_early
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import RunSpec, validate
from lorasweep.sweep.grid import Point, around

ADVISED = "advised"
APART = 3.0
"""Factor between the rates that are tried: a rate between two is within 1.7 of one of them, and the
rates of public grids are as far apart (rules/rates.py, STEP)."""
MOST_RATES = 9
INSTEAD = ("", "lora")
SAFE = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Advised:
    """What the adviser said, as far as a card repeats it."""

    method: str
    """lora, full or open."""
    why: str
    rank: int
    load: float | None
    """Bits of the data over what the rank has room for."""
    lr_source: str
    warnings: list[str]


@dataclass(frozen=True)
class Member:
    """A customer whose adapter can be trained."""

    where: str
    """Where people find its row, such as 'row 3'."""
    name: str
    """As it stands in the table."""
    folder: str
    """Its name, safe as the name of a folder; also of its data set and in what is printed."""
    advised: Advised
    rows: Rows
    points: list[Point]
    """A run for each rate, lowest first."""
    not_early: str = ""
    """Why early stopping was asked for and is left out."""

    def plain(self) -> dict[str, Any]:
        """Return it as JSON values, for `planned`; its runs are kept elsewhere."""
        rows = {k: v for k, v in vars(self.rows).items() if k != "dataset"}
        names = {k: getattr(self, k) for k in ("where", "name", "folder", "not_early")}
        return {**names, "advised": dataclasses.asdict(self.advised), "rows": rows}


@dataclass(frozen=True)
class Setup:
    """What all customers' runs share."""

    base: RunSpec
    """Its model, data set, rank, alpha, layers, rate, batch and updates are replaced."""
    rates: int
    """How many are tried around the advised one; 1: the advised one."""
    instead_of_full: str
    """lora: LoRA is trained although the adviser says full fine-tuning."""
    tokenizer_of: Callable[[ModelSpec], Any]
    """Raises a ModelError where a base cannot be had."""
    data_dirs: Sequence[str]
    rules: Rules = field(default_factory=Rules)


def rates_of(value: int | str) -> int:
    """Return how many rates are tried.

    Raises:
        SpecError: it is neither a number nor 'advised'.
    """
    if isinstance(value, str) and value != ADVISED:
        raise SpecError(f"rates={value!r}. Expected a number, or for a fleet {ADVISED}.")
    return 1 if isinstance(value, str) else value


def folder_of(name: str) -> str:
    """Return a name that is safe as a folder's on any file system, another for each customer."""
    if SAFE.fullmatch(name):
        return name
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{settle.plain_name(name)[:48]}-{digest}"


def members_of(rows: Iterable[Row], known: Known, setup: Setup) -> list[Member | Failed]:
    """Return each customer's runs, or what is wrong: one that is wrong stops no other."""
    read: dict[str, Rows] = {}
    filled = [_with_data(row, known, setup, read) for row in rows]
    found: list[Member | Failed] = []
    for a in answers(filled, known):
        if isinstance(a, Failed):
            found.append(a)
            continue
        try:
            found.append(_member(a, read[a.where], setup))
        except (RowError, SpecError) as error:
            problems = error.problems if isinstance(error, RowError) else [str(error)]
            found.append(Failed(a.where, a.name, problems))
    return found


def fleet_plain(found: Sequence[Member | Failed]) -> list[dict[str, Any]]:
    """Return a fleet as JSON values."""
    return [m.plain() if isinstance(m, Member) else dataclasses.asdict(m) for m in found]


def planned(fleet: Iterable[dict[str, Any]], points: Iterable[Point]) -> list[Member | Failed]:
    """Rebuild a fleet from the values of `fleet_plain` and the runs of all its members."""
    runs: dict[str, list[Point]] = {}
    for p in points:
        runs.setdefault(p.arm, []).append(p)
    return [
        _rebuilt(values, runs[values["folder"]]) if "folder" in values else Failed(**values)
        for values in fleet
    ]


def _rebuilt(values: dict[str, Any], points: list[Point]) -> Member:
    rows = Rows(dataset=points[0].spec.dataset, **values["rows"])
    changes = {"advised": Advised(**values["advised"]), "rows": rows, "points": points}
    return Member(**{**values, **changes})


def _with_data(row: Row, known: Known, setup: Setup, read: dict[str, Rows]) -> Row:
    """Read and tokenize a customer's rows; fill in what the adviser would assume of them."""
    if row.problem:
        return row
    try:
        c = customer_of(row.values)
        model = shape_of(c, known.models)
    except RowError:
        return row  # the adviser says the same
    if c.task != "sft":
        return row._replace(problem=f"column task: a fleet is trained on answers, not by {c.task}.")
    if c.data is None:
        return row._replace(
            problem="column data: missing. It holds a .jsonl file, a folder with train.jsonl, or a "
            "data set of the hub as owner/name."
        )
    try:
        tokenizer = setup.tokenizer_of(model)
    except ModelError as error:
        return row._replace(problem=f"column model: {error}")
    try:
        rows = rows_of(folder_of(c.name), c.data, setup.rules, tokenizer)
        rows, tokens = with_lengths(rows, tokenizer, c.max_length, setup.data_dirs)
    except (DataError, OSError) as error:
        return row._replace(problem=f"column data: {error}")
    read[row.where] = rows
    given = {"max_length": rows.dataset.max_length, "tokens_per_example": round(tokens, 1)}
    stated = {k: v for k, v in row.values.items() if v is not None and str(v).strip()}
    if rows.dataset.source == "hub":  # counted here, as the adviser asks no network
        given["examples"] = rows.n_train
        stated.pop("data")
    return row._replace(values={**given, **stated})


def _member(advice: Advice, rows: Rows, setup: Setup) -> Member:
    """Make a customer's runs.

    Raises:
        RowError, SpecError: they cannot be trained.
    """
    choice, work, c = advice.choice, advice.work, advice.customer
    if choice.method == "full" and setup.instead_of_full != "lora":
        raise RowError(
            [
                f"the adviser says full fine-tuning: {choice.why}. Add instead_of_full=lora to "
                f"train LoRA of rank {choice.rank} all the same; its card will say so."
            ]
        )
    base, folder = setup.base, folder_of(advice.name)
    size: dict[str, Any] = {"rank": choice.rank, "alpha": ALPHA, "layers": setup.rules.layers}
    method = dataclasses.replace(base.method, **size)
    steps = c.steps or max(1, math.ceil(rows.n_train * (c.epochs or 1.0) / work.batch_size))
    rate = settle.middle_rates(advice)[0]
    patience = base.early_stopping
    not_early = why_not_early(patience, steps, rows.dataset.n_validation) if patience else ""
    spec = dataclasses.replace(
        base,
        model=advice.model,
        dataset=rows.dataset,
        method=method,
        batch_size=work.batch_size,
        steps=steps,
        lr=rate,
        early_stopping=0 if not_early else patience,
    )
    tried = setup.rates if rows.held_out else 1
    rates = [rate] if tried == 1 else around(rate, tried, APART)
    points = [Point(folder, dataclasses.replace(spec, lr=lr)) for lr in rates]
    for point in points:
        validate(point.spec)
    source, warnings = advice.rate.source, advice.trace.warnings
    if c.data is not None:  # a card names no folder of this machine
        warnings = [text.replace(c.data, Path(c.data).name) for text in warnings]
    advised = Advised(choice.method, choice.why, choice.rank, choice.load, source, warnings)
    return Member(advice.where, advice.name, folder, advised, rows, points, not_early)


def check(setup: Setup) -> None:
    """Check what all customers share.

    Raises:
        SpecError: adapters cannot be trained with it.
    """
    if not isinstance(setup.base.method, LoRA) or setup.base.objective != "sft":
        raise SpecError(
            f"method={setup.base.method.name} objective={setup.base.objective}: a fleet trains "
            "adapters on given answers. Set method=lora and objective=sft."
        )
    if setup.rates != 1 and not 3 <= setup.rates <= MOST_RATES:
        raise SpecError(
            f"rates={setup.rates}. Expected {ADVISED}, or how many rates are tried around the "
            f"advised one: 3 to {MOST_RATES}."
        )
    if setup.base.early_stopping < 0:
        raise SpecError(
            f"early_stopping={setup.base.early_stopping}. Expected 0 (off), or after how many "
            "evaluations in a row that are no better a run ends: 2 or 3."
        )
    if setup.instead_of_full not in INSTEAD:
        raise SpecError(
            f"instead_of_full={setup.instead_of_full!r}. Allowed: lora, or leave it out."
        )

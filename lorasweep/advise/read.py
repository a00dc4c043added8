"""Read customers from a CSV or YAML table or the command line, and find their models.

All errors of a row are reported at once; a wrong row does not affect other customers.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from lorasweep.errors import ModelError, SpecError, unknown
from lorasweep.models import describe, find
from lorasweep.spec.method import parse_layers
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.values import ABOVE_0, Field, Is, fields, problems_of

LONGEST = 131_072
"""Largest accepted number of tokens of an example: no public row is longer."""
SLACK = 0.1
"""Accepted relative difference of steps x batch size from examples x epochs, for skipped rows."""
FORMULA = re.compile(r"^[=@\t\r]|^[+-](?![\d.])")
"""Matches cells that a spreadsheet would compute (OWASP, CSV injection)."""
THOUSANDS = re.compile(r"^[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d+)?$")
AMBIGUOUS = re.compile(r"^[+-]?[1-9]\d{0,2}([.,]\d{3})+$")
"""Matches cells with a separator of thousands in one country, and of decimals in another."""
MEANS = (
    "means different numbers in different countries. Write 50000 or 2.95: no separators of "
    "thousands, and a decimal point."
)
WORDS = {**dict.fromkeys(("true", "yes", "1"), True), **dict.fromkeys(("false", "no", "0"), False)}


@dataclass(frozen=True)
class Customer:
    """One row: its columns, with types. None: not stated."""

    name: Annotated[str, Is("any name")]
    model: Annotated[str, Is("a name of conf/model or the hub, or a config.json")]
    task: Annotated[Literal["sft", "rl"], Is("answers, or rewards")]
    examples: Annotated[int | None, Is("rows; in RL, problems", 1)] = None
    tokens_per_example: Annotated[float | None, Is("with loss, not the total", 1, LONGEST)] = None
    bits_per_token: Annotated[float | None, Is("mean of tokens with loss", ABOVE_0, 20)] = None
    max_length: Annotated[int | None, Is("tokens of the longest row", 4)] = None
    data: Annotated[str | None, Is("a file, a folder with train and test, or a hub name")] = None
    validation: Annotated[str | None, Is("a file of held-out rows beside the file data")] = None
    epochs: Annotated[float | None, Is("passes over the rows", ABOVE_0, 1e6)] = None
    batch_size: Annotated[int | None, Is("rows of an update; in RL, episodes", 1, 1e7)] = None
    steps: Annotated[int | None, Is("updates", 1, 1e9)] = None
    episodes: Annotated[int | None, Is("samples in RL, all problems and passes", 1)] = None
    hardware: Annotated[str | None, Is("a name of conf/hardware")] = None
    gpus: Annotated[int | None, Is("available GPUs", 1, 512)] = None
    price_per_gpu_h: Annotated[float | None, Is("dollars", ABOVE_0, 1e4)] = None
    adapters_served: Annotated[int, Is("adapters served at once on this model", 1, 1e6)] = 1
    max_regret: Annotated[float, Is("LoRA's regret, % of the gain", ABOVE_0, 100)] = 2.0
    layers: Annotated[str | None, Is("planned: all, or sets joined by +")] = None
    rank: Annotated[int | None, Is("planned", 1, 1e5)] = None
    lr: Annotated[float | None, Is("planned, of LoRA", ABOVE_0, 1e3)] = None
    hidden_size: Annotated[int | None, Is("width", 1, 1e6)] = None
    n_layers: Annotated[int | None, Is("layers", 1, 1e4)] = None
    n_heads: Annotated[int | None, Is("heads", 1, 1e4)] = None
    n_kv_heads: Annotated[int | None, Is("key/value heads", 1, 1e4)] = None
    head_size: Annotated[int | None, Is("width of a head", 1, 1e4)] = None
    mlp_size: Annotated[int | None, Is("width of the MLP, or of one expert", 1, 1e6)] = None
    vocab_size: Annotated[int | None, Is("vocabulary", 2, 1e7)] = None
    tied: Annotated[bool | None, Is("embedding and unembedding are one matrix")] = None
    n_experts: Annotated[int | None, Is("experts of a layer", 0, 1e4)] = None
    n_active_experts: Annotated[int | None, Is("experts for a token", 0, 1e4)] = None
    where: str = "customer"
    """Place in the table for people, such as 'row 3', which is line 3 of a CSV; no column."""


COLUMNS = {f.key: f for f in fields(Customer) if f.key != "where"}
REQUIRED = tuple(name for name, f in COLUMNS.items() if f.required)
SHAPE = tuple(COLUMNS)[tuple(COLUMNS).index("hidden_size") :]
NEEDED = SHAPE[: SHAPE.index("tied")]
"""The columns that describe a model, and those of them without which it is not known."""
EXPECTED = (
    f"Expected a header with the columns {', '.join(REQUIRED)} and any of "
    f"{', '.join(c for c in COLUMNS if c not in REQUIRED)}, and a row for each customer."
)


class RowError(Exception):
    """A wrong row, raised or kept in place of its answer. Each problem names a column."""

    def __init__(self, *problems: str, where: str = "", name: str = "") -> None:
        self.error = f"{where}: " + " ".join(problems)
        """The place of the row, and its problems."""
        super().__init__(self.error)
        self.problems, self.where, self.name = problems, where, name


Row = tuple[str, Mapping[str, Any]]
"""Place of a row, and column -> value, unchecked."""


def read_customers(path: Path) -> list[Customer | RowError]:
    """Read a table of customers.

    Raises:
        SpecError: the file is missing, empty, or neither CSV nor YAML, or its header is wrong.
    """
    path = path.expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
        rows = [*(_yaml(text) if path.suffix.lower() in (".yaml", ".yml") else _csv(text))]
        if not rows:
            raise SpecError(f"no customers in it. {EXPECTED}")
    except (OSError, UnicodeDecodeError, SpecError) as error:
        raise SpecError(
            f"customers={path}: {error} (A table is CSV or YAML in UTF-8, such as "
            "docs/customers.csv; docs/advice.md describes its columns.)"
        ) from None
    return check_rows(rows)


def _csv(text: str) -> Iterator[Row | RowError]:
    head = next((line for line in text.splitlines() if line.strip(",;\t ")), "")
    delimiter = max(",;\t", key=head.count)  # spreadsheets in some languages use ; or tabs
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True, restkey="")
    try:
        first = next((cells for cells in reader.reader if "".join(cells).strip()), [])
        header = reader.fieldnames = [cell.strip() for cell in first]
        rows = [(f"row {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise SpecError(f"row {reader.reader.line_num}: {error}") from None
    # a misspelt column would count as not stated
    if odd := [name for name in header if name not in COLUMNS]:
        raise SpecError(unknown("column", odd[0], COLUMNS))
    wrong = [f"column {name} twice" for name in sorted({*header}) if header.count(name) > 1]
    wrong += [f"no column {name}" for name in REQUIRED if name not in header]
    if wrong and text.strip():
        raise SpecError(f"{', '.join(wrong)}. {EXPECTED}")
    for where, row in rows:
        problems = [
            f"column {name}: {cell.strip()!r} {MEANS}"
            for name, cell in row.items()
            if delimiter == ";" and name and cell and COLUMNS[name].kind in (int, float)
            if AMBIGUOUS.match(cell.strip())
        ]
        if "".join(rest := row.pop("", [])).strip():
            n = len(header) + len(rest)
            problems.append(f"{n} cells under {len(header)} columns. Quote commas.")
        if problems:
            yield RowError(*problems, where=where, name=(row["name"] or "").strip())
        elif any(cell and cell.strip() for cell in row.values()):
            yield where, row


def _yaml(text: str) -> Iterator[Row | RowError]:
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpecError(f"not valid YAML: {error}") from None
    if not isinstance(found, list | None):
        raise SpecError("expected a list with an entry for each customer.")
    for k, entry in enumerate(found or [], 1):
        if isinstance(entry, dict):
            yield f"entry {k}", entry
        else:
            yield RowError(f"expected columns and values, got {entry!r}.", where=f"entry {k}")


def check_rows(rows: Iterable[Row | RowError]) -> list[Customer | RowError]:
    """Return a Customer for each row, or the problems of the row."""
    found: list[Customer | RowError] = []
    seen: set[str] = set()
    for row in rows:
        try:
            if isinstance(row, RowError):
                raise row
            c = customer_of(row[1], row[0])
            if c.name in seen:
                problem = f"column name: an earlier row has {c.name!r}. Use a unique name."
                raise RowError(problem, where=c.where, name=c.name)
            seen.add(c.name)
            found.append(c)
        except RowError as error:
            found.append(error)
    return found


def customer_of(row: Mapping[str, Any], where: str = "customer") -> Customer:
    """Make a Customer from a row, column -> value; values are text, or have the types of YAML.

    Raises:
        RowError: all problems of the row.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for column, raw in row.items():
        try:
            if raw is not None and str(raw).strip() != "":
                if column not in COLUMNS:
                    raise SpecError(unknown("column", str(column), COLUMNS))
                values[column] = _cell(COLUMNS[column], raw)
        except (ValueError, SpecError) as error:
            of = f"column {column}: " * (column in COLUMNS)
            problems.append(of + str(error).replace("method.", ""))
    problems += problems_of(Customer, values, "column ")
    if problems or (problems := [*_contradictions(c := Customer(**values, where=where))]):
        raise RowError(*problems, where=where, name=str(row.get("name") or "").strip())
    return c


def _cell(column: Field, raw: Any) -> Any:
    """Convert a cell to the type of its column as far as that is clear.

    Raises:
        ValueError, SpecError: it is a formula, or names no layers.
    """
    text = str(raw).strip()
    if isinstance(raw, str) and FORMULA.match(raw):
        raise ValueError(
            f"{text!r} is a formula, not a value. Save the table with values (in a spreadsheet: "
            "copy, paste special, values)."
        )
    if column.key == "layers":
        parse_layers(text)
    if column.kind is str:
        return text.lower() if column.allowed else text
    if column.kind is bool:
        return WORDS.get(text.lower(), raw)
    if isinstance(raw, str):
        if column.kind is int and "." in text and AMBIGUOUS.match(text):
            raise ValueError(f"{text!r} {MEANS}")
        with suppress(ValueError):
            return float(text.replace(",", "") if THOUSANDS.match(text) else text)
    return raw


def _contradictions(c: Customer) -> Iterator[str]:
    """Yield contradictions between columns."""
    if c.task == "sft" and c.episodes is not None:
        yield "column episodes: only with task=rl. Leave it out, or set task to rl."
    if c.validation is not None and c.data is None:
        yield "column validation: only with data. Give the training rows, or leave it out."
    if c.max_length is not None and (c.tokens_per_example or 0) > c.max_length:
        yield (
            f"columns tokens_per_example and max_length: a mean of {c.tokens_per_example:,.0f} "
            f"tokens in rows of at most {c.max_length:,}. Correct one of them."
        )
    planned, names = c.episodes, "episodes"
    if c.task == "sft":
        planned, names = int((c.examples or 0) * (c.epochs or 0)), "examples x epochs"
    trained = (c.steps or 0) * (c.batch_size or 0)
    if planned and trained and abs(trained - planned) > max(SLACK * planned, c.batch_size or 0):
        yield (
            f"columns steps and batch_size: {c.steps:,} x {c.batch_size:,} = {trained:,}, but "
            f"{names} = {planned:,}. Leave one of them out, or correct it."
        )


# ---------------------------------------------------------------- the model

Models = Mapping[str, Callable[[], ModelSpec]]
"""Lower-case name in the catalogue or on the hub -> function that reads the shape."""


def shape_of(c: Customer, models: Models) -> ModelSpec:
    """Return a customer's model, from a config.json, the catalogue, or columns of the row.

    Raises:
        RowError: the model is not known and the row lacks its shape, or the row has another shape.
    """
    stated = {n: value for n in SHAPE if (value := getattr(c, n)) is not None}
    missing = ", ".join(n for n in NEEDED if n not in stated)
    remedy = f"Or fill the columns {missing}: that needs no network."
    try:
        path = Path(c.model).expanduser()
        config = path / "config.json" if path.is_dir() else path
        if config.suffix == ".json":
            model = _of_config(config)
        elif c.model.lower() in models:
            model = models[c.model.lower()]()
        elif not missing:
            model = ModelSpec(c.model, "hub", c.model, weights_dtype="bf16", **stated)
            if model.problem:
                raise SpecError(model.problem)
        elif config.suffix == ".gguf" or describe.HUB_NAME.fullmatch(c.model):
            found = _described(c.model)
            if isinstance(found, str):
                raise ModelError(f"{found} {remedy}")
            model = found
        else:
            names = (name for name in models if "/" not in name)
            raise ModelError(f"{unknown('model', c.model, names)} Or give a config.json. {remedy}")
    except (ModelError, SpecError, OSError, RuntimeError) as error:
        # OSError: no such file, or a name too long for a path; RuntimeError: an unknown ~user
        raise RowError(f"column model: {error}") from None
    for n, v in stated.items():
        if getattr(model, n) != v:
            raise RowError(
                f"column {n}: {v}, but {c.model} has {getattr(model, n)}. Leave it out, or give "
                "the model another name."
            )
    return model


@cache
def _described(given: str) -> ModelSpec | str:
    """Describe a GGUF file or a name on the hub, or say why not: asking again takes as long."""
    try:
        model, folder = describe.describe_model(given)
    except ModelError as error:
        return str(error)
    return replace(model, location=str(Path(folder, model.location))) if folder else model


def _of_config(path: Path) -> ModelSpec:
    text = path.read_text()
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if path.name != "config.json" or not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(
            f"{path} is not the config.json of a model of transformers, with a model_type. Give a "
            f"name instead of the file, and fill {', '.join(NEEDED)}."
        )
    folder, dtype = path.absolute().parent, config.get("dtype") or config.get("torch_dtype")
    if dtype is not None:
        bf16 = "bfloat16" in str(dtype)
    else:  # without weights assume bf16, in which models are published
        bf16 = find.types_in(sorted(folder.glob("model*.safetensors"))) <= {"BF16"}
    model = ModelSpec(folder.name, "folder", str(folder), weights_dtype="bf16" if bf16 else "fp32")
    return _counted(model, text)


@cache
def _counted(model: ModelSpec, config_text: str) -> ModelSpec:
    """Add the shape that transformers' modules have, once for all rows with this folder."""
    config = describe.config_at(model, Path(model.location))
    found = describe.with_shape(model, config)
    if find.is_complete(Path(model.location)):  # else it is only advised on
        describe.try_out(found, config, Path(model.location))
    return replace(found, context_length=0)  # ids of runs of fleets stay

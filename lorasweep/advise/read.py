"""Read customers from a CSV or YAML table or the command line, and find their models.

All errors of a row are reported at once; a wrong row does not affect other customers.
"""

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lorasweep.data.sources import parsed
from lorasweep.errors import ModelError, SpecError, unknown
from lorasweep.models import describe, find
from lorasweep.spec.method import parse_layers
from lorasweep.spec.model import ModelSpec

TASKS = ("sft", "rl")
LONGEST_EXAMPLE = 131_072
"""Largest accepted number of tokens of an example: no public row is longer."""
MOST_TOKENS = 1e13
"""Largest accepted number of tokens in total: base models are pretrained on fewer."""
SLACK = 0.1
"""Accepted relative difference of steps x batch size from examples x epochs, for skipped rows."""
FORMULA = re.compile(r"^[=@\t\r]|^[+-](?![\d.])")
"""Matches cells that a spreadsheet would compute (OWASP, CSV injection)."""
THOUSANDS = re.compile(r"^[+-]?\d{1,3}(,\d{3})+(\.\d+)?$")
AMBIGUOUS = re.compile(r"^[+-]?[1-9]\d{0,2}([.,]\d{3})+$")
"""Matches cells with a separator of thousands in one country, and of decimals in another."""
YES, NO = ("true", "yes", "1"), ("false", "no", "0")
INF = float("inf")


class Column(NamedTuple):
    """The type, range and meaning of a column."""

    kind: type
    low: float = 0.0
    high: float = INF
    meaning: str = ""
    config_keys: tuple[str, ...] = ()
    """Names in a config.json of transformers; the first one found counts."""


def _col(kind: type, low: float, high: float, meaning: str, default: Any = None) -> Any:
    return field(default=default, metadata={"column": Column(kind, low, high, meaning)})


@dataclass(frozen=True)
class Customer:
    """One row, with types. None: not stated."""

    name: str = _col(str, 0, INF, "any name")
    model: str = _col(str, 0, INF, "a name of conf/model or the hub, or a config.json")
    task: str = _col(str, 0, INF, "sft or rl")
    examples: int | None = _col(int, 1, INF, "rows; in RL, problems")
    tokens_per_example: float | None = _col(float, 1, INF, "mean tokens of a row that bear loss")
    bits_per_token: float | None = _col(float, 1e-6, 20, "mean bits of a token that bears loss")
    max_length: int | None = _col(int, 4, INF, "tokens of the longest row")
    data: str | None = _col(str, 0, INF, "a file, a folder with train and test, or a hub name")
    validation: str | None = _col(str, 0, INF, "a file of held-out rows beside the file data")
    epochs: float | None = _col(float, 1e-6, 1e6, "passes over the rows")
    batch_size: int | None = _col(int, 1, 1e7, "rows of an update; in RL, episodes")
    steps: int | None = _col(int, 1, 1e9, "updates")
    episodes: int | None = _col(int, 1, INF, "samples in RL, all problems and passes")
    hardware: str | None = _col(str, 0, INF, "a name of conf/hardware")
    gpus: int | None = _col(int, 1, 512, "available GPUs")
    price_per_gpu_h: float | None = _col(float, 1e-6, 1e4, "dollars")
    adapters_served: int = _col(int, 1, 1e6, "adapters served at once on this model", 1)
    max_regret: float = _col(float, 1e-6, 100, "LoRA's regret, % of full fine-tuning's gain", 2.0)
    layers: str | None = _col(str, 0, INF, "planned: attention, mlp, unembedding joined by +, all")
    rank: int | None = _col(int, 1, 1e5, "planned")
    lr: float | None = _col(float, 1e-12, 1e3, "planned, of LoRA")
    shape: tuple[tuple[str, int | bool], ...] = ()
    """Name and value of each column of SHAPE that the row fills."""
    where: str = "customer"
    """Place in the table."""


HEADS, KV_HEADS = "num_attention_heads", "num_key_value_heads"
MLP_KEYS = ("moe_intermediate_size", "intermediate_size")
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
SHAPE = {
    "hidden_size": Column(int, 1, 1e6, "width", ("hidden_size",)),
    "n_layers": Column(int, 1, 1e4, "layers", ("num_hidden_layers",)),
    "n_heads": Column(int, 1, 1e4, "heads", (HEADS,)),
    "n_kv_heads": Column(int, 1, 1e4, "key/value heads", (KV_HEADS, HEADS)),
    "head_size": Column(int, 1, 1e4, "width of a head", ("head_dim",)),
    "mlp_size": Column(int, 1, 1e6, "width of the MLP, of one expert if there are any", MLP_KEYS),
    "vocab_size": Column(int, 2, 1e7, "vocabulary", ("vocab_size",)),
    "tied": Column(bool, meaning="embedding and unembedding are one matrix"),
    "n_experts": Column(int, 0, 1e4, "experts of a layer", EXPERT_KEYS),
    "n_active_experts": Column(int, 0, 1e4, "experts for a token", ("num_experts_per_tok",)),
}
COLUMNS = {f.name: f.metadata["column"] for f in fields(Customer) if f.metadata} | SHAPE
REQUIRED = ("name", "model", "task")


class RowError(Exception):
    """A wrong row. Each of `problems` is a sentence that names a column."""

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


class Row(NamedTuple):
    """One row of the file, unchecked."""

    where: str
    """Place for people: 'row 3' of a CSV is line 3 of the file."""
    values: dict[str, Any]


@dataclass(frozen=True)
class Failed:
    """A row that cannot be used."""

    where: str
    name: str
    problems: list[str]

    @property
    def error(self) -> str:
        """The place of the row, and its problems."""
        return f"{self.where}: " + " ".join(self.problems)


# ---------------------------------------------------------------- the table


def read_customers(path: Path) -> list[Customer | Failed]:
    """Read a table of customers.

    Raises:
        SpecError: the file is missing, empty, or neither CSV nor YAML, or its header is wrong.
    """
    path = path.expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except FileNotFoundError:
        raise SpecError(
            f"customers={path}: no such file {path.absolute()}. Give a CSV or YAML table, such as "
            "docs/customers.csv; docs/advice.md describes its columns."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(
            f"customers={path}: cannot be read as text: {error}. Give a CSV or YAML table in UTF-8."
        ) from None
    is_yaml = path.suffix.lower() in (".yaml", ".yml")
    try:
        rows = _yaml(text) if is_yaml else _csv(text)
    except SpecError as error:
        raise SpecError(f"customers={path}: {error}") from None
    if not rows:
        raise SpecError(f"customers={path}: no customers in it. {expected()}")
    return check_rows(rows)


def expected() -> str:
    """Describe a valid table."""
    optional = [c for c in COLUMNS if c not in REQUIRED]
    return (
        f"Expected a header with the columns {', '.join(REQUIRED)} and any of "
        f"{', '.join(optional)}, and a row for each customer."
    )


def _csv(text: str) -> list[Row | Failed]:
    head = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=head.count)  # spreadsheets in some languages use ; or tabs
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        lines = [(f"row {reader.line_num}", cells) for cells in reader if "".join(cells).strip()]
    except csv.Error as error:
        raise SpecError(f"row {reader.line_num}: {error}") from None
    if not lines:
        return []
    header = [cell.strip() for cell in lines[0][1]]
    # a misspelt column would count as not stated
    if odd := [name for name in header if name not in COLUMNS]:
        raise SpecError(unknown("column", odd[0], COLUMNS))
    twice = sorted({name for name in header if header.count(name) > 1})
    missing = [name for name in REQUIRED if name not in header]
    if twice or missing:
        what = f"column {twice[0]} twice" if twice else f"no column {', '.join(missing)}"
        raise SpecError(f"{what}. {expected()}")
    rows: list[Row | Failed] = []
    for where, cells in lines[1:]:
        values = dict(zip(header, cells, strict=False))
        unclear = [
            f"column {name}: {cell.strip()!r} means different numbers in different countries. "
            "Write 50000 or 2.95: no separators of thousands, and a decimal point."
            for name, cell in values.items()
            if delimiter == ";" and COLUMNS[name].kind in (int, float)
            if AMBIGUOUS.match(cell.strip())
        ]
        if unclear:
            rows.append(Failed(where, str(values["name"]).strip(), unclear))
        elif any(cell.strip() for cell in cells[len(header) :]):
            problem = f"{len(cells)} cells under {len(header)} columns. Quote commas."
            rows.append(Failed(where, str(values["name"]).strip(), [problem]))
        else:
            rows.append(Row(where, values))
    return rows


def _yaml(text: str) -> list[Row | Failed]:
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpecError(f"not valid YAML: {error}") from None
    if isinstance(found, dict) and set(found) == {"customers"}:
        found = found["customers"]
    if not isinstance(found, list | None):
        raise SpecError("expected a list with an entry for each customer.")
    return [
        Row(f"entry {k}", entry)
        if isinstance(entry, dict)
        else Failed(f"entry {k}", "", [f"expected columns and values, got {entry!r}."])
        for k, entry in enumerate(found or [], 1)
    ]


# ---------------------------------------------------------------- a row


def check_rows(rows: Iterable[Row | Failed]) -> list[Customer | Failed]:
    """Return a Customer for each row, or a Failed with the problems of the row."""
    found: list[Customer | Failed] = []
    seen: set[str] = set()
    for row in rows:
        if isinstance(row, Failed):
            found.append(row)
            continue
        try:
            c = customer_of(row.values, row.where)
            if c.name in seen:
                raise RowError(f"column name: an earlier row has {c.name!r}. Use a unique name.")
            seen.add(c.name)
            found.append(c)
        except RowError as error:
            name = str(row.values.get("name") or "").strip()
            found.append(Failed(row.where, name, error.problems))
    return found


def customer_of(row: Mapping[str, Any], where: str = "customer") -> Customer:
    """Make a Customer from a row, column -> value; values are text, or have the types of YAML.

    Raises:
        RowError: all problems of the row.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    for column, raw in row.items():
        if column not in COLUMNS:
            problems.append(unknown("column", str(column), COLUMNS))
        elif raw is not None and str(raw).strip() != "":
            try:
                values[column] = _value(column, raw)
            except ValueError as error:
                problems.append(f"column {column}: {error}")
    missing = [c for c in REQUIRED if str(row.get(c) or "").strip() == ""]
    problems += [f"column {c}: missing. It holds {COLUMNS[c].meaning}." for c in missing]
    if problems:
        raise RowError(*problems)
    shape = tuple((name, values.pop(name)) for name in SHAPE if name in values)
    customer = Customer(**values, shape=shape, where=where)
    if found := list(_contradictions(customer)):
        raise RowError(*found)
    return customer


def _value(column: str, raw: Any) -> Any:
    """Convert a cell to the type of its column; ValueError: the problem, in a sentence."""
    kind, low, high, meaning, _ = COLUMNS[column]
    text = str(raw).strip()
    if isinstance(raw, str) and FORMULA.match(raw):
        raise ValueError(
            f"{text!r} is a formula, not a value. Save the table with values (in a spreadsheet: "
            "copy, paste special, values)."
        )
    if column == "task":
        if text.lower() not in TASKS:
            raise ValueError(unknown("task", text, TASKS))
        return text.lower()
    if column == "layers":
        try:
            parse_layers(text)
        except SpecError as error:
            raise ValueError(str(error).replace("method.", "")) from None
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in YES + NO:
            raise ValueError(f"expected true or false, got {text!r}.")
        return text.lower() in YES
    if isinstance(raw, bool):
        raise ValueError(f"expected a number ({meaning}), got {raw}.")
    try:
        number = float(text.replace(",", "") if THOUSANDS.match(text) else text)
    except ValueError:
        raise ValueError(
            f"expected a number ({meaning}), got {text!r}. Write it out, as 50000 or 5e4."
        ) from None
    if kind is int and isinstance(raw, str) and "." in text and AMBIGUOUS.match(text):
        whole = text.replace(".", "")
        raise ValueError(f"{text!r} may be {number:g} or {whole}. Write {number:g} or {whole}.")
    if kind is int and number % 1:
        raise ValueError(f"expected a whole number ({meaning}), got {text!r}.")
    if not low <= number <= high:
        most = "" if high == INF else f" and at most {high:g}"
        raise ValueError(f"expected a number of at least {low:g}{most} ({meaning}), got {text!r}.")
    return kind(number)


def _contradictions(c: Customer) -> Iterator[str]:
    """Yield contradictions between columns, and values that seem to belong to another column."""
    if c.task == "sft" and c.episodes is not None:
        yield "column episodes: only with task=rl. Leave it out, or set task to rl."
    if c.validation is not None and c.data is None:
        yield "column validation: only with data. Give the training rows, or leave it out."
    tokens = c.tokens_per_example
    if tokens is not None and tokens > LONGEST_EXAMPLE:
        yield (
            f"column tokens_per_example: {tokens:,.0f} tokens in one example? If that is the "
            "total, divide it by the number of examples."
        )
    elif tokens is not None and c.max_length is not None and tokens > c.max_length:
        yield (
            f"columns tokens_per_example and max_length: a mean of {tokens:,.0f} tokens in rows of "
            f"at most {c.max_length:,}. Correct one of them."
        )
    if c.examples is not None and tokens is not None and c.examples * tokens > MOST_TOKENS:
        yield (
            f"columns examples and tokens_per_example: {c.examples * tokens:.1e} tokens in all, "
            "more than base models are pretrained on. Is one of them the total of tokens?"
        )
    if c.steps is None or c.batch_size is None:
        return
    trained, planned, names = c.steps * c.batch_size, None, "episodes"
    if c.task == "rl" and c.episodes is not None:
        planned = float(c.episodes)
    elif c.task == "sft" and c.examples is not None and c.epochs is not None:
        planned, names = c.examples * c.epochs, "examples x epochs"
    if planned is not None and abs(trained - planned) > max(SLACK * planned, c.batch_size):
        yield (
            f"columns steps and batch_size: {c.steps:,} x {c.batch_size:,} = {trained:,}, but "
            f"{names} = {planned:,.0f}. Leave one of them out, or correct it."
        )


# ---------------------------------------------------------------- the model

NEEDED = tuple(c for c in SHAPE if c not in ("tied", "n_experts", "n_active_experts"))
Models = Mapping[str, Callable[[], ModelSpec]]
"""Lower-case name in the catalogue or on the hub -> function that reads the shape."""


def shape_of(c: Customer, models: Models) -> ModelSpec:
    """Return a customer's model, from a config.json, the catalogue, or columns of the row.

    Raises:
        RowError: the model is not known and the row lacks its shape, or the row has another shape.
    """
    stated = dict(c.shape)
    missing = [n for n in NEEDED if n not in stated]
    try:
        path = Path(c.model).expanduser()
        config = path / "config.json" if path.is_dir() else path
    except (OSError, RuntimeError) as error:  # a name too long for a path, or an unknown ~user
        raise RowError(f"column model: {c.model[:80]!r} is no path and no name: {error}") from None
    try:
        if config.suffix == ".json":
            model = _of_config(config)
        elif c.model.lower() in models:
            model = models[c.model.lower()]()
        elif not missing:
            return _build(c.model, stated, source="hub", location=c.model, weights_dtype="bf16")
        elif config.suffix == ".gguf" or describe.HUB_NAME.fullmatch(c.model):
            try:
                found = _described(c.model)
                if isinstance(found, str):
                    raise ModelError(found)
                model = found
            except ModelError as error:
                columns = ", ".join(missing)
                raise ModelError(
                    f"{error} Or fill the columns {columns}, then no network is needed."
                ) from None
        else:
            what = unknown("model", c.model, (name for name in models if "/" not in name))
            if stated:
                what = f"{c.model!r} is not in the catalogue, and its shape is incomplete."
            raise ModelError(
                f"{what} Give the path of its config.json as model, or fill the columns "
                f"{', '.join(missing)}."
            )
    except (ModelError, SpecError) as error:
        raise RowError(f"column model: {error}") from None
    wrong = [
        f"column {n}: {v}, but {c.model} has {getattr(model, n)}. Leave it out, or give the model "
        "another name."
        for n, v in stated.items()
        if getattr(model, n) != v
    ]
    if wrong:
        raise RowError(*wrong)
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
    try:
        text = path.read_text()
        config = parsed(text)
    except FileNotFoundError:
        raise ModelError(f"no file {path}.") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not the config.json of a model.")
    folder, is_known = path.absolute().parent, path.name == "config.json" and "model_type" in config
    config = {**config, **(config.get("text_config") or {})}
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype is not None:
        bf16 = "bfloat16" in str(dtype)
    else:  # without weights assume bf16, in which models are published
        bf16 = find.types_in(sorted(folder.glob("model*.safetensors"))) <= {"BF16"}
    dtype = "bf16" if bf16 else "fp32"
    where: dict[str, Any] = {"source": "folder", "location": str(folder), "weights_dtype": dtype}
    known = ModelSpec(name=folder.name, **where)
    if is_known and find.has_weights(folder):
        return _counted(known, text)
    stated: dict[str, Any] = {}
    for name, column in SHAPE.items():
        found = [config[k] for k in column.config_keys if config.get(k) is not None]
        if found:
            stated[name] = found[0]
    if "head_size" not in stated and stated.get("hidden_size") and stated.get("n_heads"):
        stated["head_size"] = stated["hidden_size"] // stated["n_heads"]
    stated["tied"] = bool(config.get("tie_word_embeddings", False))
    missing = [n for n in NEEDED if n not in stated]
    if missing:
        names = ", ".join(" or ".join(SHAPE[n].config_keys) for n in missing)
        raise ModelError(f"{path} lacks {names}.")
    if is_known:
        try:
            return _counted(known, text)
        except ModelError as error:
            raise ModelError(
                f"{error} To be advised by the columns of the shape alone, give a name instead of "
                f"the file, and fill {', '.join(NEEDED)}."
            ) from None
    return _build(folder.name, stated, **where, qk_norm="qwen3" in str(config.get("model_type")))


@cache
def _counted(model: ModelSpec, config_text: str) -> ModelSpec:
    """Add the shape that transformers' modules have, once for all rows with this folder."""
    config = describe.config_at(model, Path(model.location))
    found = describe.with_shape(model, config)
    if find.has_weights(Path(model.location)):  # else it is only advised on
        describe.try_out(found, config, Path(model.location))
    return replace(found, context_length=0)  # ids of runs of fleets stay


def _build(name: str, stated: Mapping[str, Any], **more: Any) -> ModelSpec:
    model = ModelSpec(name=name, **stated, **more)
    if model.problem:
        raise RowError(f"columns of the shape: {model.problem}")
    return model

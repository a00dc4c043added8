"""One customer: what is fine-tuned on what, how it was planned, and what may be wrong with a row.

A row is checked as a whole, so that all its errors come at once. Cells of a CSV are text.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lorasweep.errors import SpecError, unknown
from lorasweep.spec.method import parse_layers

TASKS = ("sft", "rl")
LONGEST_EXAMPLE = 131_072
"""Tokens of an example above which a row is asked about: no public data set is that long."""
MOST_TOKENS = 1e13
"""Tokens in total above which a row is asked about: more than base models are pretrained on."""
SLACK = 0.1
"""Share by which steps x batch size may differ from examples x epochs: a last batch, skipped rows.
"""
GROUP = 16
"""Samples of a problem in RL where no episodes are stated: tinker-cookbook, recipes/rl_loop.py."""
FORMULA = re.compile(r"^[=@\t\r]|^[+-](?![\d.])")
"""Starts of cells that spreadsheets compute (OWASP, CSV injection)."""
THOUSANDS = re.compile(r"^[+-]?\d{1,3}(,\d{3})+(\.\d+)?$")
YES, NO = ("true", "yes", "1"), ("false", "no", "0")


class Column(NamedTuple):
    """What a column holds."""

    kind: type
    low: float = 0.0
    high: float = float("inf")
    says: str = ""


SHAPE = {
    "hidden_size": Column(int, 1, 1e6, "width"),
    "n_layers": Column(int, 1, 1e4, "layers"),
    "n_heads": Column(int, 1, 1e4, "heads"),
    "n_kv_heads": Column(int, 1, 1e4, "key/value heads"),
    "head_size": Column(int, 1, 1e4, "width of a head"),
    "mlp_size": Column(int, 1, 1e6, "width of the MLP, of one expert if there are any"),
    "vocab_size": Column(int, 2, 1e7, "vocabulary"),
    "tied": Column(bool, says="embedding and unembedding are one matrix"),
    "n_experts": Column(int, 0, 1e4, "experts of a layer"),
    "n_active_experts": Column(int, 0, 1e4, "experts that a token passes through"),
}
COLUMNS = {
    "name": Column(str, says="any name"),
    "model": Column(str, says="a name of conf/model or the hub, or a config.json"),
    "task": Column(str, says="sft or rl"),
    "examples": Column(int, 1, says="rows; in RL, problems"),
    "tokens_per_example": Column(float, 1, says="mean tokens of a row that bear loss"),
    "bits_per_token": Column(float, 1e-6, 20, "what a token of them tells"),
    "max_length": Column(int, 4, says="tokens of the longest row"),
    "data": Column(str, says="folder with train.jsonl, a .jsonl file, or a hub name"),
    "epochs": Column(float, 1e-6, 1e6, "passes over the rows"),
    "batch_size": Column(int, 1, 1e7, "rows of an update; in RL, episodes"),
    "steps": Column(int, 1, 1e9, "updates"),
    "episodes": Column(int, 1, says="samples in RL, all problems and passes"),
    "hardware": Column(str, says="a name of conf/hardware"),
    "gpus": Column(int, 1, 512, "GPUs at hand"),
    "price_per_gpu_h": Column(float, 1e-6, 1e4, "dollars"),
    "adapters_served": Column(int, 1, 1e6, "adapters served at once on this model"),
    "max_regret": Column(float, 1e-6, 100, "what LoRA may give up, % of full fine-tuning's gain"),
    "layers": Column(str, says="planned: attention, mlp, unembedding, joined by +, or all"),
    "rank": Column(int, 1, 1e5, "planned"),
    "lr": Column(float, 1e-12, 1e3, "planned, of LoRA"),
    **SHAPE,
}
REQUIRED = ("name", "model", "task")


class RowError(Exception):
    """What is wrong with a row: `problems`, one a line."""

    def __init__(self, problems: list[str]) -> None:
        """Hold the problems of a row."""
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class Customer:
    """One row, with types. None: not stated."""

    name: str
    model: str
    task: str
    examples: int | None = None
    tokens_per_example: float | None = None
    bits_per_token: float | None = None
    max_length: int | None = None
    data: str | None = None
    epochs: float | None = None
    batch_size: int | None = None
    steps: int | None = None
    episodes: int | None = None
    hardware: str | None = None
    gpus: int | None = None
    price_per_gpu_h: float | None = None
    adapters_served: int = 1
    max_regret: float = 2.0
    layers: str | None = None
    rank: int | None = None
    lr: float | None = None
    shape: tuple[tuple[str, int | bool], ...] = ()
    """Shape columns that were filled, by name."""


def customer_of(row: Mapping[str, Any]) -> Customer:
    """Read one row.

    Args:
        row: values by column, as text or as YAML has them.

    Raises:
        RowError: the row is wrong; all its problems, each with its column.
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
    missing = [c for c in REQUIRED if c not in values and str(row.get(c) or "").strip() == ""]
    problems += [f"column {c}: missing. It holds {COLUMNS[c].says}." for c in missing]
    if not problems:
        shape = tuple((name, values.pop(name)) for name in SHAPE if name in values)
        customer = Customer(**values, shape=shape)
        problems = list(_contradictions(customer))
        if not problems:
            return customer
    raise RowError(problems)


def _value(column: str, raw: Any) -> Any:
    """Convert a cell; ValueError says what is wrong with it."""
    kind, low, high, says = COLUMNS[column]
    text = str(raw).strip()
    if isinstance(raw, str) and FORMULA.match(raw):
        raise ValueError(
            f"{text!r} is a formula, not a value. Save the table with values (in a spreadsheet: "
            "copy, paste special, values)."
        )
    if kind is str:
        return _text(column, text)
    if kind is bool:
        if text.lower() not in YES + NO:
            raise ValueError(f"expected true or false, got {text!r}.")
        return text.lower() in YES
    if isinstance(raw, bool):
        raise ValueError(f"expected a number ({says}), got {raw}.")
    plain = text.replace(",", "") if THOUSANDS.match(text) else text
    try:
        number = float(plain)
    except ValueError:
        raise ValueError(
            f"expected a number ({says}), got {text!r}. Write it out, as 50000 or 5e4."
        ) from None
    if kind is int and number % 1:
        raise ValueError(f"expected a whole number ({says}), got {text!r}.")
    if not low <= number <= high:
        most = "" if high == float("inf") else f" and at most {high:g}"
        raise ValueError(f"expected a number of at least {low:g}{most} ({says}), got {text!r}.")
    return kind(number)


def _text(column: str, text: str) -> str:
    if column == "task":
        if text.lower() not in TASKS:
            raise ValueError(unknown("task", text, TASKS))
        return text.lower()
    if column == "layers":
        try:
            parse_layers(text)
        except SpecError as error:
            raise ValueError(str(error).replace("method.", "")) from None
    return text


def _contradictions(c: Customer) -> Iterator[str]:
    """Yield fields that cannot be true together, and values that look like another column's."""
    if c.task == "sft" and c.episodes is not None:
        yield "column episodes: only with task=rl. Leave it out, or set task to rl."
    tokens = c.tokens_per_example
    if tokens is not None and tokens > LONGEST_EXAMPLE:
        yield (
            f"column tokens_per_example: {tokens:,.0f} tokens in one example? If that is the "
            "total, "
            "divide it by the number of examples."
        )
    elif tokens is not None and c.max_length is not None and tokens > c.max_length:
        yield (
            f"columns tokens_per_example and max_length: a mean of {tokens:,.0f} tokens in rows of "
            f"at most {c.max_length:,}. Correct one of them."
        )
    if c.examples is not None and tokens is not None and c.examples * tokens > MOST_TOKENS:
        yield (
            f"columns examples and tokens_per_example: {c.examples * tokens:.1e} tokens in all, "
            "more "
            "than base models are pretrained on. Is one of them the total of tokens?"
        )
    yield from _lengths(c)


def _lengths(c: Customer) -> Iterator[str]:
    """Yield lengths of training that disagree."""
    if c.steps is None or c.batch_size is None:
        return
    trained = c.steps * c.batch_size
    if c.task == "rl" and c.episodes is not None:
        wanted, names = float(c.episodes), "episodes"
    elif c.task == "sft" and c.examples is not None and c.epochs is not None:
        wanted, names = c.examples * c.epochs, "examples x epochs"
    else:
        return
    if abs(trained - wanted) > max(SLACK * wanted, c.batch_size):
        yield (
            f"columns steps and batch_size: {c.steps:,} x {c.batch_size:,} = {trained:,}, but "
            f"{names} = {wanted:,.0f}. Leave one of them out, or correct it."
        )

"""What a customer trains on: rows, tokens, updates and lengths, stated or assumed; and the bits."""

import math
from dataclasses import dataclass
from typing import Any

from lorasweep.customers.evidence import Case, Measured
from lorasweep.customers.read import RowError
from lorasweep.data import own
from lorasweep.errors import DataError
from lorasweep.plan.load import TEXT_FILL

GROUP = 16
"""Samples of a problem in RL where no episodes are stated: tinker-cookbook, recipes/rl_loop.py."""
BATCH = {"sft": 32, "rl": 512}
"""Rows of an update where none are stated. 32: the one batch size that the study names. RL, in
episodes: 32 problems x 16 samples, the smallest of tinker-cookbook's recipes for maths."""
SMALLEST = 8
"""Smallest batch that is assumed: smaller ones cannot be split over the GPUs of a node."""
UPDATES = {"sft": 100, "rl": 50}
"""Least updates. 100: tinker-cookbook's docs/sl-hyperparams.mdx, which asks for 1,000 where
possible. 50: GRPO runs that reached full fine-tuning's plateau (zhu)."""
BYTES_PER_TOKEN = 4.0
"""UTF-8 bytes of a token of English: OpenAI, help.openai.com, "What are tokens and how to count
them?". Other languages and code have fewer."""
LENGTH = 1024
"""Tokens of the longest row where nothing is stated: as conf/dataset/tulu3.yaml."""


Bits = tuple[float | None, float | None, float | None]
"""Value, low, high."""


@dataclass(frozen=True)
class Workload:
    """How much is trained, and on what."""

    examples: float | None
    """Unique rows; in RL, problems. None: not known."""
    tokens: float
    """Mean tokens of a row that bear loss."""
    row_tokens: float
    """Mean tokens of a row that are computed."""
    max_length: int
    batch_size: int
    steps: int | None
    """Updates; None: not known."""
    rows: float | None
    """Rows trained on, counted once for each pass; in RL, episodes."""
    bits: float | None
    """Information in the rows trained on, each counted once; None: not known."""
    bits_low: float | None
    bits_high: float | None


@dataclass(frozen=True)
class Data:
    """A customer's file of rows."""

    counted: own.Counted
    measured: Measured | None
    """What action=measure found in it, under the customer's model."""


def workload_of(case: Case) -> Workload:
    """Return what a customer trains on, with a reason for whatever was not stated.

    Raises:
        RowError: the data that the row names are not there or cannot be read.
    """
    c = case.customer
    data = _data(case)
    tokens, row_tokens, length = _lengths(case, data)
    examples: float | None = c.examples
    if data is not None:
        found = data.counted.rows
        if examples is not None and examples != found:
            stated = f"{examples:,} stated, and {c.data} has {found:,} rows"
            raise RowError(f"columns examples and data: {stated}.")
        examples = float(found)
        case.note("examples", found, data=c.data)
    batch = c.batch_size or _batch(case, examples)
    rows = _rows(case, examples, batch)
    if c.task == "sft" and examples is None and rows is not None:
        examples = rows / (c.epochs or 1.0)
    steps = c.steps or (None if rows is None else max(1, math.ceil(rows / batch)))
    # a run may end before it has seen all rows
    trained = examples if rows is None or examples is None else min(examples, rows)
    if c.task == "rl":
        bits: Bits = (rows, rows, rows)
        if rows is not None:
            case.note("bits", rows, "rewards", {"episodes": rows})
    elif data is not None and data.measured is not None:
        bits = _measured_bits(case, data.measured, data.counted.rows, trained)
    else:
        bits = _stated_bits(case, examples, trained, tokens)
        if data is not None:
            case.warn("not_measured", model=case.model.name, data=c.data)
    return Workload(examples, tokens, row_tokens, length, batch, steps, rows, *bits)


def _data(case: Case) -> Data | None:
    """Count the rows of the file that a customer names, and look up what was measured in it."""
    given = case.customer.data
    if given is None:
        return None
    if own.is_on_hub(given):
        case.warn("on_hub", data=given)
        return None
    try:
        counted = own.count(given)
    except (DataError, OSError) as error:
        raise RowError(f"column data: {error}") from None
    key = (counted.sha256[: own.DIGITS], case.model.name)
    return Data(counted, case.known.information.get(key))


def _batch(case: Case, examples: float | None) -> int:
    """Return the batch of a customer who states none: smaller where updates would be too few."""
    c = case.customer
    batch, rows, few = BATCH[c.task], _rows(case, examples, BATCH[c.task]), UPDATES[c.task]
    while c.steps is None and rows is not None and batch > SMALLEST and rows / batch < few:
        batch //= 2
    assumed = BATCH[c.task]
    case.note("batch_size", batch, c.task, assumed=assumed, smallest=SMALLEST, few=few)
    return batch


def _rows(case: Case, examples: float | None, batch: int) -> float | None:
    c = case.customer
    if c.task == "rl" and c.episodes is not None:
        return float(c.episodes)
    if c.steps is not None:
        return float(c.steps * batch)
    if examples is None:
        return None
    return examples * (c.epochs or 1.0) * (GROUP if c.task == "rl" else 1)


def _lengths(case: Case, data: Data | None) -> tuple[float, float, int]:
    """Return the mean tokens that bear loss, the mean tokens computed, and the longest row."""
    c = case.customer
    length, tokens = c.max_length, c.tokens_per_example
    if tokens is None and data is not None and data.measured is not None:
        tokens = data.measured.tokens_per_example
        case.note("tokens_per_example", tokens, "measured", where=data.measured.where)
    elif tokens is None and data is not None:
        counted = data.counted
        tokens = counted.answer_bytes / BYTES_PER_TOKEN / counted.rows
        inputs: dict[str, Any] = {"answer_bytes": counted.answer_bytes, "rows": counted.rows}
        case.note("tokens_per_example", tokens, "counted", inputs, bytes_per_token=BYTES_PER_TOKEN)
    if length is None:
        length = LENGTH if tokens is None else rounded(tokens / TEXT_FILL)
        form = "assumed" if tokens is None else "of_tokens"
        inputs = {"tokens_per_example": tokens}
        case.note("max_length", length, form, inputs, fill=TEXT_FILL, length=LENGTH)
    if tokens is None:
        tokens = TEXT_FILL * length
        case.note("tokens_per_example", tokens, "bound", {"max_length": length}, fill=TEXT_FILL)
        case.warn(f"tokens_assumed.{c.task}", tokens=tokens)
    return tokens, max(tokens, TEXT_FILL * length), length


def rounded(tokens: float) -> int:
    """Return the next of 2^k and 1.5 x 2^k: few lengths, so that rows share their placement."""
    k = math.floor(math.log2(max(64.0, tokens - 1e-9)))
    return next(n for n in (2**k, 3 * 2 ** (k - 1), 2 ** (k + 1)) if n >= tokens)


def _measured_bits(case: Case, found: Measured, of_file: int, trained: float | None) -> Bits:
    """Return what was measured in a file of rows, with its interval, for the rows trained on."""
    share = 1.0 if trained is None else trained / of_file
    over = "over all rows"
    if share < 1:
        over = f"over the {trained:,.0f} rows trained on, at the mean of the file's {of_file:,}"
    bits, low, high = (share * value for value in (found.bits, found.low, found.high))
    inputs = {"lowest": low, "highest": high}
    case.note("bits", bits, "measured", inputs, over=over, where=found.where)
    return bits, low, high


def _stated_bits(case: Case, examples: float | None, trained: float | None, tokens: float) -> Bits:
    """Return the bits of rows at 1 bit a token, or as many as the row states, with their range."""
    if trained is None:
        return None, None, None
    stated = case.customer.bits_per_token
    entries = case.published.entries("bits_per_token")
    middle = stated or 1.0
    known = [middle] + ([] if stated else [e["nats"] / math.log(2) for e in entries])
    total = trained * tokens * middle
    low, high = total * min(known) / middle, total * max(known) / middle
    counted = "examples"
    if examples is not None and trained < examples:
        counted = f"rows trained on ({trained:,.0f} of {examples:,.0f} examples)"
    losses = "; ".join(f"{e['data']} {e['nats'] / math.log(2):.2f}" for e in entries)
    inputs = {"examples": examples, "rows_trained_on": trained, "tokens_per_example": tokens}
    inputs |= {"bits_per_token": middle, "lowest": min(known), "highest": max(known)}
    form = "stated" if stated else "assumed"
    case.note("bits", total, form, inputs, counted=counted, losses=losses)
    return total, low, high

"""What a customer trains on: rows, tokens, updates and lengths, stated or assumed; and its bits."""

import math
from dataclasses import dataclass

from lorasweep.advise.customer import GROUP, Customer, RowError
from lorasweep.advise.information import Information, Measured
from lorasweep.advise.published import Published
from lorasweep.advise.trace import Sure, Trace
from lorasweep.data import own
from lorasweep.errors import DataError
from lorasweep.plan.load import TEXT_FILL

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


@dataclass(frozen=True)
class Workload:
    """How much is trained, and on what."""

    examples: float | None
    """Distinct rows; in RL, problems. None: not known."""
    tokens: float
    """Mean tokens of a row that bear loss."""
    row_tokens: float
    """Mean tokens of a row that are computed."""
    max_length: int
    batch_size: int
    steps: int | None
    """Updates; None: not known."""
    rows: float | None
    """Rows trained on, each as often as it is; in RL, episodes."""
    bits: float | None
    """What is new in the rows trained on, each counted once; None: not known."""
    bits_low: float | None
    bits_high: float | None


@dataclass(frozen=True)
class Data:
    """A customer's file of rows."""

    counted: own.Counted
    measured: Measured | None
    """What action=measure found in it, under the customer's model."""


def workload_of(
    c: Customer, model: str, information: Information, published: Published, trace: Trace
) -> Workload:
    """Return what a customer trains on, with a reason for whatever was not stated.

    Raises:
        RowError: the data that the row names are not there or cannot be read.
    """
    data = _data(c, model, information, trace)
    tokens, row_tokens, length = _lengths(c, data, trace)
    examples = _examples(c, data, trace)
    batch = c.batch_size or _batch(c, examples, published, trace)
    rows = _rows(c, examples, batch)
    if c.task == "sft" and examples is None and rows is not None:
        examples = rows / (c.epochs or 1.0)
    steps = c.steps or (None if rows is None else max(1, math.ceil(rows / batch)))
    found = data.measured if data and c.task == "sft" else None
    if data and found is not None:
        bits: tuple[float | None, ...] = _measured_bits(
            found, data.counted.rows, _trained_rows(examples, rows), trace
        )
    else:
        bits = _bits(c, examples, rows, tokens, published, trace)
    if data and c.task == "sft" and found is None:
        trace.warn(
            "bits of the data are stated, not measured. Where the model is: python -m lorasweep "
            f"action=measure model={model} data={c.data}"
        )
    return Workload(examples, tokens, row_tokens, length, batch, steps, rows, *bits)


def _batch(c: Customer, examples: float | None, published: Published, trace: Trace) -> int:
    """Return the batch of a customer who states none: smaller where updates would be too few."""
    batch, rows = BATCH[c.task], _rows(c, examples, BATCH[c.task])
    few = UPDATES[c.task]
    while c.steps is None and rows is not None and batch > SMALLEST and rows / batch < few:
        batch //= 2
    what = "the one batch that the study names" if c.task == "sft" else "32 problems x 16 samples"
    return int(
        trace.note(
            "batch_size",
            batch,
            f"not stated: {BATCH[c.task]}, {what}; halved down to {SMALLEST} while updates are "
            f"fewer than {few}",
            published.where("study" if c.task == "sft" else "tinker_rl"),
            Sure.ASSUMED,
        )
    )


def _data(c: Customer, model: str, information: Information, trace: Trace) -> Data | None:
    """Count the rows of the file that a customer names, and look up what was measured in it."""
    if c.data is None:
        return None
    if own.is_on_hub(c.data):
        trace.warn(
            f"{c.data} is no file or folder here, so it is taken for a data set of the hub, whose "
            "rows are not counted: state examples and tokens_per_example"
        )
        return None
    try:
        counted = own.count(c.data)
    except (DataError, OSError) as error:
        raise RowError([f"column data: {error}"]) from None
    return Data(counted, information.get((counted.sha256[: own.DIGITS], model)))


def _examples(c: Customer, data: Data | None, trace: Trace) -> float | None:
    if data is None:
        return c.examples
    found = data.counted.rows
    if c.examples is not None and c.examples != found:
        raise RowError(
            [f"columns examples and data: {c.examples:,} stated, and {c.data} has {found:,} rows."]
        )
    return float(trace.note("examples", found, f"rows of {c.data}", "counted", Sure.EXACT))


def _rows(c: Customer, examples: float | None, batch: int) -> float | None:
    if c.task == "rl" and c.episodes is not None:
        return float(c.episodes)
    if c.steps is not None:
        return float(c.steps * batch)
    if examples is None:
        return None
    return examples * (c.epochs or 1.0) * (GROUP if c.task == "rl" else 1)


def _tokens_of(data: Data, trace: Trace) -> float:
    """Return the mean loss tokens of a row of a file: as measured, or from its bytes."""
    if data.measured is not None:
        tokens, where = data.measured.tokens_per_example, data.measured.where
        return float(
            trace.note("tokens_per_example", tokens, "tokens / rows", where, Sure.MEASURED)
        )
    counted = data.counted
    return float(
        trace.note(
            "tokens_per_example",
            counted.answer_bytes / BYTES_PER_TOKEN / counted.rows,
            f"bytes of the answers / {BYTES_PER_TOKEN:g} / rows: no tokenizer is loaded here",
            "OpenAI's rule of four letters a token of English",
            Sure.ASSUMED,
            answer_bytes=counted.answer_bytes,
            rows=counted.rows,
        )
    )


def _lengths(c: Customer, data: Data | None, trace: Trace) -> tuple[float, float, int]:
    """Return the mean tokens that bear loss, the mean tokens computed, and the longest row."""
    length, tokens = c.max_length, c.tokens_per_example
    if tokens is None and data is not None:
        tokens = _tokens_of(data, trace)
    if length is None:
        wanted = LENGTH if tokens is None else rounded(tokens / TEXT_FILL)
        length = trace.note(
            "max_length",
            wanted,
            f"not stated: tokens_per_example / {TEXT_FILL}, rounded up to 2^k or 1.5 x 2^k"
            if tokens
            else f"not stated: {LENGTH}",
            "lorasweep.plan.load.TEXT_FILL: mean length of text rows over the longest",
            Sure.ASSUMED,
            tokens_per_example=tokens,
        )
    if tokens is None:
        tokens = trace.note(
            "tokens_per_example",
            TEXT_FILL * length,
            f"not stated: all tokens of a row bear loss, {TEXT_FILL} x max_length",
            "an upper bound for rows of that length",
            Sure.ASSUMED,
            max_length=length,
        )
        trace.warn(
            f"tokens_per_example is not stated; {tokens:,.0f} is assumed, and "
            f"{'load and ' if c.task == 'sft' else ''}time go with it"
        )
    return tokens, max(tokens, TEXT_FILL * length), length


def rounded(tokens: float) -> int:
    """Return the next of 2^k and 1.5 x 2^k: few lengths, so that rows share their placement."""
    k = math.floor(math.log2(max(64.0, tokens - 1e-9)))
    return next(n for n in (2**k, 3 * 2 ** (k - 1), 2 ** (k + 1)) if n >= tokens)


def _trained_rows(examples: float | None, rows: float | None) -> float | None:
    """Return how many distinct rows are trained on; a run may end before it has seen them all."""
    return examples if rows is None or examples is None else min(examples, rows)


def _measured_bits(
    found: Measured, of_file: int, trained: float | None, trace: Trace
) -> tuple[float, float, float]:
    """Return what was measured in a file of rows, with its interval, for the rows trained on."""
    share = 1.0 if trained is None else trained / of_file
    over = "over all rows"
    if share < 1:
        over = (
            f"over the {trained:,.0f} rows trained on, at the mean of the {of_file:,} of the file"
        )
    bits, low, high = (share * value for value in (found.bits, found.low, found.high))
    trace.note(
        "bits",
        bits,
        f"summed log-loss of a first pass, of each batch before it is learned, {over}",
        found.where,
        Sure.MEASURED,
        lowest=low,
        highest=high,
    )
    return bits, low, high


def _bits(
    c: Customer,
    examples: float | None,
    rows: float | None,
    tokens: float,
    published: Published,
    trace: Trace,
) -> tuple[float | None, float | None, float | None]:
    """Return what is new in the data in bits, with its range."""
    if c.task == "rl":
        if rows is not None:
            trace.note(
                "bits",
                rows,
                "episodes x 1 bit: what a reward can tell about the policy, at most",
                published.where("study"),
                Sure.ONCE,
                episodes=rows,
            )
        return rows, rows, rows
    known = [e["nats"] / math.log(2) for e in published.entries("bits_per_token")]
    middle = c.bits_per_token or 1.0
    low, high = (
        (middle, middle) if c.bits_per_token else (min([middle, *known]), max([middle, *known]))
    )
    trained = _trained_rows(examples, rows)
    if trained is None:
        return None, None, None
    counted = "examples"
    if examples is not None and trained < examples:
        counted = f"rows trained on ({trained:,.0f} of {examples:,.0f} examples)"
    total = trace.note(
        "bits",
        trained * tokens * middle,
        f"{counted} x tokens_per_example x bits_per_token: what a first pass costs, the most that "
        "there is to learn; further epochs add nothing",
        f"1 bit a token: {published.where('study')}; range: held-out losses of "
        + "; ".join(
            f"{e['data']} {e['nats'] / math.log(2):.2f}"
            for e in published.entries("bits_per_token")
        )
        if not c.bits_per_token
        else "stated",
        Sure.ASSUMED,
        examples=examples,
        rows_trained_on=trained,
        tokens_per_example=tokens,
        bits_per_token=middle,
        lowest=low,
        highest=high,
    )
    return total, total * low / middle, total * high / middle

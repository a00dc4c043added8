"""What a customer trains on: rows, tokens, updates and lengths, stated or assumed; and the bits."""

import math
from dataclasses import dataclass

from lorasweep.customers.evidence import Case, Measured, Sure
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
        case.trace.note("examples", found, f"rows of {c.data}", "counted", Sure.EXACT)
    batch = c.batch_size or _batch(case, examples)
    rows = _rows(case, examples, batch)
    if c.task == "sft" and examples is None and rows is not None:
        examples = rows / (c.epochs or 1.0)
    steps = c.steps or (None if rows is None else max(1, math.ceil(rows / batch)))
    # a run may end before it has seen all rows
    trained = examples if rows is None or examples is None else min(examples, rows)
    if c.task == "rl":
        bits = _reward_bits(case, rows)
    elif data is not None and data.measured is not None:
        bits = _measured_bits(case, data.measured, data.counted.rows, trained)
    else:
        bits = _stated_bits(case, examples, trained, tokens)
        if data is not None:
            case.trace.warn(
                "the bits of the data are stated, not measured. On a machine with the model: "
                f"python -m lorasweep action=measure model={case.model.name} data={c.data}"
            )
    return Workload(examples, tokens, row_tokens, length, batch, steps, rows, *bits)


def _data(case: Case) -> Data | None:
    """Count the rows of the file that a customer names, and look up what was measured in it."""
    given = case.customer.data
    if given is None:
        return None
    if own.is_on_hub(given):
        case.trace.warn(
            f"{given} is no local file or folder, so it is read as a data set of the hub, whose "
            "rows are not counted: state examples and tokens_per_example"
        )
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
    what = "the one batch that the study names" if c.task == "sft" else "32 problems x 16 samples"
    formula = (
        f"not stated: {BATCH[c.task]}, {what}; halved down to {SMALLEST} while updates are fewer "
        f"than {few}"
    )
    source = case.published.where("study" if c.task == "sft" else "tinker_rl")
    return int(case.trace.note("batch_size", batch, formula, source, Sure.ASSUMED))


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
    c, trace = case.customer, case.trace
    length, tokens = c.max_length, c.tokens_per_example
    if tokens is None and data is not None and data.measured is not None:
        tokens, where = data.measured.tokens_per_example, data.measured.where
        trace.note("tokens_per_example", tokens, "tokens / rows", where, Sure.MEASURED)
    elif tokens is None and data is not None:
        counted = data.counted
        tokens = counted.answer_bytes / BYTES_PER_TOKEN / counted.rows
        inputs = {"answer_bytes": counted.answer_bytes, "rows": counted.rows}
        formula = f"bytes of the answers / {BYTES_PER_TOKEN:g} / rows: no tokenizer is loaded here"
        source = "OpenAI's rule of four letters a token of English"
        trace.note("tokens_per_example", tokens, formula, source, Sure.ASSUMED, **inputs)
    if length is None:
        length, formula = LENGTH, f"not stated: {LENGTH}"
        if tokens is not None:
            length = rounded(tokens / TEXT_FILL)
            formula = (
                f"not stated: tokens_per_example / {TEXT_FILL}, rounded up to 2^k or 1.5 x 2^k"
            )
        source = "lorasweep.plan.load.TEXT_FILL: mean length of text rows over the longest"
        trace.note("max_length", length, formula, source, Sure.ASSUMED, tokens_per_example=tokens)
    if tokens is None:
        tokens = TEXT_FILL * length
        formula = f"not stated: all tokens of a row bear loss, {TEXT_FILL} x max_length"
        source = "an upper bound for rows of that length"
        trace.note("tokens_per_example", tokens, formula, source, Sure.ASSUMED, max_length=length)
        what = "load and time depend" if c.task == "sft" else "time depends"
        trace.warn(f"tokens_per_example is not stated; {tokens:,.0f} is assumed, and {what} on it")
    return tokens, max(tokens, TEXT_FILL * length), length


def rounded(tokens: float) -> int:
    """Return the next of 2^k and 1.5 x 2^k: few lengths, so that rows share their placement."""
    k = math.floor(math.log2(max(64.0, tokens - 1e-9)))
    return next(n for n in (2**k, 3 * 2 ** (k - 1), 2 ** (k + 1)) if n >= tokens)


# ---------------------------------------------------------------- bits: value, low, high

Bits = tuple[float | None, float | None, float | None]


def _reward_bits(case: Case, episodes: float | None) -> Bits:
    if episodes is not None:
        formula = "episodes x 1 bit: the most that a reward can tell about the policy"
        source = case.published.where("study")
        case.trace.note("bits", episodes, formula, source, Sure.ONCE, episodes=episodes)
    return episodes, episodes, episodes


def _measured_bits(case: Case, found: Measured, of_file: int, trained: float | None) -> Bits:
    """Return what was measured in a file of rows, with its interval, for the rows trained on."""
    share = 1.0 if trained is None else trained / of_file
    over = "over all rows"
    if share < 1:
        over = f"over the {trained:,.0f} rows trained on, at the mean of the file's {of_file:,}"
    bits, low, high = (share * value for value in (found.bits, found.low, found.high))
    formula = f"summed log-loss of a first pass, of each batch before the update on it, {over}"
    case.trace.note("bits", bits, formula, found.where, Sure.MEASURED, lowest=low, highest=high)
    return bits, low, high


def _stated_bits(case: Case, examples: float | None, trained: float | None, tokens: float) -> Bits:
    """Return the bits of rows at 1 bit a token, or as many as the row states, with their range."""
    if trained is None:
        return None, None, None
    stated, published = case.customer.bits_per_token, case.published
    entries = published.entries("bits_per_token")
    middle = stated or 1.0
    known = [middle] + ([] if stated else [e["nats"] / math.log(2) for e in entries])
    total = trained * tokens * middle
    low, high = total * min(known) / middle, total * max(known) / middle
    counted = "examples"
    if examples is not None and trained < examples:
        counted = f"rows trained on ({trained:,.0f} of {examples:,.0f} examples)"
    losses = "; ".join(f"{e['data']} {e['nats'] / math.log(2):.2f}" for e in entries)
    source = f"1 bit a token: {published.where('study')}; range: held-out losses of {losses}"
    formula = (
        f"{counted} x tokens_per_example x bits_per_token: the code length of a first pass, the "
        "most that there is to learn; further epochs add nothing"
    )
    inputs = {"examples": examples, "rows_trained_on": trained, "tokens_per_example": tokens}
    inputs |= {"bits_per_token": middle, "lowest": min(known), "highest": max(known)}
    source = "stated" if stated else source
    case.trace.note("bits", total, formula, source, Sure.ASSUMED, **inputs)
    return total, low, high

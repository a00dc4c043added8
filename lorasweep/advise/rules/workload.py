"""The data, batch size and updates of a customer, stated or assumed, and their limits."""

import math
from dataclasses import dataclass
from typing import Any

from lorasweep.advise.evidence import Case, Measured
from lorasweep.advise.read import RowError
from lorasweep.data import own
from lorasweep.errors import DataError
from lorasweep.plan.load import TEXT_FILL

GROUP = 16
"""Samples per problem in RL if no episodes are stated (tinker-cookbook, recipes/rl_loop.py)."""
BATCH = {"sft": 32, "rl": 512}
"""Batch size if none is stated. For sft, the only one that the study names. For RL, in episodes, 32
problems x 16 samples: the smallest batch in tinker-cookbook's recipes for maths."""
SMALLEST = 8
"""Smallest assumed batch: smaller ones cannot be split over the GPUs of a node."""
UPDATES = {"sft": 100, "rl": 50}
"""Smallest sufficient number of updates. For sft: tinker-cookbook, docs/sl-hyperparams.mdx, which
asks for 1,000 where possible. For RL: GRPO runs reached the plateau of full fine-tuning (zhu)."""
BYTES_PER_TOKEN = 4.0
"""UTF-8 bytes of a token of English (help.openai.com, "What are tokens and how to count them?");
fewer in other languages and code."""
LENGTH = 1024
"""Tokens of the longest row if no length is stated, as in conf/dataset/tulu3.yaml."""
SAFE = 32
"""The smallest batch that the study names. With it, LoRA's gap is small and shrinks in training."""
RL_BATCH = 2048
"""Largest batch, in episodes, of tinker-cookbook's recipes: 128 problems x 16 samples."""
LARGEST = 4096


@dataclass(frozen=True)
class Workload:
    """Training rows, batch size and updates of a customer; None: not known."""

    examples: float | None
    """Number of rows in the data; in RL, of problems."""
    tokens: float
    """Mean tokens of a row that bear loss."""
    row_tokens: float
    """Mean tokens of a row that the model reads, with or without loss."""
    max_length: int
    batch_size: int
    steps: int | None
    rows: float | None
    """Number of rows trained on, each counted in every pass; in RL, of episodes."""
    bits: float | None
    """Bits of information in the rows trained on, each row counted once."""
    bits_low: float | None
    bits_high: float | None


def workload_of(case: Case) -> Workload:
    """Return the workload of a customer; record the reason of each number that is not stated.

    Raises:
        RowError: the data of the row are missing or cannot be read.
    """
    c, rl = case.customer, case.customer.task == "rl"
    examples: float | None = c.examples
    counted: own.Counted | None = None
    measured: Measured | None = None
    if c.data is not None and own.is_on_hub(c.data):
        case.warn("on_hub", data=c.data)
    elif c.data is not None:
        try:
            counted = own.count(c.data)
        except (DataError, OSError) as error:
            raise RowError(f"column data: {error}") from None
        if examples not in (None, counted.rows):
            stated = f"{examples:,} stated, and {c.data} has {counted.rows:,} rows"
            raise RowError(f"columns examples and data: {stated}.")
        examples = float(counted.rows)
        key = (counted.sha256[: own.DIGITS], case.model.name)
        measured = case.known.information.get(key)
    tokens, row_tokens, length = _lengths(case, counted, measured)
    if counted is not None:
        case.note("examples", counted.rows, data=c.data)
    group = GROUP if rl else 1

    def rows_at(batch: int) -> float | None:
        """Return the rows trained on, counted in each pass; in RL, the episodes."""
        if rl and c.episodes is not None:
            return float(c.episodes)
        if c.steps is not None:
            return float(c.steps * batch)
        return None if examples is None else examples * (c.epochs or 1.0) * group

    planned = c.episodes if rl else examples and c.epochs and examples * c.epochs
    batch = c.batch_size
    if batch is None and c.steps is not None and planned:
        batch = max(group, round(planned / c.steps / group) * group)
        case.note("batch_size", batch, "of_steps", {"rows": float(planned), "steps": c.steps})
    elif batch is None:  # halve it if updates would be too few
        assumed, few, smallest = BATCH[c.task], UPDATES[c.task], GROUP if rl else SMALLEST
        batch, rows = assumed, None if c.steps else rows_at(assumed)
        while rows is not None and batch > smallest and rows / batch < few:
            batch //= 2
        case.note("batch_size", batch, c.task, assumed=assumed, smallest=smallest, few=few)
    rows = rows_at(batch)
    if not rl and examples is None and rows is not None:
        examples = rows / (c.epochs or 1.0)
    steps = c.steps or (None if rows is None else max(1, math.ceil(rows / batch)))
    # a run may end before it has seen all rows
    trained = examples if rows is None or examples is None else min(examples, rows)
    if rl:
        bits: tuple[float | None, ...] = (rows, rows, rows)
        if rows is not None:
            case.note("bits", rows, "rewards", {"episodes": rows})
    elif counted is not None and measured is not None:
        share, over = 1.0, "over all rows"
        if trained is not None and trained < counted.rows:
            share = trained / counted.rows
            over = f"over the {trained:,.0f} rows trained on, at the file's mean"
        bits = tuple(share * value for value in (measured.bits, measured.low, measured.high))
        inputs = {"lowest": bits[1], "highest": bits[2]}
        case.note("bits", bits[0], "measured", inputs, over=over, where=measured.where)
    else:
        bits = _stated_bits(case, examples, trained, tokens)
        if counted is not None:
            case.warn("not_measured", model=case.model.name, data=c.data)
    return Workload(examples, tokens, row_tokens, length, batch, steps, rows, *bits)


def _lengths(
    case: Case, counted: own.Counted | None, measured: Measured | None
) -> tuple[float, float, int]:
    """Return the mean tokens that bear loss, the mean tokens computed, and the longest row."""
    c = case.customer
    length, tokens = c.max_length, c.tokens_per_example
    inputs: dict[str, Any] = {}
    if tokens is None and measured is not None:
        tokens = measured.tokens_per_example
        case.note("tokens_per_example", tokens, "measured", where=measured.where)
    elif tokens is None and counted is not None:
        tokens = counted.answer_bytes / BYTES_PER_TOKEN / counted.rows
        inputs = {"answer_bytes": counted.answer_bytes, "rows": counted.rows}
        case.note("tokens_per_example", tokens, "counted", inputs, bytes_per_token=BYTES_PER_TOKEN)
    if length is None:
        length = LENGTH if tokens is None else rounded(tokens / TEXT_FILL)
        form, inputs = "assumed" if tokens is None else "of_tokens", {"tokens_per_example": tokens}
        case.note("max_length", length, form, inputs, fill=TEXT_FILL, length=LENGTH)
    if tokens is None:
        tokens = TEXT_FILL * length
        case.note("tokens_per_example", tokens, "bound", {"max_length": length}, fill=TEXT_FILL)
        case.warn(f"tokens_assumed.{c.task}", tokens=tokens)
    return tokens, max(tokens, TEXT_FILL * length), length


def rounded(tokens: float) -> int:
    """Round up to 2^k or 1.5 x 2^k: customers with the same result share a cached placement."""
    k = math.floor(math.log2(max(64.0, tokens - 1e-9)))
    return next(n for n in (2**k, 3 * 2 ** (k - 1), 2 ** (k + 1)) if n >= tokens)


def _stated_bits(
    case: Case, examples: float | None, trained: float | None, tokens: float
) -> tuple[float | None, ...]:
    """Return the bits of the rows (middle, low, high) at the stated bits per token, else at 1."""
    if trained is None:
        return None, None, None
    stated = case.customer.bits_per_token
    entries = case.known.published.entries("bits_per_token")
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


# ---------------------------------------------------------------- limits


@dataclass(frozen=True)
class Batches:
    """Limits of batch size and updates."""

    largest: int
    steps_min: int
    per_doubling: float
    """Assumed change of ln(rho) per doubling of the batch."""


def regret_of_batch(batch: int, rows: float, per_doubling: float) -> float:
    """Return LoRA's expected regret of a batch, in percent of full fine-tuning's gain.

    Assumes that ln(rho) is per_doubling x log2(batch / 32), and that the loss falls linearly in
    ln(updates). So the regret is the share -ln(rho) / ln(updates) of the gain.
    """
    slower = max(0.0, -per_doubling) * max(0.0, math.log2(batch / SAFE))
    return 100 * slower / math.log(max(math.e, rows / batch))


def batches_of(case: Case, work: Workload) -> Batches:
    """Return the largest batch and the fewest updates for a customer's data."""
    c, rows, least = case.customer, work.rows, UPDATES[case.customer.task]
    case.note("steps_min", least, c.task)
    sizes = [2**k for k in range(13) if 2**k <= LARGEST]
    if c.task == "rl":
        sizes = [b for b in sizes if GROUP <= b <= RL_BATCH]
        enough = [b for b in sizes if rows is None or rows / b >= least]
        largest = max(enough, default=GROUP)
        case.note("batch_size_max", largest, "rl", {"episodes": rows}, most=RL_BATCH, least=least)
        return Batches(largest, least, 0.0)
    effects = case.known.kept.batch_effects()
    worst = min([0.0, *(e for _, e in effects)])
    assumed = rows if rows is not None else 1000.0 * SAFE
    allowed = [b for b in sizes if regret_of_batch(b, assumed, worst) <= c.max_regret]
    largest = max(allowed) if effects else SAFE
    inputs = {"rows": rows, "effect": worst, "max_regret": c.max_regret}
    scales = ", ".join(f"{s} {e:+.3f}" for s, e in effects) or "no scale"
    case.note("batch_size_max", largest, "sft", inputs, scales=scales)
    return Batches(largest, least, worst)

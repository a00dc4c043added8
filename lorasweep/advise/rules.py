"""Rules of the adviser: amount of data, method and rank, learning rate, and largest batch.

Each rule computes its part of an advice from the customer, the model and known figures: published
ones, this project's kept results, measured data sets. It notes how it got each number: formula,
inputs, source and confidence.
"""

import csv
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from itertools import pairwise
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import yaml

from lorasweep.advise.read import Customer, Models, RowError
from lorasweep.data import column_names
from lorasweep.errors import DataError, SpecError
from lorasweep.methods.lora import LoRA
from lorasweep.models.find import content_pin
from lorasweep.plan.detect import Hardware
from lorasweep.plan.needs import TEXT_FILL
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.recommended import ALPHA, BATCH, LAYERS, UPDATES

GROUP = 16
"""Samples per problem in RL if no episodes are stated (tinker-cookbook, recipes/rl_loop.py)."""
SMALLEST = 8
"""Smallest assumed batch: smaller ones cannot be split over the GPUs of a node."""
BYTES_PER_TOKEN = 4.0
"""UTF-8 bytes of a token of English (help.openai.com, "What are tokens and how to count them?");
fewer in other languages and code."""
LENGTH = 1024
"""Tokens of the longest row if no length is stated, as in conf/dataset/tulu3.yaml."""
SAFE = 32
"""The smallest batch that the study names. With it, LoRA's gap is small and shrinks in training."""
RL_BATCH = 2048
"""Largest batch in RL, in episodes: of tinker-cookbook's recipes (128 problems x 16)."""
BITS_PER_PARAMETER = 2.0
"""Bits that a trained parameter stores, by the study, from Allen-Zhu and Li: 2 if facts are seen
about 1,000 times, 1 if they are seen 100 times."""
ROOM = 0.5
"""Largest load that surely fits. tinker-cookbook asks for at least one parameter per token that
bears loss. In the study such a token has 1 bit."""
FULL = 1.0
"""Load above which the data exceed the capacity of a rank by the study's count."""
NEAR = math.sqrt(2)
"""Largest factor between a model's width and that at which regret was measured."""
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Ranks of the study, and ranks that serving engines accept."""
WIDEST = 8
"""Published comparisons with full fine-tuning use ranks of up to an eighth of the hidden size."""
SHORT, SHORT_FACTOR = 100, 1.5
"""Below so many updates, the study reports an LR ratio of about 15, not 10, as an anecdote."""
STEP = 1.8
"""Factor by which a published best learning rate is uncertain on both sides: half a step of the
coarsest public grid, whose learning rates are a factor 3.3 apart. Without it, the best learning
rates of 7 of 10 held-out sources lay outside the interval (analysis/results/advice)."""
APART, MOST_RATES = 3.0, 9
"""Factor between the learning rates that a fleet tries, as in public grids (STEP); and how many."""
INFORMATION = "information"
"""Folder of the results of action=measure, below the reports and the kept results."""


class Sure(StrEnum):
    """Confidence in a number, from highest to lowest."""

    EXACT = "exact: counted from the shape"
    MEASURED = "measured here, on this model"
    PLANNED = "computed; nine in ten published figures lie within the stated error"
    PUBLISHED = "published by more than one"
    ONCE = "published once, or disputed"
    WEAK = "measured here on small models only"
    ASSUMED = "an assumption"


@dataclass(frozen=True)
class Reason:
    """How a number of an answer was obtained."""

    name: str
    value: Any
    formula: str
    inputs: Mapping[str, Any]
    source: str
    sure: Sure


def shown(value: Any) -> str:
    """Format a value for people: three digits, thousands separated."""
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    if isinstance(value, float) and (abs(value) >= 1e9 or abs(value) < 1000):
        return f"{value:.3g}"
    if isinstance(value, int | float):
        return f"{value:,.0f}"
    return "not known" if value is None else str(value)


@cache
def texts(name: str) -> dict[str, Any]:
    """Read a YAML file of this package: published (figures with sources), formulas or warnings."""
    return yaml.safe_load(Path(__file__).with_name(f"{name}.yaml").read_text())


# ---------------------------------------------------------------- kept results


@dataclass(frozen=True)
class Kept:
    """The kept results that rules use."""

    rows: Sequence[Mapping[str, Any]] = ()
    """Text, but numbers or None for value, low and high (the 95% interval). With a claim it is a
    verdict, and applies to its base model."""
    hidden: Mapping[str, int] = field(default_factory=dict)
    """Hidden size of each model."""

    def measured(self, sweep: str, quantity: str) -> list[Mapping[str, Any]]:
        """List a sweep's measurements of a quantity, without verdicts."""
        wanted = (sweep, quantity, "")
        mine = (r for r in self.rows if (r["sweep"], r["quantity"], r["claim"]) == wanted)
        return [r for r in mine if r["value"] is not None]

    def covering(self, hidden: int) -> dict[int, list[tuple[float, ...]]]:
        """Return rank -> (load, regret, ends of its interval), at the width nearest to `hidden`.

        The regret is in percent of full fine-tuning's gain. The bits of the load are counted in the
        study's way, as the loss in the first epoch. Empty if no width within a factor of NEAR was
        measured, or outside the measured range of widths.
        """
        loads = self.measured("regime", "load, first_pass")
        load = {(r["task"], r["rank"]): r["value"] for r in loads}
        found: dict[int, dict[int, list[tuple[float, ...]]]] = {}
        for r in self.measured("regime", "regret_percent"):
            at, width = load.get((r["task"], r["rank"])), self.hidden.get(r["base"])
            if at is not None and width is not None and r["low"] is not None:
                of_width = found.setdefault(width, {}).setdefault(int(r["rank"]), [])
                of_width.append((at, r["value"], r["low"], r["high"]))
        if not found or not min(found) <= hidden <= max(found):
            return {}
        width = min(sorted(found), key=lambda width: abs(math.log(width / hidden)))
        return found[width] if max(width, hidden) <= NEAR * min(width, hidden) else {}

    def batch_effects(self) -> dict[str, float]:
        """Return the change of ln(rho) of the highest rank per doubling of the batch, by scale."""
        found = self.measured("batch_size", "batch_effect")
        by_rank = sorted((int(r["rank"]), r["scale"], r["value"]) for r in found)
        return {scale: effect for _, scale, effect in by_rank}


def read_kept(folder: Path, hidden: Mapping[str, int]) -> Kept:
    """Read `folder`/rows.csv, if it is there, without withdrawn verdicts."""
    path, rows = folder / "rows.csv", []
    for row in csv.DictReader(path.read_text().splitlines()) if path.is_file() else ():
        if "WITHDRAWN" not in row["gates"].split():
            ends = {k: float(row[k]) if row[k] else None for k in ("value", "low", "high")}
            rows.append({**row, **ends})
    return Kept(rows, hidden)


# ---------------------------------------------------------------- measured data sets


def read_information(folders: Sequence[Path]) -> dict[tuple[str, str], dict[str, Any]]:
    """Read the measurements, by (first digits of the SHA-256 of the rows' file, model).

    Each has `tokens_per_example`; the code length of all rows in bits, online during training, as
    `value`, with its 95% interval from `low` to `high`; and `where` it was read. The first folder
    with a measurement counts. Those without a value for all rows (endless data, too few rows) are
    left out.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in (p for folder in folders for p in sorted((folder / INFORMATION).glob("*.json"))):
        try:
            value = json.loads(path.read_text())
            whole, rows = value["prequential"]["bits"]["all"], value["rows"]
            if whole["value"] is None or not value["rows_sha256"]:
                continue
            where = f"action=measure, {rows['measured']:,} of {rows['all']:,} rows ({path})"
            tokens = value["loss_tokens"]["all"] / rows["all"]
            measured = {**whole, "tokens_per_example": tokens, "where": where}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # being written, or broken
        found.setdefault((value["rows_sha256"], value["model"]), measured)
    return found


@dataclass(frozen=True)
class Known:
    """The inputs of rules other than the customer."""

    models: Models
    machines: Mapping[str, Callable[[], Hardware]]
    """Name in conf/hardware -> function that reads the file."""
    kept: Kept = field(default_factory=Kept)
    published: Mapping[str, Any] = field(default_factory=lambda: texts("published"))
    hardware: Hardware | None = None
    """Hardware for customers who name none."""
    information: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)
    """The result of `read_information`."""
    layers: str = LAYERS
    """Layers that LoRA adapts."""


# ---------------------------------------------------------------- an advice


class Rate(NamedTuple):
    """A learning rate to start from, its interval and its sources."""

    rate: float
    low: float
    high: float
    source: str


@dataclass
class Arm:
    """The costs of one method. None: it fits on no number of GPUs, or the value is not known."""

    file_mib: float
    """Size of the shipped adapter, or of the fully fine-tuned model."""
    serving_gib: float
    """Memory of the weights that serve all adapters, or all full copies, of the customer."""
    gpus: int | None = None
    """GPUs of the run: as many as are available, or the fewest that hold it."""
    fits: bool = False
    """Whether the customer's GPUs hold the run."""
    peak_gib: float | None = None
    step_s: float | None = None
    hours: float | None = None
    cost_usd: float | None = None


@dataclass
class Advice:
    """The advice for one customer. The rules fill it in, in the order of the fields."""

    customer: Customer
    model: ModelSpec
    known: Known
    hardware: Hardware
    reasons: dict[str, Reason] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    examples: float | None = None
    """Number of rows in the data; in RL, of problems. None here and below: not known."""
    tokens: float = 0
    """Mean tokens of a row that bear loss."""
    row_tokens: float = 0
    """Mean tokens of a row that the model reads, with or without loss."""
    max_length: int = 0
    batch_size: int = 0
    steps: int | None = None
    rows: float | None = None
    """Number of rows trained on, each counted in every pass; in RL, of episodes."""
    bits: tuple[float, float, float] | None = None
    """Bits of information in the rows trained on, each row counted once; and their interval."""
    method: str = ""
    """lora, full, or open (undecided)."""
    rank: int = 0
    """The recommended rank of LoRA; if the method is open, the rank to try."""
    load: float | None = None
    by: str = ""
    """The rule that chose the method: measured regret, or capacity."""
    why: str = ""
    largest_batch: int = 0
    effect: float = 0
    """Assumed change of ln(rho) per doubling of the batch."""
    lora_rate: Rate = field(init=False)
    rate: Rate = field(init=False)
    """The learning rate of the advised method; if it is open, that of LoRA."""
    lora: Arm = field(init=False)
    full: Arm = field(init=False)
    conditions: list[dict[str, Any]] = field(default_factory=list)
    """The conditions for LoRA without regret, judged by the plan, else by the advice. `state` is
    met, missed or unknown."""

    @property
    def name(self) -> str:
        """The customer's name."""
        return self.customer.name

    @property
    def chosen(self) -> Arm:
        """The costs of the advised method; if it is open, of LoRA."""
        return self.full if self.method == "full" else self.lora

    def trained(self, rank: int, layers: str = "") -> int:
        """Count LoRA's trained parameters; adapters of experts have rank `rank` / (active)."""
        return LoRA(rank=rank, layers=layers or self.known.layers).n_trainable(self.model)

    def load_at(self, rank: int, layers: str = "") -> tuple[float, float, float] | None:
        """Return the bits, and the ends of their interval, divided by the capacity of a rank."""
        capacity = BITS_PER_PARAMETER * self.trained(rank, layers)
        return self.bits and tuple(bits / capacity for bits in self.bits)  # type: ignore[return-value]

    def note(
        self,
        name: str,
        value: Any,
        variant: str = "",
        inputs: Mapping[str, Any] | None = None,
        **words: Any,
    ) -> None:
        """Record the reason of a number, from the entry `name.variant` of formulas.yaml.

        peak_gib_lora and peak_gib_full use the entry peak_gib. `inputs`: values in the formula.
        `words`: texts for the {placeholders} in formula and source.
        """
        key = name.removesuffix("_lora").removesuffix("_full")
        entry = texts("formulas")[f"{key}.{variant}" if variant else key]
        words = {**self.known.published["sources"], **words}
        formula, source = (entry[k].format(**words) for k in ("formula", "source"))
        self.reasons[name] = Reason(name, value, formula, inputs or {}, source, Sure[entry["sure"]])

    def warn(self, name: str, /, **words: Any) -> None:
        """Record a warning of warnings.yaml."""
        self.warnings.append(texts("warnings")[name].format(**words))


# ---------------------------------------------------------------- data, batch size and updates


def count_data(a: Advice) -> None:
    """Find the amount of data, the batch size and the updates, stated or assumed.

    Raises:
        RowError: the data of the row are missing or cannot be read.
    """
    c, rl = a.customer, a.customer.task == "rl"
    counted = measured = None
    a.examples, length, tokens = c.examples, c.max_length, c.tokens_per_example
    if c.data is not None and column_names.is_on_hub(c.data):
        a.warn("on_hub", data=c.data)
    elif c.data is not None:
        try:
            counted = column_names.count(c.data)
        except (DataError, OSError) as error:
            raise RowError(f"column data: {error}") from None
        if c.examples not in (None, counted.rows):
            stated = f"{c.examples:,} stated, and {c.data} has {counted.rows:,} rows"
            raise RowError(f"columns examples and data: {stated}.")
        a.examples = float(counted.rows)
        sha256, model = counted.sha256[: column_names.DIGITS], a.model.name
        folder = Path(c.model.removesuffix("config.json"))
        if folder.is_dir() and any(sha256 == of for of, _ in a.known.information):
            model += f"-{content_pin(folder).removeprefix('sha256:')[:8]}"  # as it was measured
        measured = a.known.information.get((sha256, model))
    if tokens is None and measured is not None:
        tokens = measured["tokens_per_example"]
        a.note("tokens_per_example", tokens, "measured", where=measured["where"])
    elif tokens is None and counted is not None:
        tokens = counted.answer_bytes / BYTES_PER_TOKEN / counted.rows
        inputs: dict[str, Any] = {"answer_bytes": counted.answer_bytes, "rows": counted.rows}
        a.note("tokens_per_example", tokens, "counted", inputs, bytes_per_token=BYTES_PER_TOKEN)
    if length is None:
        length = LENGTH if tokens is None else rounded(tokens / TEXT_FILL)
        form, read = "assumed" if tokens is None else "of_tokens", {"tokens_per_example": tokens}
        a.note("max_length", length, form, read, fill=TEXT_FILL, length=LENGTH)
    if tokens is None:
        tokens = TEXT_FILL * length
        a.note("tokens_per_example", tokens, "bound", {"max_length": length}, fill=TEXT_FILL)
        a.warn(f"tokens_assumed.{c.task}", tokens=tokens)
    a.tokens, a.row_tokens, a.max_length = tokens, max(tokens, TEXT_FILL * length), length
    if counted is not None:
        a.note("examples", counted.rows, data=c.data)
    group = GROUP if rl else 1

    def rows_at(batch: int) -> float | None:
        if rl and c.episodes is not None:
            return float(c.episodes)
        if c.steps is not None:
            return float(c.steps * batch)
        return None if a.examples is None else a.examples * (c.epochs or 1.0) * group

    planned = c.episodes if rl else a.examples and c.epochs and a.examples * c.epochs
    batch, few = c.batch_size, UPDATES[c.task]
    if batch is None and c.steps is not None and planned:
        batch = max(group, round(planned / c.steps / group) * group)
        a.note("batch_size", batch, "of_steps", {"rows": float(planned), "steps": c.steps})
    elif batch is None:  # halve it if updates would be too few
        assumed, smallest = BATCH[c.task], GROUP if rl else SMALLEST
        batch, rows = assumed, None if c.steps else rows_at(assumed)
        while rows is not None and batch > smallest and rows / batch < few:
            batch //= 2
        a.note("batch_size", batch, c.task, assumed=assumed, smallest=smallest, few=few)
    a.batch_size, a.rows = batch, rows_at(batch)
    if not rl and a.examples is None and a.rows is not None:
        a.examples = a.rows / (c.epochs or 1.0)
    a.steps = c.steps or (None if a.rows is None else max(1, math.ceil(a.rows / batch)))
    a.note("steps_min", few, c.task)
    # a run may end before it has seen all rows
    seen = a.examples if a.rows is None or a.examples is None else min(a.examples, a.rows)
    if rl and a.rows is not None:
        a.bits = (a.rows, a.rows, a.rows)
        a.note("bits", a.rows, "rewards", {"episodes": a.rows})
    elif not rl and counted is not None and measured is not None:
        share, over = 1.0, "over all rows"
        if seen is not None and seen < counted.rows:
            share = seen / counted.rows
            over = f"over the {seen:,.0f} rows trained on, at the file's mean"
        bits, low, high = (share * measured[k] for k in ("value", "low", "high"))
        a.bits = (bits, low, high)
        ends = {"lowest": low, "highest": high}
        a.note("bits", bits, "measured", ends, over=over, where=measured["where"])
    elif not rl:
        if seen is not None:  # at the stated bits per token, else at 1
            entries = a.known.published["bits_per_token"]
            middle = c.bits_per_token or 1.0
            others = [] if c.bits_per_token else [e["nats"] / math.log(2) for e in entries]
            total, known = seen * tokens * middle, [middle, *others]
            a.bits = (total, total * min(known) / middle, total * max(known) / middle)
            of = "examples"
            if a.examples is not None and seen < a.examples:
                of = f"rows trained on ({seen:,.0f} of {a.examples:,.0f} examples)"
            losses = "; ".join(f"{e['data']} {e['nats'] / math.log(2):.2f}" for e in entries)
            inputs = {"examples": a.examples, "rows_trained_on": seen}
            inputs |= {"tokens_per_example": tokens, "bits_per_token": middle}
            inputs |= {"lowest": min(known), "highest": max(known)}
            form = "stated" if c.bits_per_token else "assumed"
            a.note("bits", total, form, inputs, counted=of, losses=losses)
        if counted is not None:
            base = quote(c.model.removesuffix("/config.json"))
            size = max(1, min(16, int(a.examples or 0) // 24))  # batches that an estimate needs
            a.warn("not_measured", model=base, data=quote(c.data or ""), size=size)


def rounded(tokens: float) -> int:
    """Round up to 2^k or 1.5 x 2^k: customers with the same result share a cached placement."""
    k = math.floor(math.log2(max(64.0, tokens - 1e-9)))
    return next(n for n in (2**k, 3 * 2 ** (k - 1), 2 ** (k + 1)) if n >= tokens)


# ---------------------------------------------------------------- method and rank


@cache
def ranks_of(model: ModelSpec, layers: str = LAYERS) -> tuple[int, ...]:
    """List the standard ranks that a model can have, up to an eighth of its width.

    The rank of a model with experts is a multiple of the active experts. If no standard rank is,
    the ranks are the standard ones times the active experts.

    Raises:
        RowError: there is no such rank.
    """
    for ranks in (RANKS, [model.n_active_experts * rank for rank in RANKS]):
        found = []
        for rank in ranks:
            with suppress(SpecError):
                LoRA(rank=rank, layers=layers).check(model)
                found.append(rank)
        if found:
            widest = max(1, model.hidden_size // WIDEST)
            return tuple(found[:1] + [rank for rank in found[1:] if rank <= widest])
    raise RowError(f"column model: no rank of LoRA fits {model.name}. Check its shape.")


def choose(a: Advice) -> None:
    """Choose the method and LoRA's rank, by measured regret if that covers the case."""
    c, model, published = a.customer, a.model, a.known.published
    a.method, a.rank, a.by, a.why = _by_regret(a) or _by_capacity(a)
    a.note("method", a.method, a.by, {"rule": a.by}, why=a.why)
    a.load, low, high = a.load_at(a.rank) or (None, None, None)
    inputs: dict[str, Any] = {"bits": a.bits and a.bits[0], "lowest": low, "highest": high}
    inputs["trained"] = a.trained(a.rank)
    a.note("load", a.load, "", inputs, bits_per_parameter=BITS_PER_PARAMETER)
    floors = dict.fromkeys(e["source"] for e in published["least_rank"] if e["task"] == c.task)
    cited = "; ".join(published["sources"][source] for source in floors)
    inputs = {"ranks": [*ranks_of(model, a.known.layers)], "width": model.hidden_size}
    a.note("rank", a.rank, "", inputs, why=a.why, floors=cited or "the smallest standard rank")
    a.note("layers", a.known.layers)
    if a.rank < 8:
        a.warn("low_rank", rank=a.rank)


def _by_capacity(a: Advice) -> tuple[str, int, str, str]:
    floors = [e for e in a.known.published["least_rank"] if e["task"] == a.customer.task]
    ranks, least = ranks_of(a.model, a.known.layers), max((e["rank"] for e in floors), default=1)
    usable = [r for r in ranks if r >= least] or [ranks[-1]]
    loads = {r: load for r in usable if (load := a.load_at(r))}
    if not loads:
        holds = ROOM * BITS_PER_PARAMETER * a.trained(usable[0])
        unit = "episodes" if a.customer.task == "rl" else "tokens that bear loss, at 1 bit each"
        why = f"the amount of data is not stated. Rank {usable[0]} suffices for {holds:.2g} {unit}"
        return "open", usable[0], "capacity", why
    rank = next((r for r, (_, _, high) in loads.items() if high <= ROOM), usable[-1])
    _, low, high = loads[rank]
    if high <= ROOM:
        method = "lora"
        why = (
            f"rank {rank} is the smallest of {usable[0]} or more with a load of at most {ROOM} at "
            "the high end of the bits"
        )
    elif low > FULL:
        method = "full"
        why = (
            f"even rank {rank}, the highest that was compared with full fine-tuning at this width, "
            f"has a load of {low:.2g} or more, above {FULL:g}"
        )
    else:
        method = "open"
        why = (
            f"rank {rank} has a load of {low:.2g} to {high:.2g}, neither surely below {ROOM} nor "
            f"surely above {FULL:g}. Run the sweep"
        )
    return method, rank, "capacity", why


def _by_regret(a: Advice) -> tuple[str, int, str, str] | None:
    """Choose by measured regret; None if no measurement covers the case."""
    allowed = a.customer.max_regret
    found: dict[int, tuple[float, ...]] = {}
    regrets = a.known.kept.covering(a.model.hidden_size) if a.customer.task == "sft" else {}
    for rank, points in sorted(regrets.items()):
        load = (a.load_at(rank, "all") or (0.0,))[0]  # the layers of those runs
        for left, right in pairwise(sorted(points)):
            if left[0] <= load <= right[0]:  # interpolate in the logarithm of the load
                t = math.log(load / left[0]) / math.log(right[0] / left[0])
                between = ((1 - t) * x + t * y for x, y in zip(left[1:], right[1:]))
                found.setdefault(rank, tuple(between))
    if not found:
        return None
    shown = (f"rank {r} {v:.3g} [{low:.3g}, {high:.3g}]" for r, (v, low, high) in found.items())
    text = ", ".join(shown)
    good = [r for r, (_, _, high) in found.items() if high <= allowed]
    if good:
        method, rank = "lora", good[0]
        why = f"the smallest rank with a regret of at most {allowed:g}% of the gain: {text}"
    else:
        rank = max(found)
        method, above = ("full", "above") if found[rank][1] > allowed else ("open", "perhaps above")
        why = f"the highest rank measured has a regret {above} {allowed:g}% of the gain: {text}"
    return method, rank, "measured regret", why


# ---------------------------------------------------------------- learning rate


def family_of(model: ModelSpec) -> str | None:
    """Return the family in the published law, 'llama' or 'qwen', or None."""
    words = f"{model.name} {model.location}".lower()
    return next((f for f in ("llama", "qwen") if f in words), None)


def law_rate(published: Mapping[str, Any], family: str, hidden: int, method: str) -> float | None:
    """Return the learning rate of the published law; None if that source was left out."""
    law = published["law"]
    if law is None:
        return None
    factor = law["factor"] if method == "lora" else 1
    return float(law["base"] * factor * (2000 / hidden) ** law["exponents"][family])


def rate_of(a: Advice, method: str) -> Rate:
    """Return the learning rate of a method: lora (scaling alpha / rank, alpha 32) or full.

    It is measured on the customer's model, else published. The interval spans all sources. For
    published rates it adds half a step of the grid on both sides.
    """
    task, model, published = a.customer.task, a.model, a.known.published
    arm = "fullft" if method == "full" else "lora"
    found: dict[str, float] = {}
    for row in a.known.kept.measured("lr_ratio", "best_lr") if task == "sft" else ():
        if row["base"] == model.name and row["arm"].split()[0] == arm:
            where = f"lr_ratio at {row['scale']} on {row['data']}"
            ends = (("low end", "low"), ("best", "value"), ("high end", "high"))
            found |= {f"{where}, {k}": row[v] for k, v in ends if row[v] is not None}
    form, step = ("measured", 1.0) if found else ("published", STEP)
    middle = [v for name, v in found.items() if name.endswith(", best")]
    if not found:
        if task == "sft":
            family = family_of(model)
            for name in [family] if family else ["llama", "qwen"]:
                law = law_rate(published, name, model.hidden_size, method)
                if law is not None:
                    found[f"law of {name}s (tinker_law)"] = law
            middle = list(found.values())
            by_rank = (published["best_rates"] or {"models": {}})["models"].get(model.location)
            if method == "lora" and by_rank:
                best = by_rank[min(by_rank, key=lambda r: abs(r - a.rank))]
                found[f"best of this model near rank {a.rank} (tinker_sweep)"] = best
        for e in published["rates"]:
            if (e["task"], e["method"]) == (task, method):
                found[f"{e['what']} ({e['source']})"] = e["rate"]
        if len(middle) != 1:  # no law, or two families that disagree
            middle = list(found.values())
    low, high = min(found.values()) / step, max(found.values()) * step
    rate = math.exp(sum(map(math.log, middle)) / len(middle))
    few = a.steps is not None and a.steps < SHORT
    if few and task == "sft" and method == "lora" and form == "published":
        high *= SHORT_FACTOR
        a.warn("short_run", steps=a.steps, short=SHORT, factor=SHORT_FACTOR, high=high)
    names = "; ".join(found)
    inputs: dict[str, Any] = {"low": low, "high": high, "sources": names}
    inputs |= {"alpha": ALPHA} if method == "lora" else {}
    sources = "; ".join(text for key, text in published["sources"].items() if f"({key})" in names)
    a.note("lr", rate, form, inputs, sources=sources)
    a.note("lr_factor", 10, outdated=published["outdated"])
    return Rate(rate, low, high, names)


# ---------------------------------------------------------------- largest batch


def regret_of_batch(batch: int, rows: float, per_doubling: float) -> float:
    """Return LoRA's expected regret of a batch, in percent of full fine-tuning's gain.

    Assumes that ln(rho) is per_doubling x log2(batch / 32), and that the loss falls linearly in
    ln(updates). So the regret is the share -ln(rho) / ln(updates) of the gain.
    """
    slower = max(0.0, -per_doubling) * max(0.0, math.log2(batch / SAFE))
    return 100 * slower / math.log(max(math.e, rows / batch))


def limit_batch(a: Advice) -> None:
    """Set the largest batch for a customer's data."""
    c, rows, least = a.customer, a.rows, UPDATES[a.customer.task]
    sizes = [2**k for k in range(13)]
    if c.task == "rl":
        enough = [
            b for b in sizes if GROUP <= b <= RL_BATCH and (rows is None or rows / b >= least)
        ]
        a.largest_batch = max(enough, default=GROUP)
        words = {"most": RL_BATCH, "least": least}
        a.note("batch_size_max", a.largest_batch, "rl", {"episodes": rows}, **words)
        return
    effects = a.known.kept.batch_effects()
    a.effect = min([0.0, *effects.values()])
    assumed = rows if rows is not None else 1000.0 * SAFE
    allowed = [b for b in sizes if regret_of_batch(b, assumed, a.effect) <= c.max_regret]
    a.largest_batch = max(allowed) if effects else SAFE
    inputs = {"rows": rows, "effect": a.effect, "max_regret": c.max_regret}
    scales = ", ".join(f"{s} {e:+.3f}" for s, e in effects.items()) or "no scale"
    a.note("batch_size_max", a.largest_batch, "sft", inputs, scales=scales)

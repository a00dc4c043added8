"""Compare the plan's memory and speed with published measurements (published.yaml).

Settings alone decide which rows the plan covers (`not_covered`). One constant of the plan is fitted
to such figures (TRAINING_SHARE). For each row, it is fitted to the other sources only.

    python -m benchmarks published
"""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from analysis.report.text import Rows
from benchmarks.harness import RESULTS, render
from lorasweep.config.catalogue import conf_dir
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.plan.detect import Hardware, from_plain
from lorasweep.plan.needs import (
    TRAINING_SHARE,
    Layout,
    Load,
    load_of,
    memory_parts,
    step_parts,
    step_seconds,
)
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.values import build

TABLE = Path(__file__).with_name("published.yaml")
FOLDER = RESULTS / "plan"
CARDS = ("a100", "a100-40", "h100", "h200")
"""Cards with the peak, bandwidths and power of NVIDIA's data sheets."""
FEWEST_TOKENS = 2048
"""With fewer tokens per forward pass and GPU, the CPU limits the speed; no source names it."""
STREAM = 2
"""Bytes per number of the residual stream: bf16 in the sources. In lorasweep it is fp32."""
GB = 1e9 / 2**30


@dataclass(frozen=True)
class Row:
    """One published figure and its settings, as in published.yaml."""

    source: str
    model: str
    method: str
    precision: str
    sharding: str
    states: str
    loss: str
    checkpointing: str | None
    card: str | None
    gpus: int | None
    length: int | None
    """Tokens per row."""
    rows: int | None
    """Rows per forward pass and GPU."""
    rank: int = 0
    layers: str = "attention+mlp"
    modules: tuple[str, ...] = ()
    """Adapted matrices, if they are no layer set."""
    memory_gib: float | None = None
    tokens_s: float | None = None
    offload: bool = False
    allocator: bool = False
    """The memory is the count of torch's allocator, without the rest of the process."""
    ambiguous: bool = False
    """Another row of the source states the same settings and another figure."""
    measured: bool = True


@cache
def _table() -> dict[str, Any]:
    return yaml.safe_load(TABLE.read_text())


@cache
def rows() -> tuple[Row, ...]:
    """Read all rows, memory in GiB and speed in tokens per second and GPU."""
    found = []
    for source, entry in _table()["sources"].items():
        for row in entry["rows"]:
            own = row if isinstance(row, dict) else dict(zip(entry["columns"], row, strict=True))
            values = {**entry["settings"], **own}
            values["modules"] = tuple(values.get("modules", ()))
            together = values.pop("rows_an_iteration", None)
            seconds, gb = values.pop("iteration_s", None), values.pop("gb", None)
            if seconds is not None:
                values["tokens_s"] = together * values["length"] / seconds
            if gb is not None:
                values["memory_gib"] = gb * GB
            found.append(Row(source, **values))
    return tuple(found)


def not_covered(row: Row, figure: str) -> str | None:
    """Return why the plan does not claim to predict a row's memory or speed; None if it does."""
    if not row.measured:
        return "a rule of thumb, not measured"
    if row.precision != "bf16":
        return f"computed in {row.precision}, lorasweep in bf16"
    if row.sharding == "other":
        return "split by more than data, lorasweep by data alone"
    if row.sharding == "deepspeed":
        return "DeepSpeed's own states and buffers"
    if row.offload:
        return "states on the host"
    if row.checkpointing not in ("none", "full"):
        return "selective checkpointing" if row.checkpointing else "checkpointing not stated"
    if row.ambiguous:
        return "two figures for the settings stated"
    if row.length is None or row.rows is None:
        return "tokens a forward pass vary or are not stated"
    if figure == "memory":
        if row.states == "8bit":
            return "moments of 8 bits"
        return "FSDP1 keeps gradients of frozen weights" if row.sharding == "fsdp1" else None
    if row.card not in CARDS:
        return f"card {row.card} without a data sheet in the catalogue"
    if row.length * row.rows < FEWEST_TOKENS:
        return f"fewer than {FEWEST_TOKENS:,} tokens a forward pass"
    return None


# ---------------------------------------------------------------- predictions


@cache
def model_of(name: str) -> ModelSpec:
    """Return the shape of a model of published.yaml or of conf/model."""
    shapes = _table()["models"]
    if name not in shapes:
        return build(ModelSpec, yaml.safe_load((conf_dir() / f"model/{name}.yaml").read_text()))
    hidden, layers, heads, kv_heads, head, mlp, vocabulary, tied, gated = shapes[name]
    return ModelSpec(
        name=name,
        hidden_size=hidden,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_size=head,
        mlp_size=mlp,
        vocab_size=vocabulary,
        tied=tied,
        mlp=("gate_proj", "up_proj", "down_proj") if gated else ("up_proj", "down_proj"),
    )


@cache
def card(name: str) -> Hardware:
    """Return a card of CARDS."""
    path = conf_dir() / f"hardware/{name.removesuffix('-40')}.yaml"
    found = from_plain(yaml.safe_load(path.read_text()))
    if name == "a100-40":  # the same chip with 40 GB, by its data sheet
        found = dataclasses.replace(found, gpu_memory_gib=40.0, bandwidth_bytes_s=1.555e12)
    return found


def load_of_row(row: Row) -> Load:
    """Return the weights, and operations per token, of a row's training."""
    model = model_of(row.model)
    if row.method == "fullft":
        return load_of(model, FullFT())
    if not row.modules:
        return load_of(model, LoRA(rank=row.rank, layers=row.layers))
    few = dataclasses.replace(model, attention=row.modules)
    load = load_of(few, LoRA(rank=row.rank, layers="attention"))
    flops = 4.0 * model.n_active_params + 6.0 * load.trained
    return dataclasses.replace(load, model=model, flops=flops)


def memory_of(row: Row) -> float:
    """Predict the peak memory of one GPU in GiB."""
    parts = memory_parts(
        load_of_row(row),
        Layout(row.gpus or 1, row.rows or 1, row.checkpointing == "full"),
        row.length or 0,
        states=row.states,
        stream=STREAM,
        whole_logits=row.loss == "whole",
    )
    return (sum(parts.values()) - parts["process"] * row.allocator) / 2**30


@cache
def _parts(row: Row) -> dict[str, float]:
    """Return the seconds of a row's step by part, with matrix products at the attainable speed."""
    assert row.length is not None and row.card is not None
    return step_parts(
        load_of_row(row),
        Layout(row.gpus or 1, row.rows or 1, row.checkpointing == "full"),
        row.length,
        card(row.card),
        states=row.states,
        stream=STREAM,
        share=1.0,
    )


@cache
def fitted_share(without: str | None = None) -> float:
    """Fit the share of the attainable speed that products reach: the median of sources' medians.

    `without`: a source to leave out. With all sources, the result is the plan's TRAINING_SHARE.
    """
    by_source: dict[str, list[float]] = {}
    for row in rows():
        if row.tokens_s is None or row.source == without or not_covered(row, "speed"):
            continue
        parts = _parts(row)
        rest = sum(s for name, s in parts.items() if name not in ("products", "launch"))
        seconds = (row.rows or 0) * (row.length or 0) / row.tokens_s
        by_source.setdefault(row.source, []).append(parts["products"] / (seconds - rest))
    return statistics.median(statistics.median(shares) for shares in by_source.values())


TOLERANCE = {"memory": 0.15, "speed": 0.25}


@cache
def comparisons() -> pd.DataFrame:
    """Compare all published figures; for each, the share is fitted to the other sources.

    Columns: row, figure, published, predicted (NaN if not covered), error (relative), within (the
    tolerance of the figure), not_covered (why).
    """
    found = []
    for row in rows():
        for figure, value in (("memory", row.memory_gib), ("speed", row.tokens_s)):
            if value is None:
                continue
            why, predicted = not_covered(row, figure), float("nan")
            if why is None and figure == "memory":
                predicted = memory_of(row)
            elif why is None:
                parts, share = _parts(row), fitted_share(without=row.source)
                seconds = step_seconds({**parts, "products": parts["products"] / share})
                predicted = (row.rows or 0) * (row.length or 0) / seconds
            error = predicted / value - 1
            within = abs(error) <= TOLERANCE[figure]
            found.append((row, row.source, figure, value, predicted, error, within, why))
    names = "row source figure published predicted error within not_covered"
    return pd.DataFrame(found, columns=names.split())


# ---------------------------------------------------------------- the page

UNITS = {"memory": "GiB a GPU", "speed": "tokens a second and GPU"}
COLUMNS = ("source", "model", "method", "card", "gpus", "length", "rows", "checkpointing")


def covered(figure: str) -> pd.DataFrame:
    """Return the comparisons of a figure that the plan covers."""
    every = comparisons()
    return every[(every["figure"] == figure) & every["predicted"].notna()]


def nine_in_ten(figure: str) -> float:
    """Return the error that nine in ten covered rows stay below."""
    errors = sorted(covered(figure)["error"].abs())
    return errors[min(len(errors) - 1, round(0.9 * len(errors)))]


def table() -> str:
    """Return all rows as CSV: settings, published, predicted, error, why not covered."""

    def cell(value: float, digits: str) -> str | None:
        return None if value != value else format(value, digits)

    rows = [
        {
            **{name: getattr(c.row, name) for name in COLUMNS},
            "figure": c.figure,
            "published": f"{c.published:.4g}",
            "predicted": cell(c.predicted, ".4g"),
            "error": cell(c.error, ".3f"),
            "not_covered": c.not_covered,
        }
        for c in comparisons().itertuples()
    ]
    return pd.DataFrame(rows, dtype=object).to_csv(index=False)


def page() -> str:
    """Return the page in Markdown."""
    reasons = comparisons().dropna(subset="not_covered")
    counts = reasons.groupby(["not_covered", "figure"], sort=False).size()
    return render(
        "published",
        share=TRAINING_SHARE,
        units=UNITS,
        summaries={figure: _summary(figure) for figure in TOLERANCE},
        all_rows={figure: _rows(figure) for figure in TOLERANCE},
        not_covered=[
            ["why", "figure", "rows"],
            *([*names, str(n)] for names, n in counts.items()),
        ],
        sources=_table()["sources"],
    )


def _summary(figure: str) -> tuple[str, Rows]:
    found, limit = covered(figure), f"{TOLERANCE[figure]:.0%}"
    rows = [["source", "rows", f"within {limit}", "median", "smallest", "largest"]]
    for source, own in found.groupby("source", sort=False):
        errors = own["error"]
        ends = (f"{v:+.0%}" for v in (errors.median(), errors.min(), errors.max()))
        rows.append([str(source), str(len(own)), str(own["within"].sum()), *ends])
    within, median = found["within"].sum(), found["error"].abs().median()
    text = (
        f"{within} of {len(found)} covered rows ({within / len(found):.0%}) of {len(rows) - 1} "
        f"sources are within {limit}; median error {median:.0%}, nine in ten within "
        f"{nine_in_ten(figure):.0%}."
    )
    return text, rows


def _rows(figure: str) -> Rows:
    rows = [["source", "run", "published", "plan", "error"]]
    for c in covered(figure).itertuples():
        r = c.row
        run = f"{r.model}, {r.method}, {r.gpus} x {r.card}, {r.rows} x {r.length:,} tokens"
        error = f"{c.error:+.0%}{'' if c.within else ' **fails**'}"
        values = [f"{c.published:,.4g}", f"{c.predicted:,.4g}", error]
        rows.append([r.source, f"{run}, checkpointing {r.checkpointing}", *values])
    return rows


def main(arguments: Sequence[str] = ()) -> None:
    """Write the page and the table."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "README.md").write_text(page())
    (FOLDER / "table.csv").write_text(table())

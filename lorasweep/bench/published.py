"""The plan's memory and speed against what others measured and published (published.yaml).

Which rows the plan covers is decided by their settings alone (`not_covered`).
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

TABLE = Path(__file__).with_name("published.yaml")
CARDS = ("a100", "a100-40", "h100", "h200")
"""Cards whose peak, bandwidths and power are those of NVIDIA's data sheets."""
FEWEST_TOKENS = 2048
"""Tokens a forward pass and GPU from which on the speed is that of the card; fewer wait for the
processor, whose speed no source states."""
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
    """Tokens a row."""
    rows: int | None
    """Rows a forward pass and GPU."""
    rank: int = 0
    layers: str = "attention+mlp"
    modules: list[str] = field(default_factory=list)
    """Adapted matrices, if they are no layer set."""
    memory_gib: float | None = None
    tokens_s: float | None = None
    offload: bool = False
    ambiguous: bool = False
    """Another row of the source states the same settings and another figure."""
    measured: bool = True


@cache
def rows() -> tuple[Row, ...]:
    """Read all rows, memory in GiB and speed in tokens a second and GPU."""
    found = []
    for source, entry in yaml.safe_load(TABLE.read_text())["sources"].items():
        for row in entry["rows"]:
            own = row if isinstance(row, dict) else dict(zip(entry["columns"], row, strict=True))
            found.append(_row(source, {**entry["settings"], **own}))
    return tuple(found)


def _row(source: str, values: dict[str, Any]) -> Row:
    together = values.pop("rows_an_iteration", None)
    seconds, gb = values.pop("iteration_s", None), values.pop("gb", None)
    if seconds is not None:
        values["tokens_s"] = together * values["length"] / seconds
    if gb is not None:
        values["memory_gib"] = gb * GB
    return Row(source, **values)


def not_covered(row: Row, figure: str) -> str | None:
    """Return why the plan does not claim to predict a `figure` of a row; None if it does.

    `figure`: memory or speed. Decided by settings, before any prediction was made.
    """
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

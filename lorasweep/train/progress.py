"""How far a run of a pack has come: its learning curve, tokens and step times."""

import math
from dataclasses import dataclass, field
from typing import Any

from lorasweep.spec.model import ModelSpec
from lorasweep.train.events import Record


def eval_steps(steps: int) -> list[int]:
    """List the log-spaced steps at which held-out measures are taken: 1, 2, 3, 4, 6, 8, 12, ...
    and the last.

    The list of a long run begins with that of a short one, so a constant-rate run holds all its
    prefixes.
    """
    powers = [2**k for k in range(steps.bit_length() + 1)]
    return sorted({s for s in (*powers, *(3 * p // 2 for p in powers[1:])) if s < steps} | {steps})


@dataclass
class Progress:
    """What the loop keeps of one run between updates."""

    curve: list[Record]
    """The learning curve: one point for each evaluation, the first before training."""
    tokens: int = 0
    step_s: list[float] = field(default_factory=list)
    """Seconds of each update of this attempt: the pack's, divided by its members."""

    @classmethod
    def start(cls, metric: str, value: float) -> "Progress":
        """Begin with the measure before training."""
        return cls([{"step": 0, "examples": 0, "tokens": 0, metric: value}])

    def load(self, meta: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.curve, self.tokens = list(meta["curve"]), meta["tokens"]

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {"curve": self.curve, "tokens": self.tokens}

    def add(self, n_tokens: int, seconds: float) -> None:
        """Count an update."""
        self.tokens += n_tokens
        self.step_s.append(seconds)

    def point(self, record: Record, measures: tuple[str, ...]) -> None:
        """Add an evaluation to the learning curve."""
        names = ("step", "examples", "tokens", *measures)
        self.curve.append({name: record[name] for name in names})

    def median_step_s(self) -> float:
        """Return the median of the updates' seconds."""
        return sorted(self.step_s)[len(self.step_s) // 2]


def gradient_shares(squares: dict[str, float], model: ModelSpec) -> dict[str, float]:
    """Return the share of the squared gradient by layer set; embedding and norms are 'rest'.

    squares: parameter name -> its squared gradient norm. NaN where all are zero.
    """
    total = sum(squares.values())
    found: dict[str, float] = {}
    for name, value in squares.items():
        layer_set = model.set_of(name)
        share = value / total if total > 0 else math.nan
        found[layer_set] = found.get(layer_set, 0.0) + share
    return found

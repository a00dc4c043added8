"""Keep the progress of a run: its learning curve, tokens and step times."""

import math
from dataclasses import astuple, dataclass, field
from typing import Any

from lorasweep.spec.evaluations import EARLY_STOPPING_RULE, Best
from lorasweep.spec.model import ModelSpec
from lorasweep.train.events import Record


@dataclass
class Progress:
    """What the loop keeps for one run between updates."""

    curve: list[Record]
    """The learning curve: one point per evaluation, the first before training."""
    tokens: int = 0
    step_s: list[float] = field(default_factory=list)
    """Seconds of each update in this attempt: the time of the pack divided by its members."""
    expert_tokens: list[list[int]] = field(default_factory=list)
    """Training tokens of each expert, by layer; empty without experts."""
    best: Best = field(default_factory=Best)
    """Of a run that may end early."""

    @classmethod
    def start(cls, measures: Record) -> "Progress":
        """Start with the measures before training."""
        return cls([{"step": 0, "examples": 0, "tokens": 0, **measures}])

    def load(self, meta: dict[str, Any]) -> None:
        """Restore the values of a checkpoint."""
        self.curve, self.tokens = list(meta["curve"]), meta["tokens"]
        self.expert_tokens = meta.get("expert_tokens", [])
        self.best = Best(*meta.get("best", ())[:2])  # an older one has a third value

    def state(self) -> dict[str, Any]:
        """Return the values for a checkpoint."""
        best = {"best": astuple(self.best)} if self.best.step else {}
        return {"curve": self.curve, "tokens": self.tokens, **best, **self.of_experts()}

    def of_experts(self) -> dict[str, list[list[int]]]:
        """Return the tokens of each expert for a result; nothing without experts."""
        return {"expert_tokens": self.expert_tokens} if self.expert_tokens else {}

    def of_best(self) -> dict[str, int]:
        """Return what a result says of early stopping: the update whose weights are left behind."""
        if not self.best.step:
            return {}
        return {"best_step": self.best.step, "early_stopping_rule": EARLY_STOPPING_RULE}

    def add(self, n_tokens: int, seconds: float, of_experts: list[list[int]]) -> None:
        """Count an update; `of_experts`: its tokens by layer and expert."""
        self.tokens += n_tokens
        self.step_s.append(seconds)
        before = self.expert_tokens or [[0] * len(layer) for layer in of_experts]
        self.expert_tokens = [
            [a + b for a, b in zip(*layers)] for layers in zip(before, of_experts)
        ]

    def point(self, record: Record, measures: tuple[str, ...]) -> None:
        """Add an evaluation to the learning curve."""
        names = ("step", "examples", "tokens", *measures)
        self.curve.append({name: record[name] for name in names})

    def median_step_s(self) -> float:
        """Return the median seconds of an update."""
        return sorted(self.step_s)[len(self.step_s) // 2]


def gradient_shares(squares: dict[str, float], model: ModelSpec) -> dict[str, float]:
    """Return each layer set's share of the squared gradient; embedding and norms are 'rest'.

    `squares`: parameter name -> its squared gradient norm. The shares are NaN if all are zero.
    """
    total = sum(squares.values())
    found: dict[str, float] = {}
    for name, value in squares.items():
        layer_set = model.set_of(name)
        share = value / total if total > 0 else math.nan
        found[layer_set] = found.get(layer_set, 0.0) + share
    return found

"""The metric that runs are compared by, when held-out rows are evaluated, and early stopping."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A held-out metric. `name` is also its key in the result."""

    name: str = "test_nll"
    higher_is_better: bool = False
    label: str = "test NLL"
    """Name shown in tables and figures."""

    @property
    def on_part(self) -> str:
        """Key of the metric's final value on the rows that were also evaluated before the end."""
        return f"{self.name}_curve"

    def value(self, result: Mapping[str, Any]) -> float | None:
        """Return the metric's value in a result; None if it is missing, as for a diverged run."""
        return result.get(self.name)

    def on_first(self, measures: Mapping[str, Any]) -> float:
        """Return the metric of an evaluation on the rows of all evaluations before the end."""
        return measures[self.on_part if self.on_part in measures else self.name]

    def loss(self, value: float) -> float:
        """Return the value with its sign chosen so that lower is better."""
        return -value if self.higher_is_better else value

    def stored(self) -> dict[str, Any]:
        """Return the entry that records this metric in a result; empty for the default metric."""
        return {} if self == Metric() else {"metric": asdict(self)}


CURVE_START = "nll_start_curve"
"""Key in a result: the base's NLL on the rows of evaluations before the end: validation rows, or
the first test rows. Results of earlier versions lack it, unless they are of trials."""
METRICS = {
    "sft": Metric(),
    "policy_gradient": Metric("test_reward", higher_is_better=True, label="held-out reward"),
}
"""The metric of each objective, known before any run."""


def metric_of(result: Mapping[str, Any]) -> Metric:
    """Return the metric that a result records; test_nll if it records none."""
    return Metric(**result["metric"]) if "metric" in result else Metric()


# ---------------------------------------------------------------- evaluations

FEWEST_ROWS = 4
"""Fewest validation rows for early stopping. Every customer has at least these. A convention."""
EARLY_STOPPING_RULE = 2
"""Version of the early stopping rule, stored in results. Results without a version used rule 1: all
evaluations count."""
HEAD = 10
"""Evaluations in the first 1 / HEAD of a run's updates do not count against the run. They are an
update or two apart, and at a high learning rate the loss rises before it falls. A convention."""


def eval_steps(steps: int, curve: bool = True) -> list[int]:
    """List the steps with an evaluation: 1, 2, 3, 4, 6, 8, 12, ..., last; without curve, the last.

    Except for its last step, the list of a shorter run begins the list of a longer run. So a run at
    a constant learning rate also contains the results of all shorter runs.
    """
    if not curve:
        return [steps]
    powers = [2**k for k in range(steps.bit_length() + 1)]
    return sorted({s for s in (*powers, *(3 * p // 2 for p in powers[1:])) if s < steps} | {steps})


def why_not_early(patience: int, steps: int, rows: int) -> str:
    """Return why a run of `steps` updates with `rows` validation rows cannot end early, or ''.

    `patience`: evaluations in a row without a better loss, after which a run ends.
    """
    if rows < FEWEST_ROWS:
        return f"{rows} validation rows, and {FEWEST_ROWS} are the fewest"
    counted = no_better(1, eval_steps(steps), steps)
    if counted <= patience:
        return f"only {counted} evaluations of {steps} updates count (none before {steps}/{HEAD})"
    return ""


def no_better(best: int, evaluated: Iterable[int], steps: int) -> int:
    """Count the evaluations after update `best` that count against a run of `steps` updates.

    `evaluated`: the updates of all evaluations so far.
    """
    return sum(step > best and HEAD * step >= steps for step in evaluated)


@dataclass
class Best:
    """The best evaluation of a run that may end early."""

    loss: float = math.inf
    """The metric as a loss: lower is better."""
    step: int = 0
    """Update of that evaluation; 0 before the first one."""

    def note(self, step: int, loss: float) -> None:
        """Record an evaluation. Of equal losses the first counts as the best."""
        if loss < self.loss:
            self.loss, self.step = loss, step

"""The schedule of evaluations on held-out rows, and the rule of early stopping."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

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

"""When a run is evaluated on held-out rows, and the rule of early stopping."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

FEWEST_ROWS = 4
"""Fewest validation rows of early stopping: as many as a customer has at least. A convention."""
EARLY_STOPPING_RULE = 2
"""Version of the rule, kept in results. Results without one used rule 1: all evaluations count."""
HEAD = 10
"""Evaluations count against a run after 1 / HEAD of its updates: the first are an update or two
apart, and at a high learning rate the loss first rises before it falls. A convention."""


def eval_steps(steps: int, curve: bool = True) -> list[int]:
    """List the steps with an evaluation: 1, 2, 3, 4, 6, 8, 12, ..., last; without curve the last.

    But for its last step, a shorter run has the first entries of a longer one. So a run at a
    constant learning rate also contains the results of all shorter runs.
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
    measured = eval_steps(steps)
    counted = no_better(measured[0], measured, steps)
    if counted <= patience:
        return (
            f"of the {len(measured)} evaluations of {steps} updates at most {counted} count "
            f"against a run (not the first, and none before {steps}/{HEAD} updates), and the last "
            "of them ends it anyway"
        )
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
    """The metric, with lower values better."""
    step: int = 0
    """0: no evaluation yet."""

    def note(self, step: int, loss: float) -> None:
        """Record an evaluation. Of equal losses the first counts as the best."""
        if loss < self.loss:
            self.loss, self.step = loss, step

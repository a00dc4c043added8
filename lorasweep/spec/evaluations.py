"""When a run is evaluated on held-out rows, and the rule of early stopping."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

FEWEST_ROWS = 4
"""Fewest validation rows of early stopping: as many as a customer has at least. A convention."""

EARLY_STOPPING_RULE = 2
"""Version of the rule of early stopping, which results record. Results without one were judged by
rule 1, which counted every evaluation."""
HEAD = 10
"""Patience begins after a tenth (1 / HEAD) of the updates of a run. Evaluations are log-spaced, so
the first ones are an update or two apart, and at a high learning rate the loss rises in the first
updates before it falls. A convention."""


def eval_steps(steps: int, curve: bool = True) -> list[int]:
    """List the steps with a held-out evaluation, log-spaced: 1, 2, 3, 4, 6, 8, 12, ..., last.

    Without a learning curve only the last.

    Except for the last step, a shorter run has the first entries of a longer one. So a run at a
    constant learning rate also contains the results of all shorter runs.
    """
    if not curve:
        return [steps]
    powers = [2**k for k in range(steps.bit_length() + 1)]
    return sorted({s for s in (*powers, *(3 * p // 2 for p in powers[1:])) if s < steps} | {steps})


def why_not_early(patience: int, steps: int, rows: int) -> str:
    """Return why a run cannot end early; empty if it can.

    Args:
        patience: evaluations in a row that are no better than the best one before.
        rows: validation rows.
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
    """Count the evaluations since the best one, without those in the first updates of a run.

    Args:
        best: update of the best evaluation.
        evaluated: updates of all evaluations so far.
        steps: updates of the run.
    """
    return sum(step > best and HEAD * step >= steps for step in evaluated)


@dataclass
class Best:
    """The best evaluation of a run that may end early."""

    loss: float = math.inf
    """The metric, lower being better."""
    step: int = 0
    """0: there was none yet."""

    def note(self, step: int, loss: float) -> None:
        """Record an evaluation. Of equal losses the first is the best."""
        if loss < self.loss:
            self.loss, self.step = loss, step

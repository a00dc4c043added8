"""When a run is measured on held-out rows, and what it takes to end early by it.

Standard library only.
"""

import math
from dataclasses import dataclass

FEWEST_ROWS = 4
"""Held-out rows below which no run is ended by their loss: as many as a customer's part has at
least (fleet/rows.py). A convention."""


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
    """Say why a run cannot end early; empty if it can.

    `patience`: evaluations in a row that are no better than the best one before. `rows`: held-out
    rows that choose between runs.
    """
    if rows < FEWEST_ROWS:
        return f"{rows} held-out rows choose between runs, and {FEWEST_ROWS} are the fewest"
    measured = eval_steps(steps)
    if len(measured) <= patience + 1:
        return (
            f"{steps} updates have {len(measured)} evaluations, of which the last ends the run "
            "anyway"
        )
    return ""


@dataclass
class Best:
    """The best evaluation of a run that may end early."""

    loss: float = math.inf
    """The metric, lower being better."""
    step: int = 0
    """0: there was none yet."""
    worse: int = 0
    """Evaluations since."""

    def note(self, step: int, loss: float) -> None:
        """Take up an evaluation. Of equal ones the first is the best."""
        if loss < self.loss:
            self.loss, self.step, self.worse = loss, step, 0
        else:
            self.worse += 1

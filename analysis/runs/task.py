"""Check that a task leaves room for two methods to differ.

This needs the task's floor: the NLL of the generator that wrote the data, which no model can beat.
"""

import math
from collections.abc import Sequence

from analysis.runs.lr_curves import LrCurve

MIN_GAIN = 0.3
"""The untrained model's NLL must lie at least this far above the floor, in nats."""
MIN_REST = 0.2
"""The best run must leave at least this share of that distance: a solved task does not separate
learning rates."""


def task_problems(curves: Sequence[LrCurve], best: Sequence[float | None]) -> list[str]:
    """List the reasons why the task cannot separate methods; empty if its floor is unknown.

    Args:
        curves: of one task.
        best: each curve's lowest NLL in nats.
    """
    start, floor = curves[0].nll_start, curves[0].floor
    lowest = min((b for b in best if b is not None), default=math.nan)
    if not (math.isfinite(start) and math.isfinite(floor) and math.isfinite(lowest)):
        return []
    found = []
    if start - floor < MIN_GAIN:
        found.append(f"the base starts {start - floor:.2f} nats above the floor, {MIN_GAIN} needed")
    elif (lowest - floor) / (start - floor) < MIN_REST:
        found.append("nearly solved, less than a fifth of the starting excess is left")
    return found

"""Whether a task leaves room for two methods to differ, where its floor is known.

A floor is the NLL of the generator that wrote the data: no model gets below it.
"""

import math
from collections.abc import Sequence

from analysis.runs.lr_curves import LrCurve

MIN_GAIN = 0.3
"""Least distance in nats of the untrained model's NLL above the floor."""
MIN_REST = 0.2
"""Least share of that distance that the best run must leave: a solved task does not separate
learning rates."""


def task_problems(curves: Sequence[LrCurve], best: Sequence[float | None]) -> list[str]:
    """List why the task is unfit for a comparison; empty where its floor is unknown.

    Args:
        best: each curve's lowest NLL in nats.
    """
    start, floor = curves[0].nll_start, curves[0].floor
    lowest = min((b for b in best if b is not None), default=math.nan)
    if not (math.isfinite(start) and math.isfinite(floor) and math.isfinite(lowest)):
        return []
    found = []
    if start - floor < MIN_GAIN:
        found.append(
            f"task: the base starts {start - floor:.2f} nats above the floor, {MIN_GAIN} needed"
        )
    elif (lowest - floor) / (start - floor) < MIN_REST:
        found.append("task: nearly solved, less than a fifth of the starting excess is left")
    return found

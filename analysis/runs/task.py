"""Check that a task leaves room for two methods to differ in speed.

What is left to learn needs the task's floor: the NLL of the generator that wrote the data, which no
model can beat.
"""

import math

MIN_GAIN = 20.0
"""Full fine-tuning must gain at least so many standard deviations of the difference of two runs."""
MIN_REST = 0.2
"""The best run must leave at least this share of the starting excess over the floor: a solved task
does not separate learning rates."""


def gain_in_noise(start: float, lowest: float, noise: float) -> float:
    """Return the gain, in standard deviations of the difference of two runs of one seed.

    Args:
        start: loss before training, lowest: at the best rate; in nats.
        noise: standard deviation of one run, in nats.
    """
    return (start - lowest) / (math.sqrt(2) * noise) if noise > 0 else math.nan


def task_problems(start: float, floor: float, lowest: float, noise: float) -> list[str]:
    """List the reasons why the task cannot separate methods; NaN values are not checked.

    Args:
        start: full fine-tuning's loss before training, floor: the least possible one, lowest: the
            lowest of all curves; in nats.
        noise: standard deviation of one run, in nats.
    """
    found = []
    if (gain := gain_in_noise(start, lowest, noise)) < MIN_GAIN:
        found.append(
            f"the gain is {gain:.3g} standard deviations of the difference between two runs, "
            f"{MIN_GAIN:g} needed"
        )
    elif (lowest - floor) / (start - floor) < MIN_REST:
        found.append("nearly solved, less than a fifth of the starting excess is left")
    return found

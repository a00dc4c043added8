"""Compute the picture of all customers' gains, which templates/gains.html draws as SVG."""

import math
from collections.abc import Sequence
from typing import Any

from lorasweep.fleet.outcome import GAINED, UNKNOWN, WORSE, Outcome

WIDTH, LEFT, RIGHT, TOP = 900, 190, 24, 46
"""Sizes in pixels: of the picture, and of its margins."""
TALLEST, LOWEST, HEIGHT = 22, 7, 600
"""Height of a customer's row in pixels: at most, at least, and of all rows if both allow it."""
NAME = 12
"""Height of a name in pixels. If rows are lower, some names are left out."""
LONGEST = 26
"""Characters of a name in the picture."""
KINDS = {GAINED: "gained", WORSE: "worse", UNKNOWN: "unknown"}
"""Verdict -> class of a mark, which has a colour and a shape."""


def picture_of(found: Sequence[Outcome]) -> dict[str, Any] | None:
    """Return the marks, axis and sizes of the picture in pixels; None: no gain was measured.

    The largest gain is on top. The axis contains 0 and all gains. It ends where the intervals end,
    or beyond the gains by their range, so that one wide interval does not hide the others.
    """
    shown = [(o.gain, k, o) for k, o in enumerate(found) if o.gain is not None]
    if not shown:
        return None
    shown.sort(key=lambda s: (-s[0], s[1]))
    gains = [0.0, *(gain for gain, _, _ in shown)]
    ends = [end for _, _, o in shown for end in o.interval or ()]
    spread = max(gains) - min(gains) or math.inf
    low = max(min(gains + ends), min(gains) - spread)
    high = min(max(gains + ends), max(gains) + spread)
    pad = 0.03 * (high - low) or 1.0
    low, high = low - pad, high + pad
    height = min(TALLEST, max(LOWEST, HEIGHT / len(shown)))

    def x(gain: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (min(max(gain, low), high) - low) / (high - low)

    marks = []
    for row, (gain, k, o) in enumerate(shown):
        name, said = o.member.name or "?", f"{gain:+.3g} nats per token, {o.verdict}"
        line, arrows = [], []
        if o.interval is not None:
            said += ", 95% interval {:+.3g} to {:+.3g}".format(*o.interval)
            line, beyond = [*map(x, o.interval)], (o.interval[0] < low, o.interval[1] > high)
            arrows = [(end, way) for end, way, cut in zip(line, (-1, 1), beyond) if cut]
        short = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
        mark = {
            "k": k,
            "kind": KINDS[o.verdict],
            "x": x(gain),
            "y": TOP + height * (row + 0.5),
            "line": line,
            "arrows": arrows,
            "name": short if row % math.ceil(NAME / height) == 0 else "",
            "said": f"{name}: {said}",
        }
        marks.append(mark)
    verdicts = [o.verdict for _, _, o in shown]
    return {
        "marks": marks,
        "ticks": [(x(tick), f"{tick:+g}" if tick else "0") for tick in _ticks(low, high)],
        "zero": x(0.0),
        "radius": min(5.0, height / 2),
        "width": WIDTH,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "top": TOP,
        "bottom": TOP + height * len(shown),
        "legend": [(KINDS[v], v, verdicts.count(v)) for v in KINDS],
        "missing": len(found) - len(shown),
    }


def _ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Return at most `most` multiples of 1, 2 or 5 times a power of ten between two numbers."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(m * power for m in (1, 2, 5, 10, 20) if (high - low) / (m * power) <= most - 1)
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]

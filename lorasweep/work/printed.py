"""What an action returns, and the one place that prints it; messages and progress on stderr."""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorasweep.advise.pages import printable
from lorasweep.plan.needs import run_flops
from lorasweep.store.files import Notify
from lorasweep.sweep.grid import Point, run_names
from lorasweep.sweep.request import Request

HEADERS = {
    "gpus_a_run": "GPUs per run",
    "micro_batch": "rows per pass",
    "memory_gib": "GiB per GPU",
    "tokens_s": "tokens/s per GPU",
    "gpu_hours": "GPU-hours",
    "cost_usd": "dollars",
    "n_trainable": "parameters trained",
}
"""Headers of columns whose keys are no words; of the others the key is the header."""
SAID_S = 30.0
"""Seconds after which progress is printed, if no run ends."""


@dataclass(frozen=True)
class Answer:
    """What an action returns: for programs a value, for people text, and the exit status.

    What happens before the answer is known, such as progress and warnings, goes to stderr
    (`notifier`).
    """

    value: Any = None
    """What format=json prints, made of JSON values. None: the text, as {"output": LINES}."""
    text: str | Sequence[str] = ""
    """Text or lines."""
    status: int = 0
    """Exit status: 0 done, 1 something failed, 130 stopped."""

    def as_text(self) -> str:
        """Return the text that people read."""
        return self.text if isinstance(self.text, str) else "\n".join(self.text)

    def plain(self) -> Any:
        """Return the value that programs read."""
        return {"output": self.as_text().splitlines()} if self.value is None else self.value

    def show(self, as_json: bool) -> None:
        """Print the answer on stdout; an empty text prints no line."""
        if shown := json.dumps(self.plain()) if as_json else self.as_text():
            print(shown, flush=True)


def duration(seconds: float) -> str:
    """Format a time span for people: 40 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def time_left(
    work: Mapping[str, float], before: Mapping[str, float], now: Mapping[str, float], seconds: float
) -> float:
    """Return the seconds that runs still need at their speed over `seconds`; NaN without progress.

    By run: `work`, its operations; `before`, `now`: the share done then and now (no key: none).
    """
    left = sum(w * (1 - now.get(i, 0.0)) for i, w in work.items())
    done = sum(w * (now.get(i, 0.0) - before.get(i, 0.0)) for i, w in work.items())
    return seconds * left / done if done > 0 else math.nan if left else 0.0


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_cell, dict.fromkeys(value))) or "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"
    return (
        "-" if value is None else f"{value:,}" if isinstance(value, int) else printable(str(value))
    )


def table(rows: Sequence[Mapping[str, Any]], *keys: str) -> list[str]:
    """Return rows of JSON values as an aligned table, in lines; none without rows.

    `keys`: the columns. A missing value is "-", and a list of two ends "1 to 16".
    """
    columns = []
    for key in keys if rows else ():
        cells = [HEADERS.get(key, key.replace("_", " ")), *(_cell(row.get(key)) for row in rows)]
        pad = str.ljust if any(isinstance(row.get(key), str) for row in rows) else str.rjust
        columns.append([pad(cell, max(map(len, cells))) for cell in cells])
    return ["  ".join(line).rstrip() for line in zip(*columns)]


def notifier(request: Request, always: bool = False) -> Notify:
    """Return a function that prints a message on stderr; format=json: only with `always`."""
    if request.format == "json" and not always:
        return lambda text: None
    return lambda text: print(text, file=sys.stderr, flush=True)


class Display:
    """Prints a line for each ended run, and every SAID_S how much is done, with the time left."""

    def __init__(self, todo: list[Point], request: Request) -> None:
        self._points, self._names = {p.id: p for p in todo}, run_names(todo)
        self._work = {p.id: run_flops(p.spec) for p in todo}
        self._share = dict.fromkeys(self._work, 0.0)
        self._first: dict[str, float] = {}  # steps before this session do not count for the speed
        self._ended, self._print = 0, notifier(request)
        self._started = self._said = time.monotonic()

    def event(self, event: dict[str, Any]) -> None:
        """Show an event of a worker."""
        if "note" in event:
            self._print(event["note"])
        for rid in self._points.keys() & event.get("runs", []):
            self._share[rid] = event["step"] / self._points[rid].spec.steps
            self._first.setdefault(rid, self._share[rid])
        rid, now = event.get("run", ""), time.monotonic()
        ended = event.get("ended", "") if rid in self._points else ""
        if ended:
            self._first.setdefault(rid, 0.0)
            self._share[rid], self._ended = 1.0, self._ended + 1
        elif now - self._said < SAID_S:
            return
        self._said, total = now, sum(self._work.values()) or 1.0
        left_s = time_left(self._work, self._first, self._share, now - self._started)
        left = "?" if math.isnan(left_s) else duration(left_s)
        text = f"{sum(self._work[i] * share for i, share in self._share.items()) / total:.0%} done"
        if ended:
            text = f"{self._names[rid]:32} {rid}  {ended:8}"
            if event.get("value") is not None:
                text += f"  {event['measure']} {event['value']:.4f}"
            text += f"  {event['cause']}" if ended == "failed" else f"  {duration(event['wall_s'])}"
        self._print(f"[{self._ended:>3}/{len(self._points)}] {text}  ({left} left)")

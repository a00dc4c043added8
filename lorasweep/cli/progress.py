"""Show messages and progress in the terminal. No program parses this output."""

import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

from lorasweep.plan.load import run_flops
from lorasweep.store.files import Notify
from lorasweep.sweep.grid import Point
from lorasweep.sweep.names import run_names
from lorasweep.sweep.request import Request


def duration(seconds: float) -> str:
    """Format a time span for people: 40 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def notifier(request: Request, always: bool = False) -> Notify:
    """Return a function that prints a message on stderr; format=json: only with `always`."""
    if request.format == "json" and not always:
        return lambda text: None
    return lambda text: print(text, file=sys.stderr, flush=True)


class Display:
    """A line for each ended run; in a terminal also a progress bar, with the time left.

    The bar is in floating-point operations.
    """

    def __init__(self, todo: list[Point], request: Request) -> None:
        self._points = {p.id: p for p in todo}
        self._names = run_names(todo)
        self._work = {p.id: run_flops(p.spec) for p in todo}
        self._total = sum(self._work.values()) or 1.0
        self._share = dict.fromkeys(self._work, 0.0)
        self._first: dict[str, float] = {}
        self._ended = 0
        self._started = time.monotonic()
        self._print: Callable[[str], Any] = notifier(request)
        self._bar: Any = None
        terminal = request.format != "json" and sys.stderr.isatty()
        if terminal and find_spec("rich") is None:
            self._print("no progress bar: rich is not installed (pip install rich)")
        elif terminal:
            self._add_bar(f"0/{len(todo)} runs")

    def _add_bar(self, description: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._print = partial(console.print, markup=False)  # above the bar
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task(description, total=1.0, left="")

    def __enter__(self) -> "Display":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def event(self, event: dict[str, Any]) -> None:
        """Show an event of a worker."""
        if "note" in event:
            self._print(event["note"])
        for rid in event.get("runs", []):
            if rid in self._points:
                done = event["step"] / self._points[rid].spec.steps
                # steps before this session do not count for the speed
                self._first.setdefault(rid, done)
                self._share[rid] = done
        if "ended" in event and event["run"] in self._points:
            rid = event["run"]
            self._first.setdefault(rid, 0.0)
            self._share[rid] = 1.0
            self._ended += 1
            head = f"[{self._ended:>3}/{len(self._points)}] {self._names[rid]:32} {rid}"
            if event["ended"] == "failed":
                self._print(f"{head}  FAILED: {event['cause']}")
            else:
                value, spent = event.get("value"), duration(event["wall_s"])
                measure = "" if value is None else f"  {event['measure']} {value:.4f}"
                self._print(f"{head}  {event['ended']:8}{measure}  {spent}  ({self._left()})")
        if self._bar:
            runs = f"{self._ended}/{len(self._points)} runs"
            done, left = self._done(), self._left()
            self._bar.update(self._task, completed=done, left=left, description=runs)

    def _done(self) -> float:
        return sum(self._work[i] * s for i, s in self._share.items()) / self._total

    def _left(self) -> str:
        shares = ((i, self._share[i] - self._first.get(i, 0.0)) for i in self._work)
        here = sum(self._work[i] * share for i, share in shares) / self._total
        if here <= 0:
            return "time left: ?"
        seconds = (time.monotonic() - self._started) * (1 - self._done()) / here
        return f"{duration(seconds)} left"

"""What an action returns, and the one place that prints it; messages and progress on stderr."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

from lorasweep.advise.pages import printable
from lorasweep.plan.load import run_flops
from lorasweep.store.files import Notify
from lorasweep.sweep.grid import Point
from lorasweep.sweep.names import aligned, run_names
from lorasweep.sweep.request import Request

Text = str | Iterable[str]


@dataclass(frozen=True)
class Answer:
    """What an action returns: for programs a value, for people text, and the exit status.

    An action that watches something yields several. What happens before the answer is known, such
    as progress and warnings, goes to stderr (`notifier`).
    """

    value: Any = None
    """What format=json prints, made of JSON values. None: the text, as {"output": LINES}."""
    text: Text | Callable[[], Text] = ""
    """Text or lines, or a function that makes them: it is called for format=text only."""
    status: int = 0
    """Exit status: 0 done, 1 something failed, 130 stopped."""

    def as_text(self) -> str:
        """Return the text that people read."""
        text = self.text() if callable(self.text) else self.text
        return text if isinstance(text, str) else "\n".join(text)

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
    cells = [[_cell(row.get(key)) for key in keys] for row in rows]
    numbers = [
        k for k, key in enumerate(keys) if not any(isinstance(r.get(key), str) for r in rows)
    ]
    return aligned([[key.replace("_", " ") for key in keys], *cells], numbers) if cells else []


def notifier(request: Request, always: bool = False) -> Notify:
    """Return a function that prints a message on stderr; format=json: only with `always`."""
    if request.format == "json" and not always:
        return lambda text: None
    return lambda text: print(text, file=sys.stderr, flush=True)


class Display:
    """A line for each ended run; in a terminal also a progress bar in floating-point operations."""

    def __init__(self, todo: list[Point], request: Request) -> None:
        self._points, self._names = {p.id: p for p in todo}, run_names(todo)
        self._work = {p.id: run_flops(p.spec) for p in todo}
        self._share = dict.fromkeys(self._work, 0.0)
        self._first: dict[str, float] = {}  # steps before this session do not count for the speed
        self._ended, self._started = 0, time.monotonic()
        self._print: Callable[[str], Any] = notifier(request)
        self._bar: AbstractContextManager[Any] = nullcontext()
        if request.format != "json" and sys.stderr.isatty() and find_spec("rich"):
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            console = Console(stderr=True, highlight=False, soft_wrap=True)
            self._print = partial(console.print, markup=False)  # above the bar
            text = (TextColumn("{task.description}"), TextColumn("{task.percentage:>3.0f}%"))
            self._bar = Progress(text[0], BarColumn(), text[1], console=console, transient=True)
            self._bar.add_task(f"0/{len(todo)} runs", total=1.0)

    def __enter__(self) -> "Display":
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def event(self, event: dict[str, Any]) -> None:
        """Show an event of a worker."""
        if "note" in event:
            self._print(event["note"])
        for rid in self._points.keys() & event.get("runs", []):
            self._share[rid] = event["step"] / self._points[rid].spec.steps
            self._first.setdefault(rid, self._share[rid])
        rid, of = event.get("run", ""), f"/{len(self._points)}"
        if ended := "ended" in event and rid in self._points:
            self._first.setdefault(rid, 0.0)
            self._share[rid], self._ended = 1.0, self._ended + 1
        total = sum(self._work.values()) or 1.0
        done = sum(self._work[i] * share for i, share in self._share.items()) / total
        here = done - sum(self._work[i] * share for i, share in self._first.items()) / total
        elapsed = time.monotonic() - self._started
        left = f"{duration(elapsed * (1 - done) / here)} left" if here > 0 else "time left: ?"
        if ended:
            head = f"[{self._ended:>3}{of}] {self._names[rid]:32} {rid}  "
            value, spent = event.get("value"), duration(event["wall_s"])
            measure = "" if value is None else f"  {event['measure']} {value:.4f}"
            text = f"{event['ended']:8}{measure}  {spent}  ({left})"
            failed = event["ended"] == "failed"
            self._print(head + (f"FAILED: {event['cause']}" if failed else text))
        if not isinstance(self._bar, nullcontext):
            runs = f"{self._ended}{of} runs, {left}"
            self._bar.update(self._bar.task_ids[0], completed=done, description=runs)  # type: ignore

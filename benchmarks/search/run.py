"""Count the updates that `+sweep=tune` needs, a plain grid needs, and Optuna needs.

    python -m benchmarks search [--out FILE] [replays[:N]] [coverage[:N]] [tiny] [small]

Writes analysis/results/search/search.json, and the page from it. `replays`: N replays of each kept
table. `coverage`: N simulated searches of each family. `tiny`, `small`: real runs; `small` needs
the weights of SmolLM2 and GSM8K.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks import harness
from benchmarks.harness import Figures
from benchmarks.search import page
from benchmarks.search.real import CASES, real
from benchmarks.search.simulated import coverage
from benchmarks.search.tables import replays


def main(arguments: Sequence[str]) -> None:
    """Measure the named parts, or all, and write the page."""

    def record(content: Figures, part: str, figures: Any) -> None:
        here = harness.machine("optuna", "torch")
        content |= {part: figures, "processor": here["processor"], "packages": here["packages"]}

    parts: dict[str, Callable[..., Any]] = {
        "replays": replays,
        "coverage": coverage,
        **{name: partial(real, name) for name in CASES},
    }
    harness.measure_parts(str(page.FOLDER / "search.json"), parts, arguments, record)
    if "--out" not in arguments:
        page.write()

"""Budgets of a search in time, runs or GPU-hours: what finished runs have used."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorasweep.errors import SpecError
from lorasweep.store import files
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.search import full_runs

UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "gpuh": 3600.0, "runs": 1.0}
"""Unit -> its size in seconds, or in runs of full length."""


@dataclass(frozen=True)
class Budget:
    """An amount of a unit."""

    text: str
    unit: str
    amount: float
    """Seconds, or runs of full length."""
    steps: int
    """Updates of a run of full length."""

    def used(self, points: Iterable[Point], store: RunStore) -> float:
        """Return how much of the budget the runs have used, in seconds or runs."""
        if self.unit == "runs":
            return full_runs((p for p in points if store.result(p.id)), self.steps)
        spans, busy = [], 0.0  # start and end of each attempt; seconds of GPUs
        for rid in {p.id: None for p in points}:
            result, ended = store.result(rid) or {}, store.folder(rid) / "result.json"
            processes, attempts = store.env(rid).get("processes") or 1, store.last_attempt(rid) or 0
            share = processes / (result.get("pack_size") or 1)  # the runs of a pack share processes
            for n in range(1, attempts + 1):
                found = {f.name: files.status(f) for f in store.attempt(rid, n).iterdir()}
                changed = {name: stat.st_mtime for name, stat in found.items() if stat is not None}
                end = max(changed.values())
                start = changed.get("owner.json", end)
                if n == attempts and ended.exists():
                    end = max(start, ended.stat().st_mtime)
                spans.append((start, end))
                busy += (end - start) * share
        if self.unit == "gpuh":
            return busy
        return union_s(spans)

    def allows(self, new: Sequence[Point], known: Sequence[Point], store: RunStore) -> bool:
        """Return whether runs may begin after others; runs that have begun always go on.

        They are expected to use as much of the budget as the `known` runs did.
        """
        if any(store.last_attempt(p.id) or store.result(p.id) for p in new):
            return True
        used, done = self.used(known, store), full_runs(known, self.steps)
        more = used * full_runs([*known, *new], self.steps) / done if done else used
        return more <= self.amount


def union_s(spans: Iterable[tuple[float, float]]) -> float:
    """Return the seconds that lie in at least one span (start, end)."""
    total, until = 0.0, 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def amount_of(text: str, *units: str) -> tuple[float, str] | None:
    """Read an amount above 0 and its unit, in seconds or runs; None if it is none of `units`."""
    found = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(units)})", text.strip())
    return (float(found[1]) * UNITS[found[2]], found[2]) if found and float(found[1]) else None


def parse_budget(text: str, steps: int) -> Budget | None:
    """Read budget=2h, 90min, 40runs or 500gpuh; None if empty; SpecError if it is none of them.

    `steps`: updates of a run of full length.
    """
    if not text:
        return None
    found = amount_of(text, "h", "min", "runs", "gpuh")
    if found is None:
        raise SpecError(
            f"budget={text}: expected an amount and its unit, for example budget=2h, "
            "budget=90min (time here, or of the chain of jobs), budget=40runs (of full length) or "
            "budget=500gpuh."
        )
    return Budget(text, found[1], found[0], steps)

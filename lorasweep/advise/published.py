"""What others published, as the rules use it: published.yaml, each entry with its source."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

PATH = Path(__file__).with_name("published.yaml")
LISTS = ("bits_per_token", "least_rank", "rank_gaps", "attention_gaps", "low_rate_gaps", "rates")
SINGLE = ("law", "best_rates")


@dataclass(frozen=True)
class Published:
    """The entries of published.yaml, without some sources if asked for."""

    values: dict[str, Any]

    def without(self, sources: Iterable[str]) -> "Published":
        """Return what is left without the entries of some sources."""
        gone = set(sources)
        kept = dict(self.values)
        for name in LISTS:
            kept[name] = [e for e in kept[name] if e["source"] not in gone]
        for name in SINGLE:
            if kept[name] is not None and kept[name]["source"] in gone:
                kept[name] = None
        return Published(kept)

    def where(self, source: str) -> str:
        """Return a source in words."""
        return self.values["sources"][source]

    def entries(self, name: str, **wanted: Any) -> list[dict[str, Any]]:
        """List the entries of one kind that have the wanted values."""
        return [e for e in self.values[name] if all(e.get(k) == v for k, v in wanted.items())]

    def sources_of(self, entries: Iterable[dict[str, Any]]) -> str:
        """Return the sources of some entries in words, each once."""
        return "; ".join(dict.fromkeys(self.where(e["source"]) for e in entries))

    @property
    def law(self) -> dict[str, Any] | None:
        """The published law of the learning rate; None if its source was taken out."""
        return self.values["law"]

    def best_rate(self, location: str, rank: int) -> float | None:
        """Return the best rate of the public sweep for a model, at the rank nearest to `rank`."""
        table = self.values["best_rates"]
        found = (table or {"models": {}})["models"].get(location)
        return found[min(found, key=lambda r: abs(r - rank))] if found else None


@cache
def published() -> Published:
    """Read published.yaml."""
    return Published(yaml.safe_load(PATH.read_text()))

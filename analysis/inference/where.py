"""Where a quantity was measured: on which base and data, on which arm, with which settings."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any


class Setting(IntEnum):
    """The kind of model and data. If there are several settings, the last of them counts."""

    IN_REGIME = 0
    """Only rules of a synthetic language are new: few numbers to learn."""
    BEYOND = 1
    """Lists to memorise are new as well, or alone: exceptions, facts, exercises."""
    REAL = 2
    """A model and data that were not made by a program of this project."""


@dataclass(frozen=True)
class Where:
    """Where a quantity was measured. Empty or None: not known, or not one value."""

    task: str = ""
    """The condition, as the question names it."""
    base: str = ""
    """Base model; several are joined by " and "."""
    data: str = ""
    """Data set of the condition, or what is new in it."""
    setting: Setting = Setting.BEYOND
    arm: str = ""
    """Name of the curve, unique in its task; empty: not of one curve."""
    rank: int | None = None
    batch_size: int | None = None
    updates: int | None = None
    alpha: float | None = None
    at: str = ""
    """Rank and number of updates of a claim's quantity in words."""

    @property
    def place(self) -> dict[str, Any]:
        """The fields of this class, by name; of a subclass too."""
        return {f.name: getattr(self, f.name) for f in fields(Where)}

    def plain(self) -> dict[str, Any]:
        """Return what is known, as values for JSON."""
        known = {k: v for k, v in self.place.items() if v not in ("", None)}
        return {**known, "setting": self.setting.name}


def where_of(plain: Mapping[str, Any]) -> Where:
    """Read a place from results.json, where other keys may stand beside it."""
    known = {f.name: plain[f.name] for f in fields(Where) if f.name in plain}
    return Where(**{**known, "setting": Setting[plain["setting"]]})

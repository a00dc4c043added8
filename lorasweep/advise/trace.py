"""Reasons: for every number of an answer its formula, inputs, source, and how sure it is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Sure(StrEnum):
    """How sure a number is, from most to least."""

    EXACT = "exact: counted from the shape"
    MEASURED = "measured here, on this model"
    PLANNED = "computed; nine in ten published figures lie within the stated error"
    PUBLISHED = "published by more than one"
    ONCE = "published once, or disputed"
    WEAK = "measured here on small models only"
    ASSUMED = "an assumption"


@dataclass(frozen=True)
class Reason:
    """Where a number comes from."""

    name: str
    value: Any
    formula: str
    inputs: Mapping[str, Any]
    source: str
    sure: Sure

    def line(self) -> str:
        """Return the reason as text."""
        given = ", ".join(f"{name} = {shown(value)}" for name, value in self.inputs.items())
        return (
            f"{self.name} = {shown(self.value)}\n    {self.formula}"
            + (f"\n    with {given}" if given else "")
            + f"\n    source: {self.source}\n    {self.sure.value}"
        )

    def plain(self) -> dict[str, Any]:
        """Return the reason as JSON values."""
        return {
            "name": self.name,
            "value": self.value,
            "formula": self.formula,
            "inputs": dict(self.inputs),
            "source": self.source,
            "sure": self.sure.name.lower(),
        }


@dataclass
class Trace:
    """The reasons of one answer, in the order in which they were found."""

    reasons: dict[str, Reason] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def note(
        self,
        name: str,
        value: Any,
        formula: str,
        source: str,
        sure: Sure,
        /,
        **inputs: Any,
    ) -> Any:
        """Record where a number comes from, and return it."""
        self.reasons[name] = Reason(name, value, formula, inputs, source, sure)
        return value

    def warn(self, text: str) -> None:
        """Record a warning once."""
        if text not in self.warnings:
            self.warnings.append(text)


def shown(value: Any) -> str:
    """Return a value as people read it: three digits, thousands apart."""
    if value is None:
        return "not known"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value and (abs(value) >= 1e9 or abs(value) < 1e-3):
            return f"{value:.3g}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    return str(value)

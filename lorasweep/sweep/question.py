"""A sweep is a question: its claims with margins, its arms and axes, stated before any run.

One file of `sweeps/` each. Field names are the keys of those files.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lorasweep.errors import SpecError

CLAIMANTS = ("study", "popular", "ours")
MAX_ROUNDS = 5


@dataclass
class Claim:
    """What is measured, what is expected, and how far off still counts: stated before any run."""

    says: str = ""
    """The claim in words, as a table shows it. Not judged, so not part of the hash."""
    whose: str = "ours"
    """Who claims it: `study`, `popular` (summaries of it, libraries' defaults, other papers) or
    `ours`. Not hashed."""
    measure: str = ""
    """What is measured, with its unit, as a table shows it. Not hashed."""
    beside: str = ""
    """What a reader must know with the verdict: where it is claimed, what else is known of it. Not
    hashed."""
    estimand: str = ""
    expected: float = math.nan
    margin: list[float] = field(default_factory=list)
    """[low, high]: the claim is SUPPORTED if the 95% interval lies inside, REFUTED if it lies
    outside."""
    primary: bool = False
    rivals: dict[str, float] = field(default_factory=dict)
    """Other published values, by name."""


@dataclass
class Replicates:
    """The second stage: fresh seeds at the learning rates around each curve's best."""

    seeds: list[int] = field(default_factory=list)
    n_lrs: int = 3
    arms: list[str] = field(default_factory=list)
    """Arms that get fresh seeds; empty: all. A control on which no verdict rests, or an arm whose
    runs are expensive, may go without."""


@dataclass
class Sweep:
    """One file of sweeps/."""

    question: str = ""
    source: str = ""
    how: str = ""
    """How it is measured, and what that leaves open: what a reader must know with the answer."""
    claims: dict[str, Claim] = field(default_factory=dict)
    axes: dict[str, Any] = field(default_factory=dict)
    """Shared axes: name -> list of values."""
    arms: dict[str, Any] = field(default_factory=dict)
    """Arm name -> {method: name, axis: list or value, ...}."""
    second: Replicates = field(default_factory=Replicates)
    rounds: int = 1
    """Looks at the answer that are planned, 1 to 5: each is judged at a stricter level, so that all
    together err in 5%."""
    analysis: str = ""
    at: dict[str, Any] = field(default_factory=dict)
    """Scale name -> what the arms and axes take from it: ${sweep.at.${scale.at}.ranks}. Not part of
    the question."""
    parts: list[str] = field(default_factory=list)
    """Names of sweeps that are asked one after another instead of arms of its own: +sweep=study."""


def check_sweep(name: str, sweep: Sweep) -> None:
    """Raise SpecError if the question is not stated in full: claims with margins, arms, no empty
    axis."""
    for problem in _problems(sweep):
        raise SpecError(f"sweep {name!r}{problem}")


def _problems(sweep: Sweep) -> Iterator[str]:
    """Yield what is wrong, to be read after the sweep's name."""
    if not sweep.question:
        yield " asks no question. Write `question: ...` at its top."
    if sweep.parts:
        if sweep.arms or sweep.axes or sweep.claims:
            yield " has parts, so it has no arms, axes and claims of its own: they are its parts'."
        return
    if not sweep.claims:
        yield " has no claims. State at least one, with estimand and margin, before any run."
    for key, claim in sweep.claims.items():
        if claim.whose not in CLAIMANTS:
            yield f", claim {key!r}: whose={claim.whose!r}. Allowed: {', '.join(CLAIMANTS)}."
        if len(claim.margin) != 2 or not claim.margin[0] < claim.margin[1]:
            yield f", claim {key!r}: margin={claim.margin}. Give [low, high] with low < high."
    if not 1 <= sweep.rounds <= MAX_ROUNDS:
        yield f": rounds={sweep.rounds}. Plan 1 to {MAX_ROUNDS} looks at the answer."
    if not sweep.arms:
        yield " has no arms, so there is nothing to run."
    for arm, axes in sweep.arms.items():
        if not isinstance(axes, dict) or "method" not in axes:
            yield f", arm {arm!r}: needs a method. Write `method: lora` below it."
    for arm in sweep.second.arms:
        if arm not in sweep.arms:
            yield (
                f": second.arms names {arm!r}, which is not an arm. Its arms: "
                f"{', '.join(sweep.arms)}; sweep.second.arms=[] means all of them."
            )
    for axis, values in _all_axes(sweep):
        if isinstance(values, list) and not values:
            yield f": axis {axis!r} is empty, so the grid is empty. Give at least one value."


def _all_axes(sweep: Sweep) -> Iterator[tuple[str, Any]]:
    yield from sweep.axes.items()
    for arm, axes in sweep.arms.items():
        for axis, values in axes.items():
            yield f"arms.{arm}.{axis}", values

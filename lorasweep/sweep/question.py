"""A sweep as its file states it: a question, claims with margins, arms and axes.

Each is one file in `sweeps/`. Field names are the keys of these files.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorasweep.errors import SpecError, unknown
from lorasweep.spec.metric import METRICS

CLAIMANTS = ("study", "popular", "ours")
MAX_ROUNDS = 5
ADDED_AFTER = "added_after"
"""Key beside an arm's axes: what was added to its runs after a look at them, and why."""
DIRECTIONS = ("", "lower", "higher")


@dataclass
class Claim:
    """What is measured, what is expected, and with which margin. Stated before any run."""

    says: str = ""
    """The claim in words, as shown in tables. Not judged, so not hashed."""
    whose: str = "ours"
    """Who makes the claim: `study`, `popular` (summaries of the study, defaults of libraries, other
    papers) or `ours`. Not hashed."""
    measure: str = ""
    """What is measured, with its unit, as shown in tables. Not hashed."""
    beside: str = ""
    """Note shown with the verdict: where the claim is made, what else is known. Not hashed."""
    estimand: str = ""
    expected: float = math.nan
    margin: list[float] = field(default_factory=list)
    """[low, high]: SUPPORTED if the 95% interval lies inside, REFUTED if it lies outside."""
    better: str = ""
    """The direction of the metric that the claim's words take for granted, lower or higher; empty:
    it stands in either. Not hashed."""
    not_on: list[str] = field(default_factory=list)
    """Base models of whose runs the claim is not asked. Empty: it is asked of all."""
    primary: bool = False
    rivals: dict[str, float] = field(default_factory=dict)
    """Other published values, by name."""
    sd: Any = None
    """Standard deviation of the estimand between seeds (of its logarithm, if it is a ratio): a
    number, or {scale: number}. From a pilot or an earlier answer; 0 for exact counts. Says before
    any run whether the claim can be decided. Not hashed."""
    units: Any = None
    """Number of units that the interval is over and `sd` is between, if they are not the seeds:
    bases, runs of a fit. A number, or {scale: number}. Not hashed."""
    underpowered: Any = False
    """True, or a list of scales: the sweep is known to have too few seeds for the claim there. Not
    hashed."""

    exploratory: dict[str, str] = field(default_factory=dict)
    """{scale: why}: verdicts there explore and do not confirm, because what they rest on was
    changed after their runs had been seen. Shown with every verdict. Not hashed."""
    stands: bool = False
    """The claim is judged although the answer is withdrawn, as the reason does not concern it. Not
    hashed."""

    def at(self, scale: str) -> "Power":
        """Return what is stated of the claim's power at a scale."""
        sd, units = (v.get(scale) if isinstance(v, dict) else v for v in (self.sd, self.units))
        known = self.underpowered
        return Power(sd, units, scale in known if isinstance(known, list) else known)


@dataclass(frozen=True)
class Power:
    """What a sweep's file states of a claim's power at one scale; None: nothing."""

    sd: float | None
    units: int | None
    underpowered: bool


@dataclass
class Replicates:
    """The second stage: fresh seeds at the learning rates around each curve's best."""

    seeds: list[int] = field(default_factory=list)
    n_lrs: int = 3
    arms: list[str] = field(default_factory=list)
    """Arms that get fresh seeds; empty: all. Leave out expensive arms, and controls that no verdict
    depends on."""


@dataclass
class Sweep:
    """One file of sweeps/."""

    question: str = ""
    source: str = ""
    how: str = ""
    """How it is measured and what that leaves open. Shown with the answer."""
    withdrawn: str = ""
    """Why the answer does not count, to be read after "withdrawn:"; empty: it counts. Verdicts are
    then UNDECIDED and shown as withdrawn, whatever was measured, but those on claims that stand.
    Not hashed."""
    claims: dict[str, Claim] = field(default_factory=dict)
    axes: dict[str, Any] = field(default_factory=dict)
    """Axes of all arms: name -> list of values."""
    arms: dict[str, Any] = field(default_factory=dict)
    """Arm name -> {method: name, axis: list or value, ..., added_after: {scale: {what, why}}}.

    `added_after` says which runs were added after a look, and why; the sweep then plans two rounds
    or more, so that its verdicts are judged at the level of two looks."""
    second: Replicates = field(default_factory=Replicates)
    rounds: int = 1
    """Planned looks at the answer, 1 to 5. More looks mean a stricter level for each, so that the
    total error rate stays 5%."""
    analysis: str = ""
    at: dict[str, Any] = field(default_factory=dict)
    """Scale name -> values for arms and axes, used as ${sweep.at.${scale.at}.ranks}. Not hashed."""
    parts: list[str] = field(default_factory=list)
    """Sweeps that run one after another, instead of arms of its own. Used by +sweep=study."""


def axes_of(arm: dict[str, Any]) -> dict[str, Any]:
    """Return the axes of an arm: what it states but for its method and what was added to it."""
    return {k: v for k, v in arm.items() if k not in ("method", ADDED_AFTER)}


def added_after(sweep: Sweep, scale: str) -> list[dict[str, str]]:
    """List what was added to the arms' runs after a look: arm, what and why, at one scale."""
    stated = ((arm, (v.get(ADDED_AFTER) or {}).get(scale)) for arm, v in sweep.arms.items())
    return [{"arm": arm, **said} for arm, said in stated if said]


def check_sweep(name: str, sweep: Sweep, models: Sequence[str] = ()) -> None:
    """Check that a sweep is complete: a question, claims with margins, arms, no empty axis.

    Args:
        models: those that claims can leave out; empty: not checked.

    Raises:
        SpecError: it is not.
    """
    for problem in _problems(sweep, models):
        raise SpecError(f"sweep {name!r}{problem}")


def _problems(sweep: Sweep, models: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong, each as the rest of a sentence that starts with the sweep's name."""
    if not sweep.question:
        yield " has no question. Write `question: ...` at the top of its file."
    if sweep.parts:
        if sweep.arms or sweep.axes or sweep.claims:
            yield " has parts, so it cannot have arms, axes or claims. Remove the one or the other."
        return
    if not sweep.claims:
        yield " has no claims. State at least one, with estimand and margin, before any run."
    for key, claim in sweep.claims.items():
        if claim.whose not in CLAIMANTS:
            yield f", claim {key!r}: whose={claim.whose!r}. Allowed: {', '.join(CLAIMANTS)}."
        if len(claim.margin) != 2 or not claim.margin[0] < claim.margin[1]:
            yield f", claim {key!r}: margin={claim.margin}. Expected [low, high] with low < high."
        if claim.better not in DIRECTIONS:
            yield f", claim {key!r}: better={claim.better!r}. Allowed: lower, higher, or leave out."
        for base in claim.not_on:
            if models and base not in models:
                yield f", claim {key!r}, not_on: {unknown('model', base, models)}"
        if not all(claim.exploratory.values()):
            yield (
                f", claim {key!r}: exploratory={claim.exploratory}. Say why, as {{scale: why}}, or "
                "leave the scale out."
            )
        yield from _power_problems(key, claim)
    if not 1 <= sweep.rounds <= MAX_ROUNDS:
        yield f": rounds={sweep.rounds}. Expected 1 to {MAX_ROUNDS}."
    if not sweep.arms:
        yield " has no arms, so there is nothing to run."
    for arm, axes in sweep.arms.items():
        if not isinstance(axes, dict) or "method" not in axes:
            yield f", arm {arm!r}: has no method. Write `method: lora` below it."
        elif axes.get(ADDED_AFTER):
            yield from _added_problems(arm, axes[ADDED_AFTER], sweep.rounds)
    for arm in sweep.second.arms:
        if arm not in sweep.arms:
            yield (
                f": second.arms names {arm!r}, which is not an arm. Its arms: "
                f"{', '.join(sweep.arms)}; sweep.second.arms=[] means all of them."
            )
    for axis, values in _all_axes(sweep):
        if isinstance(values, list) and not values:
            yield f": axis {axis!r} is empty, so the grid is empty. Give at least one value."


def check_directions(name: str, sweep: Sweep, objectives: Iterable[str]) -> None:
    """Check that no claim takes another direction for better than the metric of the runs has.

    Raises:
        SpecError: one does.
    """
    for objective in objectives:
        metric = METRICS[objective]
        direction = "higher" if metric.higher_is_better else "lower"
        for key, claim in sweep.claims.items():
            if claim.better not in ("", direction):
                raise SpecError(
                    f"sweep {name!r}, claim {key!r}: better={claim.better}, but objective="
                    f"{objective} is measured by {metric.label} ({metric.name}), of which "
                    f"{direction} is better. State the claim the other way, or choose another "
                    "objective."
                )


def _power_problems(key: str, claim: Claim) -> Iterator[str]:
    for name, least, kinds in (("sd", 0, int | float), ("units", 1, int)):
        stated = getattr(claim, name)
        values = stated.values() if isinstance(stated, dict) else [stated]
        if stated is not None and not all(isinstance(v, kinds) and v >= least for v in values):
            yield (
                f", claim {key!r}: {name}={stated}. Expected a number of at least {least}, or "
                "{scale: number}."
            )
    if not isinstance(claim.underpowered, bool | list):
        yield f", claim {key!r}: underpowered={claim.underpowered}. Expected true or [scale, ...]."


def _all_axes(sweep: Sweep) -> Iterator[tuple[str, Any]]:
    yield from sweep.axes.items()
    for arm, axes in sweep.arms.items():
        for axis, values in axes_of(axes).items():
            yield f"arms.{arm}.{axis}", values


def _added_problems(arm: str, stated: Any, rounds: int) -> Iterator[str]:
    by_scale = stated.values() if isinstance(stated, dict) else [None]
    for said in by_scale:
        if not isinstance(said, dict) or {k for k, v in said.items() if v} != {"what", "why"}:
            yield (
                f", arm {arm!r}: {ADDED_AFTER}={stated}. Expected {{scale: {{what: ..., why: "
                "...}}}: which runs were added after a look, and why."
            )
    if rounds < 2:
        yield (
            f", arm {arm!r}: has runs that were added after a look, but rounds={rounds}. Write "
            "`rounds: 2`, or the number of looks, so that its verdicts are judged at that level."
        )

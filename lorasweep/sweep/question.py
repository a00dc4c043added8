"""A sweep as a file of `sweeps/` states it: a question, claims with margins, arms and axes.

Field names are the keys of these files. Answers are kept with older keys for some (STORED_KEYS).
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorasweep.errors import SpecError, unknown
from lorasweep.spec.metric import METRICS

SOURCES = ("study", "popular", "ours")
MAX_ROUNDS = 5
ADDED_AFTER = "added_after"
"""Key beside an arm's axes: which of its runs were added after an interim analysis, and why."""
DIRECTIONS = ("", "lower", "higher")
ALL_SCALES = "all"
"""Key of `planning` that holds for every scale."""


@dataclass
class Planning:
    """What a claim's power calculation is based on at one scale: from a pilot or earlier answer."""

    sd: float | None = None
    """Standard deviation of the estimand between seeds (of the logarithm of a ratio); 0 for exact
    counts."""
    units: int | None = None
    """Number of observations, if they are not seeds but bases or runs of a fit."""


@dataclass
class Claim:
    """What is measured, what is expected, and with which margin. Stated before any run."""

    text: str = ""
    """The claim in words, as shown in tables. Not judged, so not hashed."""
    source: str = "ours"
    """Who makes the claim: `study`, `popular` (summaries of the study, defaults of libraries, other
    papers) or `ours`. Not hashed."""
    measure: str = ""
    """What is measured, with its unit, as shown in tables. Not hashed."""
    note: str = ""
    """Shown with the verdict: where the claim is made, what else is known. Not hashed."""
    estimand: str = ""
    expected: float = math.nan
    margin: list[float] = field(default_factory=list)
    """[low, high]: SUPPORTED if the 95% interval lies inside, REFUTED if it lies outside."""
    better: str = ""
    """The direction of the metric that the claim assumes, lower or higher; empty: either. Not
    hashed."""
    except_models: list[str] = field(default_factory=list)
    """Base models whose runs are left out of the claim."""
    primary: bool = False
    alternatives: dict[str, float] = field(default_factory=dict)
    """Other published values, by name."""
    planning: dict[str, Planning] = field(default_factory=dict)
    """{scale: {sd, units}}, or {all: ...}: for the power calculation before any run. Not hashed."""
    underpowered: Any = False
    """True, or a list of scales: the sweep is known to have too few seeds for the claim there. Not
    hashed."""
    exploratory: dict[str, str] = field(default_factory=dict)
    """{scale: why}: verdicts there explore and do not confirm, because the claim or its analysis
    was changed after the runs had been seen. Shown with every verdict. Not hashed."""
    not_withdrawn: bool = False
    """The claim is judged although the answer is withdrawn, because the reason does not concern it.
    Not hashed."""

    def at(self, scale: str) -> "Power":
        """Return the numbers that a power calculation needs at a scale."""
        both = [self.planning.get(k, Planning()) for k in (scale, ALL_SCALES)]
        sd, units = (
            next((v for p in both if (v := getattr(p, name)) is not None), None)
            for name in ("sd", "units")
        )
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
    """The second stage: fresh seeds at the learning rates around each curve's optimum."""

    seeds: list[int] = field(default_factory=list)
    n_lrs: int = 3
    arms: list[str] = field(default_factory=list)
    """Arms that get fresh seeds; empty: all."""


@dataclass
class Sweep:
    """One file of sweeps/."""

    question: str = ""
    source: str = ""
    how: str = ""
    """How it is measured and what that leaves open. Shown with the answer."""
    withdrawn: str = ""
    """Why the answer does not count, as shown after "withdrawn:"; empty: it counts. If not, all
    verdicts are UNDECIDED, except those of claims with `not_withdrawn`. Not hashed."""
    analysis: str = ""
    """File of analysis/questions that judges the claims."""
    rounds: int = 1
    """Planned interim analyses, 1 to 5. More of them mean a stricter level for each, so that the
    total error rate stays 5%."""
    claims: dict[str, Claim] = field(default_factory=dict)
    axes: dict[str, Any] = field(default_factory=dict)
    """Axes of all arms: name -> value or list of values."""
    arms: dict[str, Any] = field(default_factory=dict)
    """Arm name -> {method: name, axis: value or list, ..., added_after: {what, why}}.

    `added_after` says which runs were added after an interim analysis, and why; `rounds` must then
    be 2 or more."""
    replicate: Replicates = field(default_factory=Replicates)
    scales: dict[str, Any] = field(default_factory=dict)
    """Scale name -> {axes, arms, replicate}, merged over the keys above before the command line
    (config/loader.py). Empty: the sweep is the same at any scale."""
    parts: list[str] = field(default_factory=list)
    """Sweeps that run one after another, instead of arms. Used by +sweep=study."""


STORED_KEYS = {
    "text": "says",
    "source": "whose",
    "note": "beside",
    "except_models": "not_on",
    "alternatives": "rivals",
    "not_withdrawn": "stands",
}
"""Keys of a claim that have another name where answers are kept."""
STORED_ORDER = (
    *("says", "whose", "measure", "beside", "estimand", "expected", "margin", "better", "not_on"),
    *("primary", "rivals", "sd", "units", "underpowered", "exploratory", "stands"),
)


def stored_claim(claim: Claim) -> dict[str, Any]:
    """Return a claim with the keys that are kept with answers.

    There `sd` and `units` are a number, or {scale: number}.
    """
    values = dataclasses.asdict(claim)
    planning = values.pop("planning")
    stored = {STORED_KEYS.get(k, k): v for k, v in values.items()}
    for name in ("sd", "units"):
        by_scale = {scale: p[name] for scale, p in planning.items() if p[name] is not None}
        stored[name] = by_scale.get(ALL_SCALES, by_scale or None)
    return {key: stored[key] for key in STORED_ORDER}


def stored_sweep(sweep: Sweep) -> dict[str, Any]:
    """Return a sweep as JSON values with the keys that are kept with requests."""
    values = {**dataclasses.asdict(sweep), "second": dataclasses.asdict(sweep.replicate)}
    del values["replicate"], values["scales"]
    return {**values, "claims": {k: stored_claim(c) for k, c in sweep.claims.items()}}


def sweep_from_stored(values: dict[str, Any], scale: str) -> Sweep:
    """Rebuild a sweep from the values of `stored_sweep`, also those written by version 0.1."""
    new_keys = {old: new for new, old in STORED_KEYS.items()}
    claims = {}
    for name, stored in values["claims"].items():
        claim = {new_keys.get(k, k): v for k, v in stored.items()}
        planning: dict[str, Planning] = {}
        for key in ("sd", "units"):
            stated = claim.pop(key, None)
            by_scale = stated if isinstance(stated, dict) else {ALL_SCALES: stated}
            for at, value in by_scale.items():
                if value is not None:
                    setattr(planning.setdefault(at, Planning()), key, value)
        claims[name] = Claim(**claim, planning=planning)
    arms = {arm: dict(axes) for arm, axes in values["arms"].items()}
    for axes in arms.values():
        added = axes.pop(ADDED_AFTER, None) or {}
        if "what" not in added:  # version 0.1 stated it by scale
            added = added.get(scale)
        if added:
            axes[ADDED_AFTER] = added
    rest = {k: v for k, v in values.items() if k not in ("claims", "arms", "second", "at")}
    return Sweep(**rest, claims=claims, arms=arms, replicate=Replicates(**values["second"]))


def axes_of(arm: dict[str, Any]) -> dict[str, Any]:
    """Return the axes of an arm: all its keys except the method and `added_after`."""
    return {k: v for k, v in arm.items() if k not in ("method", ADDED_AFTER)}


def added_after(sweep: Sweep) -> list[dict[str, str]]:
    """List the runs that were added after an interim analysis: arm, what and why."""
    stated = ((arm, axes.get(ADDED_AFTER)) for arm, axes in sweep.arms.items())
    return [{"arm": arm, **added} for arm, added in stated if added]


def check_sweep(name: str, sweep: Sweep, models: Sequence[str] = ()) -> None:
    """Check that a sweep is complete: a question, claims with margins, arms, no empty axis.

    Args:
        models: those that claims can leave out; empty: not checked.

    Raises:
        SpecError: it is not.
    """
    if problem := next(_problems(sweep, models), None):
        raise SpecError(f"sweep {name!r}{problem}")


def _problems(sweep: Sweep, models: Sequence[str]) -> Iterator[str]:
    """Yield the rest of sentences that start with the sweep's name."""
    if not sweep.question:
        yield " has no question. Write `question: ...` at the top of its file."
    if sweep.parts:
        if sweep.arms or sweep.axes or sweep.claims:
            yield " has parts, so it cannot have arms, axes or claims. Remove either."
        return
    if not sweep.claims:
        yield " has no claims. State at least one, with estimand and margin, before any run."
    for key, claim in sweep.claims.items():
        for problem in _claim_problems(claim, models):
            yield f", claim {key!r}{problem}"
    if not 1 <= sweep.rounds <= MAX_ROUNDS:
        yield f": rounds={sweep.rounds}. Expected 1 to {MAX_ROUNDS}."
    if not sweep.arms:
        yield " has no arms, so there is nothing to run."
    for arm, axes in sweep.arms.items():
        if not isinstance(axes, dict) or "method" not in axes:
            yield f", arm {arm!r}: has no method. Write `method: lora` below it."
            continue
        added = axes.get(ADDED_AFTER)
        if not added:
            continue
        if not isinstance(added, dict) or {k for k, v in added.items() if v} != {"what", "why"}:
            yield (
                f", arm {arm!r}: {ADDED_AFTER}={added}. Expected {{what: ..., why: ...}}: which "
                "runs were added after an interim analysis, and why."
            )
        if sweep.rounds < 2:
            yield (
                f", arm {arm!r}: has runs that were added after an interim analysis, but rounds="
                f"{sweep.rounds}. Write `rounds: 2`, or the number of interim analyses."
            )
    for arm in sweep.replicate.arms:
        if arm not in sweep.arms:
            yield (
                f": replicate.arms names {arm!r}, which is not an arm. Its arms: "
                f"{', '.join(sweep.arms)}; sweep.replicate.arms=[] means all of them."
            )
    of_arms = {f"arms.{arm}.{k}": v for arm, a in sweep.arms.items() for k, v in axes_of(a).items()}
    for axis, values in {**sweep.axes, **of_arms}.items():
        if isinstance(values, list) and not values:
            yield f": axis {axis!r} is empty, so the grid is empty. Give at least one value."


def _claim_problems(claim: Claim, models: Sequence[str]) -> Iterator[str]:
    if claim.source not in SOURCES:
        yield f": source={claim.source!r}. Allowed: {', '.join(SOURCES)}."
    if len(claim.margin) != 2 or not claim.margin[0] < claim.margin[1]:
        yield f": margin={claim.margin}. Expected [low, high] with low < high."
    if claim.better not in DIRECTIONS:
        yield f": better={claim.better!r}. Allowed: lower, higher, or leave out."
    for base in claim.except_models:
        if models and base not in models:
            yield f", except_models: {unknown('model', base, models)}"
    if not all(claim.exploratory.values()):
        yield (
            f": exploratory={claim.exploratory}. Say why, as {{scale: why}}, or leave the scale "
            "out."
        )
    for scale, planning in claim.planning.items():
        for name, least in (("sd", 0), ("units", 1)):
            value = getattr(planning, name)
            if value is not None and not value >= least:
                yield f": planning.{scale}.{name}={value}. Expected a number of at least {least}."
    if not isinstance(claim.underpowered, bool | list):
        yield f": underpowered={claim.underpowered}. Expected true or [scale, ...]."


def check_directions(name: str, sweep: Sweep, objectives: Iterable[str]) -> None:
    """Check that every claim's `better` is the direction of the metric of the runs.

    Raises:
        SpecError: one is not.
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

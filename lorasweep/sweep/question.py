"""The content of a file of `sweeps/`: a question, claims with margins, arms and axes.

Fields are named as keys of these files, and of kept questions.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from lorasweep.errors import SpecError, unknown
from lorasweep.spec.metric import METRICS
from lorasweep.spec.values import ABOVE_0, Is, problems_of

FINEST = 1.15
"""Neighbouring learning rates of a search are not closer than this factor."""
MIN_SHORT = 8
"""Fewest updates of a short run."""
ADDED_AFTER = "added_after"
"""Key of an arm with runs that were added after an interim analysis. Value: {what, why}."""
ALL_SCALES = "all"
"""Key of `planning` that applies to every scale."""


@dataclass
class Planning:
    """Inputs of a claim's power calculation at one scale, from a pilot or an earlier answer."""

    sd: Annotated[float | None, Is("", 0)] = None
    """Standard deviation between seeds (for a ratio: of its logarithm); 0 for exact counts."""
    units: Annotated[int | None, Is("", 1)] = None
    """Number of observations, if these are not seeds but bases or runs of a fit."""


@dataclass
class Claim:
    """A claim: estimand, expected value and margin, stated before any run.

    The hash of a claim covers estimand, expected, margin, except_models, primary, alternatives.
    """

    text: str = ""
    """The claim in words, as shown in tables."""
    source: Literal["study", "popular", "ours"] = "ours"
    """`study`, `popular` (summaries of the study, defaults of libraries, other papers), `ours`."""
    measure: str = ""
    """The measured quantity and its unit, as shown in tables."""
    note: str = ""
    """Remarks shown with the verdict, such as where the claim was published."""
    if_supported: str = ""
    if_refuted: str = ""
    if_open: str = ""
    """What to do about the answer: one sentence without numbers, which are measured elsewhere."""
    cost: str = ""
    """Another claim of the sweep, whose measured number is shown with the answer."""
    estimand: str = ""
    expected: float | None = None
    margin: list[float] = field(default_factory=list)
    """[low, high]: SUPPORTED if the 95% interval lies inside, REFUTED if it lies outside."""
    better: Literal["", "lower", "higher"] = ""
    """The better direction of the metric, as the claim assumes: lower, higher; empty: either."""
    except_models: list[str] = field(default_factory=list)
    """Base models whose runs are left out of the claim."""
    primary: bool = False
    alternatives: dict[str, float] = field(default_factory=dict)
    """Other published values, by name."""
    planning: dict[str, Planning] = field(default_factory=dict)
    """{scale: {sd, units}}, or {all: ...}."""
    underpowered: Any = False
    """Known to have too few seeds: true, or a list of the scales with too few."""
    exploratory: dict[str, str] = field(default_factory=dict)
    """{scale: why}: verdicts at this scale are exploratory, because the claim or its analysis was
    changed, or the question asked, after the runs had been seen. The reason is shown with every
    verdict."""
    not_withdrawn: bool = False
    """Judge the claim although the answer is withdrawn, for a reason that does not affect it."""

    def planned_at(self, scale: str) -> Planning:
        """Return the inputs of the power calculation at a scale."""
        stated = [vars(self.planning[k]) for k in (ALL_SCALES, scale) if k in self.planning]
        return Planning(**{k: v for p in stated for k, v in p.items() if v is not None})


@dataclass
class Replicates:
    """The second stage: fresh seeds at `n_lrs` learning rates around each curve's optimum."""

    seeds: list[int] = field(default_factory=list)
    n_lrs: int = 3
    arms: list[str] = field(default_factory=list)
    """Arms that get fresh seeds; empty: all."""


@dataclass
class Search:
    """How a sweep searches learning rates instead of trying a grid."""

    prefix: Annotated[int, Is("", 1)] = 8
    """A short run has the first 1/prefix of a full run's updates."""
    n_short: Annotated[int, Is("", 3)] = 5
    """Number of learning rates that are tried first."""
    wide: Annotated[float, Is("factor", FINEST * 1.01)] = 4.0
    """Factor between the learning rates of short runs."""
    fine: Annotated[float, Is("factor", FINEST * 1.01)] = 2.0
    """Largest factor between the best learning rate of full runs and its neighbours."""
    n_lrs: Annotated[int, Is("", 1)] = 3
    """Learning rates around the best that are trained in full first, and that get fresh seeds."""
    n_full: Annotated[int, Is("", 1)] = 5
    """Learning rates with finite losses that an arm tries in full; the analysis needs as many."""
    most_lrs: int = 9
    """Learning rates of an arm in full beyond which the analysis gets no more."""
    seeds: Annotated[int, Is("", 0)] = 6
    """Maximum number of fresh seeds."""
    epochs: Annotated[float, Is("", ABOVE_0)] = 3
    """Passes over the user's own training rows in a full run, if `steps` is not given."""
    min_steps: Annotated[int, Is("", 1)] = 40
    max_steps: int = 500
    """Limits of the updates that follow from `epochs`."""

    def short_steps(self, steps: int) -> int:
        """Return the updates of a short run; after fewer than MIN_SHORT, losses say little."""
        return min(steps, max(MIN_SHORT, steps // self.prefix))


@dataclass
class Sweep:
    """The content of one file of sweeps/."""

    question: str = ""
    source: str = ""
    how: str = ""
    """The method of measurement and its limits, shown with the answer."""
    withdrawn: str = ""
    """Why the answer is withdrawn; empty: it is not. If it is, all verdicts are UNDECIDED, except
    those of claims with `not_withdrawn`. No hash covers this field."""
    analysis: str = ""
    """Module of analysis/questions that judges the claims, or a sweep whose `estimands` do."""
    variants: dict[str, Any] = field(default_factory=dict)
    estimands: dict[str, Any] = field(default_factory=dict)
    """What is compared; see analysis/questions/estimands.py. Empty: those of `analysis`."""
    rounds: Annotated[int, Is("interim analyses", 1, 5)] = 1
    """Planned interim analyses, 1 to 5. With more of them, each has wider intervals, so that the
    total error rate stays 5%."""
    claims: dict[str, Claim] = field(default_factory=dict)
    axes: dict[str, Any] = field(default_factory=dict)
    """Axes of all arms: name -> value or list of values."""
    arms: dict[str, Any] = field(default_factory=dict)
    """Name -> {method: name, axis: value or list, ..., added_after: {what, why}}. With
    `added_after`, `rounds` must be 2 or more."""
    replicate: Replicates = field(default_factory=Replicates)
    search: Search | None = None
    """Search learning rates from those of the adviser; None: the arms state them."""
    parts: list[str] = field(default_factory=list)
    """Sweeps that run one after another, instead of arms; used by +sweep=study."""


def made(name: str, values: dict[str, Any], models: Sequence[str] = ()) -> Sweep:
    """Make a sweep from the content of its file at a scale, or from `dataclasses.asdict`.

    `models`: names that `except_models` may have; empty: not checked.

    Raises:
        SpecError: a key or value is wrong, or the sweep is not complete.
    """
    values = dict(values)
    for problem in problems_of(Sweep, values):
        raise SpecError(f"sweep {name!r}: {problem}")
    sweep = Sweep(**values)
    for problem in _problems(sweep, models):
        raise SpecError(f"sweep {name!r}, {problem}")
    return sweep


def axes_of(arm: dict[str, Any]) -> dict[str, Any]:
    """Return an arm's axes: all keys but the method and `added_after`."""
    return {k: v for k, v in arm.items() if k not in ("method", ADDED_AFTER)}


def _problems(sweep: Sweep, models: Sequence[str]) -> Iterator[str]:
    """Yield what is missing, or wrong together: a question, claims with margins, arms, values."""
    if not sweep.question:
        yield "question: missing. Write `question: ...` at the top of its file."
    if sweep.parts:
        if sweep.arms or sweep.axes or sweep.claims:
            yield "parts: a sweep of sweeps cannot have arms, axes or claims. Remove either."
        return
    if not sweep.claims:
        yield "claims: missing. State at least one, with estimand and margin, before any run."
    if not sweep.arms:
        yield "arms: missing, so there is nothing to run."
    for key, claim in sweep.claims.items():
        yield from (
            f"claim {key!r}: {unknown('model', base, models)}"
            for base in claim.except_models
            if models and base not in models
        )
        low_high = len(claim.margin) == 2 and claim.margin[0] < claim.margin[1]
        for wrong, expected in (
            (not low_high, f"margin={claim.margin}. Expected [low, high] with low < high"),
            (claim.cost not in ("", *sweep.claims), f"cost={claim.cost}. Expected a claim's name"),
            (claim.expected is None, "expected: missing. State the claimed value of the estimand"),
            (not all(claim.exploratory.values()), "exploratory. Expected {scale: why}"),
            (
                not isinstance(claim.underpowered, bool | list),
                f"underpowered={claim.underpowered}. Expected true or [scale, ...]",
            ),
        ):
            if wrong:
                yield f"claim {key!r}: {expected}."
    how = sweep.search
    if how and how.max_steps < how.min_steps:
        yield f"search.max_steps={how.max_steps}: expected at least min_steps={how.min_steps}."
    for arm, axes in sweep.arms.items():
        if not isinstance(axes, dict) or "method" not in axes:
            yield f"arm {arm!r}: has no method. Write `method: lora` below it."
            continue
        if added := axes.get(ADDED_AFTER):
            stated = {k for k, v in added.items() if v} if isinstance(added, dict) else set()
            if stated != {"what", "why"} or sweep.rounds < 2:
                yield (
                    f"arm {arm!r}: {ADDED_AFTER}={added}, rounds={sweep.rounds}. Expected {{what: "
                    "..., why: ...}: which runs were added after an interim analysis, and why; "
                    "and rounds of 2 or more."
                )
        for axis, values in {**sweep.axes, **axes_of(axes)}.items():
            if isinstance(values, list) and not values:
                yield f"arm {arm!r}: axis {axis!r} is empty. Give at least one value."
    for arm in sweep.replicate.arms:
        if arm not in sweep.arms:
            yield f"replicate.arms: {unknown('arm', arm, sweep.arms)}"


def check_directions(name: str, sweep: Sweep, objectives: Iterable[str]) -> None:
    """Raise SpecError if a claim's `better` is not the direction of the runs' metric."""
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

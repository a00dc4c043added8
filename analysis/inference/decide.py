"""The decision rule: gates, verdicts, and the prediction of both for a planned sweep.

An interval is compared with a margin that was stated before any run. SUPPORTED: the interval lies
inside the margin. REFUTED: the two do not overlap. Otherwise, or with a gate (a reason that forbids
a verdict, such as an optimum at an edge), the claim is UNDECIDED, and the verdict names the remedy.
The level is 95%, or higher with interim analyses: looks must not make support of a claim easier.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np

from analysis.inference.estimate import (
    LEVEL,
    MAX_NEEDED,
    SEEDS,
    Estimate,
    Part,
    Spread,
    from_draws,
    needed,
    number,
)
from analysis.inference.where import Where

MIN_SEEDS = 3
"""Seeds that a verdict needs at the LRs around the optimum: fewer do not show the noise there."""


class GateCode(StrEnum):
    """Why no verdict is given, as a sentence: {0} stands for the subject, {1} for the flags."""

    FLAGGED = "{1}"
    FEW_SEEDS = f"{{0}} seed(s), {MIN_SEEDS} needed"
    FEW_SEEDS_AT_BEST = f"{{0}} seed(s) at the optimum, {MIN_SEEDS} needed"
    FEW_SEEDS_OF_BOTH = f"{{0}} seed(s) that both methods have, {MIN_SEEDS} needed"
    FEW_SEEDS_AT_RECIPE = f"{{0}} seed(s) at the recipe's learning rate, {MIN_SEEDS} needed"
    FEW_SEEDS_AS_GOOD = "{0} seed(s) with such a learning rate"
    RECIPE_OUTSIDE = "the recipe's learning rate is outside those tried"
    RECIPE_BY_A_CLIFF = "{1}: the recipe's learning rate is next to one that diverged"
    ONLY_A_BOUND = "full fine-tuning does not reach LoRA's loss, only a bound"
    ONLY_BOUNDS = "full fine-tuning or a layer set is there at its first evaluation: only bounds"
    NOT_REACHED = "LoRA does not reach the loss within its run"
    NOT_CONVERGED = "not converged: {0}"
    BUSY = "seconds of one arm differ by a factor {0}: the machine did other work"
    TASK = "task: {0}"
    BY_TASK = "by task: {0}"
    MISSING = "no curve of {0}"
    NOT_APART = "no rank leaves its band within the run"
    ONE_RANK = "one rank only"
    NOISY = "the gap's standard error is {0} of the gain; at most 1.25% is judged"
    NO_GAP = "LoRA is not behind here, so there is no gap to grow or shrink"
    NO_CELL = "no condition that the claim is about was run"
    ELSEWHERE = "judged in another scale's answer, together with these runs"
    FEW_CONDITIONS = "only {0} conditions were measured"
    NO_LAW = "too few conditions whose needed rank lies inside the ranks tried"
    NOT_SHARED = "{0}: no learning rate near those wanted was tried with all methods"
    OPEN_ORDERS = "no pair of methods is reversed, but up to {0} may be"
    NO_ADVANTAGE = "LoRA is not better here, so there is no advantage to explain"
    WITHDRAWN = "withdrawn: {0}"
    NO_ORDER = "rank(s) {0} fall behind by the first evaluation: their order is not resolved"


NOT_ASKED = {GateCode.NO_CELL: "not run", GateCode.ELSEWHERE: "judged elsewhere"}
"""Gate of a claim that is not asked of these runs -> what is shown and counted as its outcome."""
OF_GRID = {*NOT_ASKED, GateCode.MISSING, GateCode.FEW_CONDITIONS, GateCode.ONE_RANK}
"""Gates that depend on which runs there are, whatever their losses; see `Gate.of_grid`."""


@dataclass(frozen=True)
class Gate:
    """A reason that forbids a verdict."""

    BY_DATA: ClassVar[str] = "by the data"
    """Subject of NO_CELL if only training shows whether a condition is what the claim is about."""

    code: GateCode
    subject: str | int = ""
    place: str = ""
    """The curve, batch or task; the sentence begins with it."""
    flags: tuple[str, ...] = ()
    """Flags of an optimum, if they are the reason."""

    @property
    def sentence(self) -> str:
        """The reason as a sentence."""
        return self.place + self.code.format(self.subject, ", ".join(self.flags))

    @property
    def of_grid(self) -> bool:
        """Whether it depends on which runs there are alone, not on their losses or their data."""
        law = f"{self.subject}".startswith("the law: ")  # does not cover these settings
        return law or (self.code in OF_GRID and self.subject != self.BY_DATA)

    def at(self, place: str) -> "Gate":
        """Return the gate with `place` put in front of the place that it names."""
        return dataclasses.replace(self, place=place + self.place)

    def plain(self) -> dict[str, Any]:
        """Return plain values for JSON; `code` is the code's name, not its sentence."""
        return {**vars(self), "code": self.code.name, "flags": list(self.flags)}


def gate_of(plain: dict[str, Any]) -> Gate:
    """Read a gate from its plain values; KeyError if there is no such code."""
    return Gate(**{**plain, "code": GateCode[plain["code"]], "flags": tuple(plain["flags"])})


REMEDIES: dict[str, str] = {
    GateCode.WITHDRAWN: "other runs: the reason says which",
    "unread_at_likely_rates": "more learning rates around the best one",
    "one_rank_departs": "longer runs, or two ranks that fall behind within them",
    GateCode.NOT_APART: "longer runs",
    GateCode.NOT_REACHED: "longer runs, or higher ranks",
    GateCode.NOT_CONVERGED: "more exposures of each fact",
    GateCode.BUSY: "the same runs on a quiet machine",
    GateCode.TASK: "another task or model: more runs cannot help",
    GateCode.MISSING: "the missing arm",
    GateCode.NO_GAP: "a condition in which LoRA is behind",
    GateCode.NO_CELL: "the conditions that the claim is about",
    GateCode.ELSEWHERE: "nothing",
    GateCode.FEW_CONDITIONS: "the missing conditions",
    GateCode.NO_LAW: "more conditions, or ranks on both sides of the needed rank",
    GateCode.NOT_SHARED: "learning rates that all methods share",
    GateCode.OPEN_ORDERS: "more seeds at the best learning rates and the shared ones",
    GateCode.NO_ADVANTAGE: "a condition in which LoRA is better",
    GateCode.NOISY: "more seeds, or more held-out rows",
    GateCode.ONE_RANK: "another rank",
    "bounded_by_divergence": "learning rates between the best one and the first that diverges",
    GateCode.NO_ORDER: "a base that learns more slowly, or higher ranks",
    "at_edge": "learning rates beyond the edge",
    "few_points": "more learning rates",
    "no_variance": "more seeds or learning rates, to know the noise",
    "no_usable_points": "lower learning rates",
}
"""Gate code or flag -> what would lift the gate. With several gates, the first entry counts. All
other codes and flags need more seeds."""


def remedy(gates: Iterable[Gate], flags: Iterable[str] = ()) -> str:
    """Return what would lift the gates and remove the flags (REMEDIES); empty: more seeds."""
    reasons = {*flags, *(reason for g in gates for reason in (g.code, *g.flags))}
    return next((text for reason, text in REMEDIES.items() if reason in reasons), "")


BETTER = "it is on the better side"
"""End of a refutation's reason if the result is better than claimed."""
EXPLORATORY, WITHDRAWN = "exploratory", "WITHDRAWN"
"""Marks of a verdict that confirms no claim, and of a verdict that does not count."""


@dataclass(frozen=True)
class Verdict:
    """SUPPORTED, REFUTED or UNDECIDED, with the reason (`why`) and the remedy (`needed`)."""

    claim: str
    group: str
    outcome: str
    estimate: Estimate
    expected: float
    margin: tuple[float, float]
    primary: bool
    why: str
    needed: str = ""
    rivals: dict[str, float] = field(default_factory=dict)
    log: bool = True
    """The margin is of a ratio, so distances are compared as logarithms."""
    p: float | None = None
    """The smallest significance level at which the claim is decided; None without draws."""
    gates: tuple[Gate, ...] = ()
    exploratory: str = ""
    """Why the verdict does not confirm the claim; empty: it may."""
    where: Where = field(default_factory=Where)
    """The place of the measurement."""
    missing: int | None = None
    """Units still needed for a decision; None: unknown, or too many. `plain` leaves it out."""

    @property
    def is_better(self) -> bool:
        """Whether the claim is refuted by a result better than claimed."""
        return self.why.endswith(BETTER)

    @property
    def is_withdrawn(self) -> bool:
        """Whether the sweep's file says that the answer does not count."""
        return any(g.code == GateCode.WITHDRAWN for g in self.gates)

    @property
    def not_asked(self) -> str:
        """Why the claim is not asked of these runs, by NOT_ASKED; empty: it is asked."""
        return next((NOT_ASKED[g.code] for g in self.gates if g.code in NOT_ASKED), "")

    @property
    def lacks(self) -> str:
        """What planned runs lack, so that no losses could decide the claim; empty: nothing."""
        of = (f"{g.sentence}. Needed: {remedy([g])}" for g in self.gates if g.of_grid)
        return next(of, "")

    @property
    def shown(self) -> str:
        """The outcome as shown in reports, marked if withdrawn, not asked or exploratory."""
        if self.is_withdrawn or self.not_asked:
            return WITHDRAWN if self.is_withdrawn else self.not_asked
        return f"{self.outcome} ({EXPLORATORY})" if self.exploratory else self.outcome

    def plain(self) -> dict[str, Any]:
        """Return plain values for JSON, without `missing`."""
        return {
            **{k: v for k, v in vars(self).items() if k != "missing"},
            "estimate": self.estimate.plain(),
            "margin": list(self.margin),
            "gates": [g.plain() for g in self.gates],
            "where": self.where.plain(),
        }


NO_INTERVAL = ("unread_at_likely_rates", "one_rank_departs")
"""Flags that say why an estimate has no interval."""
LOOK_LEVELS = {1: 1 - 0.05, 2: 1 - 0.0294, 3: 1 - 0.0221, 4: 1 - 0.0182, 5: 1 - 0.0158}
"""Number of looks planned -> the interval's level at each look, for an overall error of 5%
(Pocock, Biometrika 64, 1977)."""


def at_level(e: Estimate, level: float) -> Estimate:
    """Return an estimate with the interval of this level; unchanged if it has no draws."""
    if e.draws is None or level == e.level:
        return e
    return from_draws(e.draws, e.n, level, e.flags, e.spread)


def judge(
    name: str,
    claim: dict[str, Any],
    group: str,
    estimate: Estimate,
    gates: Sequence[Gate],
    seeds: int,
    log: bool,
    level: float = LEVEL,
    together: int = 1,
) -> Verdict:
    """Judge one claim.

    `seeds`: number of seeds at the optima, used if the estimate has no spread. `log`: the margin is
    of a ratio. `level`: level of the interval that is compared with the margin. `together`: number
    of primary verdicts, for whose correction a primary claim needs more units.
    """
    low, high = (float(v) for v in claim["margin"])
    outcome, remedied, missing = "UNDECIDED", "", None
    unread = [] if gates else [f for f in estimate.flags if f in NO_INTERVAL]
    e = at_level(estimate, level)
    if e.value is not None and math.isnan(e.value):  # some run has no value
        e = Estimate(None, n=e.n, flags=e.flags)
    shown = f"the {100 * level:.3g}% interval"
    if gates:
        why = "; ".join(g.sentence for g in gates)
    elif e.value is None or e.low is None or e.high is None:
        why = ": ".join(["no interval", *unread])
    elif low <= e.low and e.high <= high:
        outcome, why = "SUPPORTED", f"{shown} lies inside the margin"
    elif e.high < low or e.low > high:
        outcome, why = "REFUTED", f"{shown} and the margin do not meet"
        if claim.get("better") == ("higher" if e.low > high else "lower"):
            why += f": {BETTER}"
    else:
        why = f"{shown} crosses the margin's edge"
    if outcome == "UNDECIDED":
        remedied, spread = remedy(gates, unread), e.spread or Spread(seeds)
        # An estimate may average more seeds than the LRs around the optimum have.
        now = min(seeds, spread.n) if spread.of == SEEDS and seeds else spread.n
        if not remedied and e.value is None:
            remedied = "optima with intervals in every curve"
        elif not remedied and not e.has_interval():
            remedied, missing = f"at least {MIN_SEEDS} {spread.of}", max(MIN_SEEDS - now, 1)
        elif not remedied and e.value is not None:
            first = at_level(e, 1 - (1 - level) / together) if claim.get("primary") else e
            to = scale_of(log)
            ends, margin = [to(v) for v in first.interval], (to(low), to(high))
            n = needed(spread, to(e.value), ends, margin, first.level, MIN_SEEDS)
            if n is None:
                rates = " and learning rates around the best ones" if spread.shared else ""
                remedied = f"more than {MAX_NEEDED} {spread.of}{rates}"
            else:
                remedied, missing = f"about {n} {spread.of} (now {now})", n - now
    return Verdict(
        *(name, group, outcome, e, float(claim["expected"]), (low, high)),
        *(bool(claim.get("primary")), why, remedied, dict(claim.get("alternatives") or {}), log),
        p=None if e.draws is None else p_value(e.draws, low, high),
        gates=tuple(gates),
        missing=missing,
    )


def p_value(draws: np.ndarray, low: float, high: float) -> float:
    """Return the p-value at which the draws decide a claim, at least 2 / len(draws).

    It is the smallest p for which the interval of level 1 - p lies inside [low, high] or outside.
    """
    below, above = float((draws < low).mean()), float((draws > high).mean())
    inside, apart = 2 * max(below, above), 2 * min(1 - below, 1 - above)
    return min(1.0, max(min(inside, apart), 2 / len(draws)))


def holm(verdicts: Sequence[Verdict], alpha: float = 1 - LEVEL) -> list[Verdict]:
    """Correct the primary claims for multiplicity by Holm's method (1979).

    The k-th smallest of n p-values must be at most alpha / (n - k + 1). A verdict that does not
    survive becomes UNDECIDED, with the reason. All other verdicts stay unchanged.
    """
    primary = [v for v in verdicts if v.primary]
    out = {id(v): v for v in verdicts}
    failed = False
    for k, v in enumerate(sorted(primary, key=lambda v: 1.0 if v.p is None else v.p)):
        share = alpha / (len(primary) - k)
        failed = failed or v.p is None or v.p > share
        if failed and v.outcome != "UNDECIDED":
            out[id(v)] = dataclasses.replace(
                v,
                outcome="UNDECIDED",
                needed=f"more {v.estimate.spread.of if v.estimate.spread else SEEDS}",
                why=f"{v.outcome} alone (p {v.p:.2g}), but not after Holm's correction over "
                f"{len(primary)} primary claims",
            )
    return [out[id(v)] for v in verdicts]


def scale_of(log: bool) -> Callable[[float], float]:
    """Return the map to a scale of symmetric errors: ln for ratios (-inf at 0), else identity."""
    return (lambda v: math.log(v) if v > 0 else -math.inf) if log else float


FAR = 100.0
"""A margin's end beyond -FAR or FAR counts as open."""


@dataclass(frozen=True)
class Outlook:
    """The predicted interval of one claim of a planned sweep, if the expected value is true.

    For a ratio (`log`), `half_width` and `room` are in ln.
    """

    claim: str
    expected: float
    margin: tuple[float, float]
    level: float
    """Level of the interval at one look; primary claims: after the correction for their number."""
    log: bool
    planned: int
    """Planned number of `units`, such as seeds, that the estimate averages."""
    units: str
    room: float
    """Distance of the expected value from the nearest end of the margin; below 0 outside it."""
    half_width: float | None = None
    """Half-width of the expected interval. None: no sd is stated, or one unit is planned."""
    needed: int | None = None
    """Smallest number of units that decides with 80% power. None: no sd is stated, or too many."""
    can_decide: bool | None = None
    """Whether the planned units suffice (None: no sd is stated); `underpowered`: the sweep file
    says that they do not."""
    underpowered: bool = False
    lacks: str = ""
    """What the planned runs lack, so that no losses could decide the claim; empty: nothing."""
    asked: bool = True
    """Whether the claim is about some of the planned runs."""

    @property
    def warns(self) -> bool:
        """Whether the claim is asked and cannot be decided, and the sweep file does not say so."""
        return self.can_decide is False and self.asked and not self.underpowered

    def plain(self) -> dict[str, Any]:
        """Return plain values for JSON; the room in an open margin is None."""
        room = self.room if math.isfinite(self.room) else None
        return {**dataclasses.asdict(self), "margin": list(self.margin), "room": room}

    def line(self) -> str:
        """Return the outlook as one line for people."""
        start = f"  {'warning, ' if self.warns else ''}claim {self.claim}: "
        if self.lacks:
            return f"{start}cannot decide: {self.lacks}"
        if self.can_decide is None:
            return f"{start}not known: no standard deviation stated"
        value, half = f"{self.expected:g}", self.half_width
        interval = f"expected interval {value} +- {number(half, 2)}"
        if half is None:
            interval = f"expected {value} without an interval"
        elif self.log:
            ends = [number(self.expected * math.exp(sign * half)) for sign in (-1, 1)]
            interval = f"expected interval {value} [{', '.join(ends)}]"
        low, high = self.margin
        margin = f"[{'..' if low <= -FAR else f'{low:g}'}, {'..' if high >= FAR else f'{high:g}'}]"
        text = f"{start}{interval}, margin {margin}: "
        if self.can_decide:
            stated = ", though its file says `underpowered`" if self.underpowered else ""
            return f"{text}can decide{stated}"
        enough = f"more than {MAX_NEEDED}" if self.needed is None else f"{self.needed}"
        why = f"cannot decide: needs {enough} {self.units} (planned {self.planned})"
        return f"{text}{why}{', as its file says' if self.underpowered else ''}"


def outlook(
    claim: str,
    expected: float,
    margin: Sequence[float],
    sd: float | None,
    planned: int,
    *,
    rounds: int = 1,
    log: bool = False,
    units: str = "seeds",
    underpowered: bool = False,
    together: int = 1,
) -> Outlook:
    """Predict a claim's interval over the planned units, and whether it decides the claim.

    With n units, the half-width is t(level, n - 1) sd / sqrt(n) (Student, Biometrika 6, 1908).

    `sd`: standard deviation between units (of the logarithm, if log). 0: an exact value, which
    always decides. None: not known. `rounds`: number of looks planned. `underpowered`: the file
    says that the claim cannot be decided. `together`: number of claims corrected together; the
    interval has the level of the first step of Holm's correction.
    """
    (low, high), to, level = margin, scale_of(log), 1 - (1 - LOOK_LEVELS[rounds]) / together
    ends = (-math.inf if low <= -FAR else to(low), math.inf if high >= FAR else to(high))
    value = to(expected)
    room = min(value - ends[0], ends[1] - value)
    half_width, n, can_decide = (0.0, 1, True) if sd == 0 else (None, None, None)
    if sd:
        spread = Spread(2, parts=(Part(sd, 1.0),))  # n units leave n - 1 degrees of freedom
        half, most = spread.at(2, level)[0], max(MAX_NEEDED, planned)
        n = needed(spread, value, (value - half, value + half), ends, level, MIN_SEEDS, most)
        half_width = spread.at(planned, level)[0] if planned > 1 else None
        can_decide = n is not None and n <= planned
    known = (claim, expected, (margin[0], margin[1]), level, log, planned, units, room)
    return Outlook(*known, half_width, n, can_decide, underpowered)

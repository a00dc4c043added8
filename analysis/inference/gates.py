"""Gates: reasons that forbid a verdict, such as an optimum at the edge of the grid."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

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
    NO_ADVANTAGE = "LoRA is not better here, so there is no advantage to explain"
    WITHDRAWN = "withdrawn: {0}"
    NO_ORDER = "rank(s) {0} fall behind by the first evaluation: their order is not resolved"


@dataclass(frozen=True)
class Gate:
    """A reason that forbids a verdict."""

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

    def at(self, place: str) -> "Gate":
        """Return the gate with `place` put in front of the place that it names."""
        return replace(self, place=place + self.place)

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

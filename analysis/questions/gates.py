"""From estimates to verdicts, the same way for every question: the sweep file's claims, the gates,
the look's level."""

from collections.abc import Sequence
from typing import Any

from analysis.inference.decide import MIN_SEEDS, holm, judge, look_level
from analysis.inference.estimate import Estimate, Verdict
from analysis.optimum.optimum import Optimum, seeds_at_best
from analysis.runs.table import TableError
from analysis.runs.task import task_problems


def verdicts(
    question: dict[str, Any],
    measured: dict[str, tuple[Estimate, list[str]]],
    logs: Sequence[str],
    group: str,
    seeds: int = 0,
    of: str = "seeds at each optimum",
) -> list[Verdict]:
    """Judge every claim of a question for one group of runs.

    Args:
        measured: estimand -> (estimate, gates: reasons that forbid a verdict).
        logs: estimands whose margin is one of ratios.
        seeds: at each optimum now, for what is said to be needed.
        of: what they are where the interval is one over something else.
    """
    level = look_level(int(question.get("rounds", 1)))
    out = []
    for name, claim in question["claims"].items():
        if claim["estimand"] not in measured:
            known = ", ".join(measured)
            raise TableError(
                f"claim {name!r}: {question['analysis']} measures {known}, not {claim['estimand']!r}."
            )
        estimate, gates = measured[claim["estimand"]]
        out.append(
            judge(name, claim, group, estimate, gates, seeds, claim["estimand"] in logs, level, of)
        )
    return out


def about(question: dict[str, Any], estimand: str) -> dict[str, Any]:
    """Return the question with the claims about one estimand only."""
    return {
        **question,
        "claims": {k: v for k, v in question["claims"].items() if v["estimand"] == estimand},
    }


def corrected(found: Sequence[Verdict], question: dict[str, Any]) -> list[Verdict]:
    """Correct the primary claims of all groups for their number."""
    return holm(found, 1 - look_level(int(question.get("rounds", 1))))


def gates(optima: Sequence[Optimum], missing: str = "") -> list[str]:
    """List what forbids a verdict that rests on these optima; `missing` names an arm that is not
    there."""
    return [f"no curve of {missing}"] if missing else gates_of(list(optima))


def seeds(optima: Sequence[Optimum]) -> int:
    """Return the fewest seeds at any of the optima."""
    return min((seeds_at_best(o) for o in optima), default=0)


def gates_of(optima: list[Optimum]) -> list[str]:
    """List what forbids a verdict."""
    found = []
    for o in optima:
        stops = [
            f
            for f in o.flags
            if f
            in (
                "at_edge",
                "bounded_by_divergence",
                "flat",
                "few_points",
                "no_usable_points",
                "no_variance",
            )
        ]
        if stops:
            found.append(f"{o.curve.name}: {', '.join(stops)}")
        seeds = seeds_at_best(o)
        if seeds < MIN_SEEDS:
            found.append(f"{o.curve.name}: {seeds} seed(s) at the optimum, {MIN_SEEDS} needed")
    found += task_problems([o.curve for o in optima], [o.best_nll for o in optima])
    return found

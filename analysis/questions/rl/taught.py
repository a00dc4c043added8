"""What a bandit's labels come to if they are taught, by cross-entropy, instead of rewarded."""

import math

from analysis.inference.estimate import Estimate
from analysis.inference.gates import Gate, GateCode
from analysis.measures.at_best import AtBest, over_seeds
from analysis.optimum.optimum import Optimum
from analysis.questions.rl.stable import gates_on_stable, stable

ACTIONS, LABEL_BITS = 16, 4
"""Labels to choose from, and their bits (lorasweep/data/synthetic/bandit.py)."""
ALL = 0.99
"""Share of the labels' bits of which nothing more can be gained at rates beyond those tried."""


def known_share(nll: float) -> float:
    """Return the share of a label's bits that is known, from its NLL in nats."""
    return 1 - nll / math.log(ACTIONS)


def share_known(o: Optimum) -> AtBest[float]:
    """Return the share of the labels' bits that is known at the best stable rate, by seed.

    It is 1 where the parabola is below a loss of 0.
    """
    found = stable(o.curve)
    return AtBest({}) if found is None else found.loss.map(lambda nll: min(1, known_share(nll)))


def behind_if_taught(full: Optimum | None, one: Optimum | None) -> tuple[Estimate, list[Gate]]:
    """Return the percent of the labels' bits that rank 1 knows minus full fine-tuning's.

    And what forbids a verdict. A curve that knows ALL of them may end at the edge of its rates.
    """
    if full is None or one is None:
        missing = "full fine-tuning" if full is None else "rank 1"
        return Estimate(None), [Gate(GateCode.MISSING, f"{missing} by cross-entropy")]
    behind = share_known(one).paired(share_known(full), lambda a, b: 100 * (a - b))
    learning = [o.curve for o in (full, one) if not (over_seeds(share_known(o)).value or 0) > ALL]
    seeds = [g for g in gates_on_stable([full.curve, one.curve]) if g.code == GateCode.FEW_SEEDS]
    return over_seeds(behind), [*seeds, *(g for g in gates_on_stable(learning) if g not in seeds)]

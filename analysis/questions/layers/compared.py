"""The comparisons of the question `layers` on one task: in rho, and in nats."""

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.inference.estimate import Estimate
from analysis.inference.gates import Gate, GateCode
from analysis.inference.seeds import pooled_variance
from analysis.measures.layer_sets import Arm, Task, equal_pair, gap_of, log_ratio, ratio_of
from analysis.measures.qualify import stalled
from analysis.measures.regret import Gap
from analysis.optimum.optimum import Optimum
from analysis.questions.base import distinct, gates_on, gates_on_gap, gates_on_speed

OF_TASK = ("attention_over_mlp", "mlp_over_both", "attention_over_allowed", "mlp_over_allowed")
"""Measured on every task: ratios of rho, and gaps in nats minus what is allowed."""
UNKNOWN = Estimate(None)


@dataclass(frozen=True)
class Compared:
    """One task's comparisons: attention and MLP at equal parameters, MLP and both at equal rank."""

    task: Task
    pair: tuple[Arm, Arm] | None = None
    joint: tuple[Arm, Arm] | None = None
    """MLP, and attention+MLP of its rank."""
    worse: Estimate = UNKNOWN
    """rho of attention over rho of the MLP."""
    both: Estimate = UNKNOWN
    """rho of the MLP over rho of attention+MLP."""
    gaps: tuple[Gap, ...] = ()
    """Attention's loss minus the MLP's, and the MLP's minus that of attention+MLP."""

    def arms(self, estimand: str) -> tuple[Arm, Arm] | None:
        """Return the two arms that an estimand compares."""
        return self.pair if estimand.startswith("attention") else self.joint

    def rests(self, estimand: str) -> list[Optimum]:
        """Return the optima from which an estimand is computed."""
        arms = self.arms(estimand)
        return [a.optimum for a in (self.task.full, *arms)] if self.task.full and arms else []

    @property
    def optima(self) -> list[Optimum]:
        """All optima that are compared."""
        return distinct(o for e in OF_TASK[:2] for o in self.rests(e))

    def measured(self, estimand: str) -> tuple[Estimate, list[Gate]]:
        """Return an estimand of this task and what forbids a verdict about it."""
        used = self.rests(estimand)
        if not used:
            arms = "attention and mlp at equal parameters, or of attention+mlp at mlp's rank"
            return UNKNOWN, [Gate(GateCode.MISSING, arms)]
        if estimand.endswith("over_allowed"):
            gap = self.gaps[0 if estimand.startswith("attention") else 1]
            # A gap holds the optima of one of its arms and of full fine-tuning.
            return gap.over_allowed(), [*gates_on_gap(gap), *gates_on(used[-1:])]
        e = self.worse if estimand.startswith("attention") else self.both
        return e, self.gates(used, e)

    def gates(self, used: Sequence[Optimum], *measured: Estimate) -> list[Gate]:
        """List what forbids a verdict about rho on these optima."""
        full = self.task.full
        assert full is not None
        gates = [*stalled([full.optimum], [full.points.best]), *gates_on_speed(used)]
        if not gates and any(e.value is None for e in measured):
            gates.append(Gate(GateCode.ONLY_BOUNDS))
        return gates

    def named(self, gates: list[Gate]) -> list[Gate]:
        """Return the gates with the task's name before their sentences."""
        return [gate.at(f"{self.task.name}: ") for gate in gates]


def compared_on(task: Task) -> Compared:
    """Compare a task's layer sets.

    The variance over seeds is pooled over this task's ratios only: tasks differ in noise.
    """
    pair, both = equal_pair(task), task.get("attention+mlp")
    mlp = task.get("mlp", both.rank) if both else None
    if task.full is None or pair is None or both is None or mlp is None:
        return Compared(task)
    joint = (mlp, both)
    logs = [log_ratio(*arms, task.full) for arms in (pair, joint)]
    pooled = pooled_variance([list(v.best.values()) for v in logs])
    worse, enough = (ratio_of(v, pooled) for v in logs)
    gaps = tuple(gap_of(*arms, task, task.full) for arms in (pair, joint))
    return Compared(task, pair, joint, worse, enough, gaps)

"""The metric that runs are compared by: its name, and whether higher is better."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A held-out metric. `name` is also its key in the result."""

    name: str = "test_nll"
    higher_is_better: bool = False
    label: str = "test NLL"
    """Name shown in tables and figures."""

    @property
    def on_part(self) -> str:
        """Key of the metric's final value on the rows that were also evaluated before the end."""
        return f"{self.name}_curve"

    def value(self, result: Mapping[str, Any]) -> float | None:
        """Return the metric's value in a result; None if it is missing, as for a diverged run."""
        return result.get(self.name)

    def on_first(self, measures: Mapping[str, Any]) -> float:
        """Return the metric of an evaluation on the rows of all evaluations before the end."""
        return measures[self.on_part if self.on_part in measures else self.name]

    def loss(self, value: float) -> float:
        """Return the value with its sign chosen so that lower is better."""
        return -value if self.higher_is_better else value

    def stored(self) -> dict[str, Any]:
        """Return the entry that records this metric in a result; empty for the default metric."""
        return {} if self == Metric() else {"metric": asdict(self)}


CURVE_START = "nll_start_curve"
"""Key in a result: the base's NLL on the rows of evaluations before the end: validation rows, or
the first test rows. Results of earlier versions lack it, unless they are of trials."""
METRICS = {
    "sft": Metric(),
    "policy_gradient": Metric("test_reward", higher_is_better=True, label="held-out reward"),
}
"""The metric of each objective, known before any run."""


def metric_of(result: Mapping[str, Any]) -> Metric:
    """Return the metric that a result records; test_nll if it records none."""
    return Metric(**result["metric"]) if "metric" in result else Metric()

"""What a run is judged by: the name of a measure, and whether more of it is better."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """The held-out measure of a run. Its value lies in the result under `name`."""

    name: str = "test_nll"
    higher_is_better: bool = False
    label: str = "test NLL"
    """What people read."""

    def value(self, result: Mapping[str, Any]) -> float | None:
        """Return a result's value; None where it has none, as a diverged run's."""
        return result.get(self.name)

    def loss(self, value: float) -> float:
        """Return the value with its sign turned so that lower is better."""
        return -value if self.higher_is_better else value

    def stored(self) -> dict[str, Any]:
        """Return what a result says of its metric: nothing where it is the default."""
        return {} if self == Metric() else {"metric": asdict(self)}


def metric_of(result: Mapping[str, Any]) -> Metric:
    """Return the metric that a result was written with; without a word of it, test_nll."""
    return Metric(**result["metric"]) if "metric" in result else Metric()

"""Types, limits and meaning at the field: what is converted, and what is said of the rest."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from lorasweep.spec.values import ABOVE_0, BELOW_1, Is, misfits, problems_of


@dataclass(frozen=True)
class Settings:
    name: Annotated[str, Is("any name")]
    rank: Annotated[int, Is("columns", 1, 64)] = 4
    beta: Annotated[float | None, Is("", ABOVE_0, BELOW_1)] = None
    kind: Literal["", "lora", "full"] = ""
    flags: list[int] = field(default_factory=list)
    by_name: dict[str, float] = field(default_factory=dict, metadata={"key": "named"})
    other: Any = None


def test_values_are_converted_in_place():
    values = {"name": "a", "rank": 8.0, "beta": None, "flags": (1.0,), "named": {1: 2}, "other": {}}
    assert list(problems_of(Settings, values)) == []
    assert repr(values["rank"]) == "8" and values["flags"] == [1] and values["named"] == {"1": 2.0}
    assert list(misfits(Settings("a"))) == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "name: missing. Expected text (any name)."),
        ({"rnak": 1}, "column 'rnak' not found. Did you mean 'rank'?"),
        ({"rank": 65}, "rank=65: expected a whole number of at least 1 and at most 64 (columns)."),
        ({"rank": None}, "rank=None: expected"),
        ({"beta": 0}, "beta=0.0: expected a number above 0 and below 1, or null."),
        ({"beta": float("nan")}, "beta=nan"),
        ({"kind": "fll"}, "kind='fll'. Allowed: lora, full, or leave it out."),
        ({"flags": ["x"]}, "flags=['x']: expected list[int]"),
        ({"named": {"a": "x"}}, "named={'a': 'x'}"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_expected(values, said):
    given = {"name": "a"} if values else {}
    (problem,) = problems_of(Settings, given | values, "column ")
    assert said in problem


def test_all_problems_are_yielded():
    assert len(list(problems_of(Settings, {"rank": 0, "beta": "x", "odd": 1}))) == 4
    assert len(list(misfits(Settings("a", rank=0, kind="fll")))) == 2

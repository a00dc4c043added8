"""Which runs a customer still needs, and what is chosen, from planted losses on validation rows.

Rates are counted in steps of APART from the advised one, which is 0.
"""

import dataclasses
import math

import pytest

from lorasweep.advise.rules import APART
from lorasweep.errors import SpecError
from lorasweep.fleet.choice import MOST_TRIED, outcome_of, with_further
from lorasweep.fleet.rows import Rows
from lorasweep.fleet.runs import Member
from lorasweep.methods.lora import LoRA
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.run import validate
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point, around
from tests.world import tiny_spec

ADVISED = 1e-3
DATA = DatasetSpec(
    name="ann", source="jsonl", location="ann", n_validation=4, n_test=4, n_test_curve=4
)


def place(spec):
    return round(math.log(spec.lr / ADVISED, APART))


def around_advised(rates=3, centre=ADVISED, **fields):
    spec = tiny_spec(method=LoRA(rank=4), dataset=DATA, **fields)
    lrs = around(centre, rates, APART)
    return [Point("ann", dataclasses.replace(spec, lr=lr)) for lr in lrs]


def end(store, spec, loss, **more):
    """Write how a run ended; `loss` is that on validation rows, None if it diverged."""
    result = {"state": "diverged" if loss is None else "done", "wall_s": 1.0, "nll_start": 9.0}
    if loss is not None:
        result |= {"test_nll_curve": loss, **({"test_nll": loss + 1} if spec.test_rows else {})}
    store.put(spec, {**result, **more})


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "runs")


def played(store, loss, first=None, go_on=True, start=99.0):
    """Train what is asked for until nothing is; returns all runs, and how many each stage had."""
    points, stages = first or around_advised(), []
    while True:
        points = with_further(points, store, go_on)
        todo = [p for p in points if store.result(p.id) is None]
        if not todo:
            return points, stages
        stages.append(len(todo))
        for p in todo:
            more = {"nll_start_curve": start}
            if p.spec.test_rows:
                more = {"trial": p.spec.trial.id, "wall_s": 1.5}
            end(store, p.spec, loss(place(p.spec)), **more)


def outcome(points, store):
    rows = Rows(dataset=DATA, n_train=9, held_out=True)
    advised = dict.fromkeys(("method", "why", "rank", "load", "lr_source", "warnings"))
    return outcome_of(Member("row 2", "ann", "ann", "", advised, rows, points), store)


def valley(best):
    return lambda k: 2.0 + abs(k - best)


@pytest.mark.parametrize("best", range(-4, 5))
def test_rates_go_on_until_the_best_is_inside_or_six_were_tried(store, best):
    points, stages = played(store, valley(best))
    found = outcome(points, store)
    tried = [place(p.spec) for p in points if not p.spec.test_rows]
    n = min(3 + abs(best), MOST_TRIED)
    assert len(tried) == n and tried == sorted(tried) == list(range(tried[0], tried[0] + n))
    assert [t["lr"] for t in found.tried] == [p.spec.lr for p in points[:n]]
    edge = {4: "highest", -4: "lowest"}.get(best, "")
    assert place(found.spec) == best and found.spec.test_rows and found.facts()["edge"] == edge
    assert found.result["test_nll"] == 3.0 and stages == [3, *[1] * (n - 3), 1]
    # the seconds of the run that was measured include its trial's
    assert found.used == {"seconds_used": pytest.approx(n + 0.5), "gpu_hours_used": 0}
    assert all(with_further(p, store, True) == points for p in (points, around_advised()))


def test_a_diverged_rate_is_worse_than_any_and_of_equal_losses_the_lower_rate_is_better(store):
    found = outcome(played(store, lambda k: None if k > 1 else 5.0 - k)[0], store)
    assert (place(found.spec), found.facts()["edge"]) == (1, "")
    assert found.tried[-1]["validation"] is None
    found = outcome(played(store, lambda k: 1.0, around_advised(seed=7))[0], store)
    assert found.facts()["edge"] == "lowest" and len(found.tried) == MOST_TRIED
    # all diverge: an error after six
    points, stages = played(store, lambda k: None, around_advised(seed=8))
    found = outcome(points, store)
    assert sum(stages) == MOST_TRIED == len(points) and place(points[0].spec) == -4
    assert found.spec is None and "every learning rate diverged" in found.problem and not found.open


@pytest.mark.parametrize(
    ("slope", "bend", "hurts"), [(1.0, 0.0, True), (1.0, 1.0, True), (-0.3, 1.0, False)]
)
def test_no_lower_rate_is_tried_where_training_hurts_at_every_rate(store, slope, bend, hurts):
    """Loss 2 + slope * lr + bend * lr^2 in units of the lowest rate: lower ones only train less."""

    def loss(k):
        return 2.0 + slope * 3.0 ** (k + 1) + bend * 9.0 ** (k + 1)

    points, _ = played(store, loss, start=2.0)
    found = outcome(points, store)
    assert found.hurts == found.facts()["hurts"] == hurts and found.facts()["edge"] == ""
    assert len(found.tried) == (3 if hurts else 6)
    assert place(found.spec) == (-1 if hurts else -3)


@pytest.mark.parametrize("rates", [1, 3, 5])
def test_rates_that_are_given_are_tried_and_no_others(store, rates):
    points, _ = played(store, valley(4), around_advised(rates), go_on=False)
    found = outcome(points, store)
    assert len(found.tried) == rates and len(points) == rates + (rates > 1)
    edge = "highest" if rates > 1 else ""
    assert (place(found.spec), found.facts()["edge"]) == (rates // 2, edge)


def test_what_is_left_is_open_and_no_rate_is_tried_that_a_run_may_not_have(store):
    points = with_further(around_advised(), store, True)
    for k, p in enumerate(points):
        found = outcome(points, store)
        assert found.open and found.problem == f"not trained yet: {3 - k} of 3 runs"
        end(store, p.spec, 5.0 - place(p.spec))
    # the fourth run is not in `points` yet, but the best of three may not be the best
    assert outcome(points, store).open
    further = with_further(points, store, True)
    assert [place(p.spec) for p in further] == [-1, 0, 1, 2]
    high = around_advised(3, 20.0, seed=3)
    assert len(played(store, valley(99), high)[1]) == 2  # 60 is the highest below 100


def test_a_rate_that_breaks_on_test_rows_counts_as_diverged(store):
    points, _ = played(store, valley(0))
    again = RunStore(store.root.with_name("other"))
    for p in points:
        end(again, p.spec, None if p.spec.test_rows else valley(0)(place(p.spec)))
    found = outcome(played(again, valley(0))[0], again)
    assert (place(found.spec), found.facts()["edge"]) == (-1, "")
    assert found.tried[2]["validation"] is None


@pytest.mark.parametrize(
    "before, error, gained",
    [(9.5, 0.1, "gained"), (9.2, 0.1, "not known"), (8.5, 0.1, "got worse"), (8.5, None, "not known")],
)  # fmt: skip
def test_the_verdict_of_a_gain_is_by_its_interval(store, before, error, gained):
    """4 rows: Student's t of 3 degrees of freedom is 3.18."""
    found = outcome(played(store, valley(0))[0], store)
    result = {"nll_start": before, "test_nll": 9.0, "gain_se": error, "n_test": 4}
    facts = dataclasses.replace(found, result=found.result | result).facts()
    assert facts["gained"] == gained
    ends = error and pytest.approx((before - 9.318, before - 8.682), abs=1e-3)
    assert facts["gain_interval"] == ends


def test_a_trial_needs_validation_rows():
    trial = around_advised()[0].spec.trial
    validate(trial)
    assert trial.id != around_advised()[0].id and "test_rows" in trial.canonical
    without = dataclasses.replace(trial, dataset=dataclasses.replace(DATA, n_validation=0))
    with pytest.raises(SpecError, match="test_rows="):
        validate(without)

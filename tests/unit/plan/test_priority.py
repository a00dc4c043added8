"""Which claims a budget decides: planted costs with a known best order."""

import itertools

import numpy as np
import pytest

from lorasweep.plan.priority import Need, choose


def need(name, runs, sweep="s"):
    """A claim; `runs`: letters, each a run of the hours in HOURS."""
    return Need(sweep, name, {run: HOURS[run] for run in runs})


HOURS = {"a": 100.0, "b": 40.0, "c": 40.0, "d": 5.0, "e": 300.0}


def order(needs, budget):
    chosen, left = choose(needs, budget)
    return [c.need.claim for c in chosen], {n.claim: hours for n, hours in left}


def test_claims_come_by_decided_claims_per_hour_and_a_shared_run_is_paid_once():
    needs = [
        need("large", "e"),
        need("first", "a", "x"),  # with second and third: three claims for 100 hours
        need("second", "a", "y"),
        need("third", "a", "y"),
        need("fourth", "ab", "y"),  # after these, 40 hours
        need("single", "c"),  # one claim for 40 hours: below 3 for 100, above 1 for 45
        need("with_d", "bd"),  # 45 hours, of which `fourth` has paid 40
    ]
    chosen, left = choose(needs, 500)
    names = [c.need.claim for c in chosen]
    assert names == ["first", "second", "third", "fourth", "with_d", "single", "large"]
    assert [c.gpu_hours for c in chosen] == [100, 0, 0, 40, 5, 40, 300]
    assert [c.runs for c in chosen] == [1, 0, 0, 1, 1, 1, 1] and not left
    assert chosen[-1].total == sum(HOURS.values())


def test_what_is_over_the_budget_stays_open_with_its_extra_cost():
    needs = [need("large", "ae"), need("middle", "ab"), need("small", "c")]
    assert order(needs, 39.9) == ([], {"large": 400, "middle": 140, "small": 40})
    assert order(needs, 40) == (["small"], {"large": 400, "middle": 140})
    # a claim that does not fit does not keep cheaper ones out
    assert order(needs, 180) == (["small", "middle"], {"large": 300})
    assert order([], 10) == ([], {}) and order([need("free", "")], 0) == (["free"], {})


@pytest.mark.parametrize("stream", range(20))
def test_each_step_is_the_best_that_fits(stream):
    rng = np.random.default_rng(stream)
    hours = dict(enumerate(rng.uniform(1, 9, 8)))
    needs = [
        Need("s", str(k), {i: hours[i] for i in hours if rng.random() < 0.4}) for k in range(7)
    ]
    budget = float(rng.uniform(5, 40))
    chosen, left = choose(needs, budget)
    bought, done = set(), set()
    for cost, step in itertools.groupby(chosen, lambda c: c.total):
        done |= {c.need for c in step}
        bought |= set().union(*(n.runs for n in done))
        assert cost == pytest.approx(sum(hours[i] for i in bought)) and cost <= budget
    for n, extra in left:
        assert extra == pytest.approx(sum(hours[i] for i in set(n.runs) - bought))
        assert sum(hours[i] for i in bought) + extra > budget
    ratios = [
        (sum(set(m.runs) <= set(n.runs) for m in needs) / max(sum(n.runs.values()), 1e-9), n)
        for n in needs
        if sum(n.runs.values()) <= budget
    ]
    if ratios:  # the first set of runs that is bought is that of the best ratio
        best = max(ratios, key=lambda r: r[0])[1]
        count = sum(set(m.runs) <= set(best.runs) for m in needs)
        assert {c.need for c in chosen[:count]} == {
            m for m in needs if set(m.runs) <= set(best.runs)
        }

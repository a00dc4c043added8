"""The search of learning rates on planted losses: what it asks for, and when it ends."""

import dataclasses
import itertools
import math

import pytest

from analysis.inference import decide
from lorasweep.errors import SpecError
from lorasweep.methods.lora import LoRA
from lorasweep.sweep import search as of_sweep
from lorasweep.sweep.grid import Point
from lorasweep.sweep.question import Search
from lorasweep.sweep.search import LOWEST, check_search, full_runs, next_lrs, search
from tests.world import tiny_spec

HOW, ONE_SEED = Search(), Search(seeds=0)


def start(arm="lora", lr=1e-3, steps=64, **changes):
    return Point(arm, tiny_spec(lr=lr, steps=steps, seed=0, **changes))


def lora(rank, **changes):
    return start(method=LoRA(rank=rank), **changes)


def valley(best, cliff=math.inf):
    return lambda lr: math.inf if lr > cliff * best else 1 + 0.03 * math.log(lr / best) ** 2


def run(starts, world, how=HOW, may_begin=lambda known, new: True, look=lambda _: (False, {})):
    """Train what a search asks for until it asks for no more; every step starts from results alone."""
    losses, batches = {}, []
    while True:
        points = search(starts, how, losses.get, may_begin, look)
        new = [p for p in points if p.id not in losses]
        if not new:
            return points, batches
        assert [p.id for p in points[: len(losses)]] == list(losses)  # it only ever adds runs
        batches.append(new)
        losses |= {p.id: world(p) for p in new}


@pytest.mark.parametrize("best, cliff", [(1e-3, 64), (3e-2, 64), (2e-5, 64), (1e-3, 1.5), (0.2, 2)])
def test_the_range_is_found_from_any_start_and_never_ends_at_an_edge(best, cliff):
    loss = valley(best, cliff)
    points, batches = run([start()], lambda p: loss(p.spec.lr), ONE_SEED)
    full = {p.spec.lr: loss(p.spec.lr) for p in points if p.spec.steps == 64}
    lrs = sorted(full)
    at = lrs.index(min(lrs, key=full.__getitem__))
    assert 0 < at < len(lrs) - 1 and sum(map(math.isfinite, full.values())) >= HOW.n_full
    for k in (at - 1, at + 1):
        assert max(lrs[at] / lrs[k], lrs[k] / lrs[at]) <= 1.1 * HOW.fine
    assert full[lrs[at]] - 1 < 0.03 * math.log(2) ** 2 / 4 + 1e-9  # at most sqrt(2) off
    assert full_runs(points, 64) <= (7 if cliff > 2 else 8)
    assert {p.spec.steps for p in batches[0]} == {8} and len(batches[0]) == HOW.n_short


def test_a_short_run_is_the_beginning_of_a_long_one_counts_once_and_may_have_another_optimum():
    points, _ = run([start()], lambda p: valley(1e-3)(p.spec.lr), ONE_SEED)
    short, full = ([p for p in points if of_sweep.is_short(p, points) == k] for k in (True, False))
    begun = {p.spec.lr for p in short} & {p.spec.lr for p in full}
    assert len(begun) == HOW.n_lrs
    assert full_runs(points, 64) == len(full) + (len(short) - len(begun)) / 8
    best = {64: 1e-3, 8: 1.6e-2}
    points, _ = run([start()], lambda p: valley(best[p.spec.steps])(p.spec.lr), ONE_SEED)
    full = [valley(1e-3)(p.spec.lr) for p in points if p.spec.steps == 64]
    assert min(full) < 1 + 0.03 * math.log(2) ** 2


def test_what_the_analysis_asks_for_is_trained_with_all_seeds_and_a_decision_ends_the_search():
    def look(points):
        seeds = {p.spec.seed for p in points}
        if len(seeds) == 1 and not any(p.spec.lr == 7e-4 for p in points):
            return (False, {points[-1].id: [7e-4, 1.02e-3, 1e3, 1e-9]})
        return (len(seeds) >= 4, {points[-1].id: [1.2e-3]} if len(seeds) == 3 else {})

    points, batches = run([start()], lambda p: valley(1e-3)(p.spec.lr), look=look)
    full = [p for p in points if p.spec.steps == 64]
    asked = [(p.spec.lr, p.spec.seed) for p in full if p.spec.lr in (7e-4, 1.2e-3)]
    assert set(asked) >= {(7e-4, 0), (1.2e-3, 0), (1.2e-3, 1), (1.2e-3, 2)}
    assert not any(p.spec.lr in (1.02e-3, 1e3, 1e-9) for p in full)  # tried nearby, out of range
    assert {p.spec.seed for p in full} == {0, 1, 2, 3} and len(batches[-1]) == HOW.n_lrs


def test_all_arms_get_fresh_seeds_at_their_best_rates_up_to_the_limit():
    starts = [start("lora"), start("other", lr=1e-4, weight_decay=0.1)]
    best = {"lora": 4e-3, "other": 3e-5}
    points, _ = run(starts, lambda p: valley(best[p.arm])(p.spec.lr))
    for arm, seed in itertools.product(best, range(1, HOW.seeds + 1)):
        lrs = sorted(p.spec.lr for p in points if p.arm == arm and p.spec.seed == seed)
        assert len(lrs) == HOW.n_lrs and lrs[0] < best[arm] < lrs[-1]
    assert max(p.spec.seed for p in points) == HOW.seeds


def test_a_search_ends_before_runs_that_the_budget_does_not_allow():
    allowed = {"may_begin": lambda known, new: full_runs([*known, *new], 64) <= 6}
    points, _ = run([start()], lambda p: valley(1e-3)(p.spec.lr), **allowed)
    assert 4 < full_runs(points, 64) <= 6


@pytest.mark.parametrize("world", [lambda lr: math.inf, lambda lr: 1 + lr])
def test_an_arm_that_does_not_train_has_one_full_run_and_another_goes_on(world):
    starts = [start("broken", weight_decay=0.1), start("lora")]

    def loss(p):
        return world(p.spec.lr) if p.arm == "broken" else valley(1e-3)(p.spec.lr)

    alone, _ = run(starts[:1], loss)
    both, _ = run(starts, loss)
    for points in (alone, both):
        mine = [p for p in points if p.arm == "broken"]
        (full,) = [p for p in mine if p.spec.steps == 64]
        assert full.spec.lr == min(p.spec.lr for p in mine) < HOW.wide * LOWEST
    assert {p.spec.seed for p in both} == set(range(HOW.seeds + 1))
    lrs, full = next_lrs(1e-3, {LOWEST * 5: 1.0, LOWEST * 20: 2.0}, {}, HOW)
    assert lrs == [pytest.approx(LOWEST * 1.25)] and not full


def test_a_search_is_about_one_model_and_file_at_a_constant_rate_and_arms_differ_in_rank():
    """Arms that differ in more would be one for the analysis: one's answer would be the other's."""
    check_search([lora(2), lora(4)])
    other = dataclasses.replace(tiny_spec().dataset, name="mine")
    for runs, words in (
        ([lora(2), lora(4, dataset=other)], "one model and one data set.*mine"),
        ([lora(2, schedule="linear")], "schedule=linear.*beginnings of longer ones"),
        ([lora(2), lora(2, batch_size=2)], "arms of lora with rank 2 .*layers"),
    ):
        with pytest.raises(SpecError, match=words):
            check_search(runs)


def test_a_search_with_narrow_steps_ends():
    """Full runs want a higher rate than short ones, and short rates near it were tried in full."""
    losses = {True: valley(4e-3), False: valley(1e-3)}
    world, how = lambda p: losses[p.spec.steps == 64](p.spec.lr), Search(wide=1.4, fine=2)
    points, _ = run([lora(2)], world, how, look=lambda _: (True, {}))
    assert len({p.id for p in points}) == len(points) < 200


@pytest.mark.parametrize("steps, prefix", [(8, 8), (1, 8), (100, 1)])
def test_a_run_too_short_to_have_a_beginning_is_refused(steps, prefix):
    """No run would count as short, and the search would ask for the same ones for ever."""
    with pytest.raises(SpecError, match=f"steps={steps}"):
        run([start(steps=steps)], lambda _: 1.0, Search(prefix=prefix))
    assert of_sweep.MIN_SEEDS == decide.MIN_SEEDS  # the search looks when the analysis judges

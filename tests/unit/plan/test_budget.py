"""Budgets of a search: what is typed, what finished runs used, and what may begin."""

import dataclasses
import os
from pathlib import Path

import pytest

from lorasweep.errors import SpecError
from lorasweep.plan.budget import parse_budget
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point
from tests.world import tiny_spec


def test_a_budget_is_an_amount_with_its_unit():
    for text, amount in (("2h", 7200), ("90min", 5400), ("1.5h", 5400), ("40runs", 40)):
        assert parse_budget(text, 40).amount == amount
    assert parse_budget("", 40) is None
    for text in ("2", "h", "0h", "-1h", "2 days", "1e3runs"):
        with pytest.raises(SpecError, match=r"budget=.*500gpuh"):
            parse_budget(text, 40)


def finished(store, spec, spans, **result):
    """A run with attempts at these times, in seconds."""
    for n, (begin, end) in enumerate(spans, 1):
        store.claim(spec)
        attempt = store.attempt(spec.id, n)
        store.log(spec.id, n, "")
        (attempt / ".partial").symlink_to("a file that was renamed since")
        if n < len(spans):
            store.write_end(spec.id, n, "stopped", "")
        for file in filter(Path.exists, attempt.iterdir()):
            at = begin if file.name == "owner.json" else end
            os.utime(file, (at, at))
    store.finish(spec.id, "done", {"test_nll": 1.0, **result})
    os.utime(store.folder(spec.id) / "result.json", (spans[-1][1],) * 2)
    return Point("lora", spec)


@pytest.fixture
def points(tmp_path):
    store = RunStore(tmp_path)
    store.prepare()
    specs = [tiny_spec(lr=lr, steps=40) for lr in (1e-3, 2e-3, 4e-3)]
    short = finished(store, dataclasses.replace(specs[0], steps=10), [(1000, 1010)])
    together = [finished(store, s, [(1010, 1050)], pack_size=2) for s in specs[:2]]
    resumed = finished(store, specs[2], [(1030, 1060), (5000, 5020)])
    return store, [short, *together, resumed]


def test_time_is_the_union_of_all_attempts_and_packs_share_a_gpu(points):
    store, known = points
    assert parse_budget("1h", 40).used(known, store) == 10 + 50 + 20
    assert parse_budget("1gpuh", 40).used(known, store) == 10 + 40 + 50
    assert parse_budget("9runs", 40).used(known, store) == 3  # a short run counts in the longer one
    # several processes of a run take a GPU each
    store.write_env(known[0].id, 1, {"processes": 4})
    os.utime(next(store.attempt(known[0].id, 1).glob("env*")), (1000, 1000))
    assert parse_budget("1gpuh", 40).used(known[:1], store) == 40


def test_runs_may_begin_if_the_measured_cost_of_such_runs_fits(points):
    store, known = points
    new = [Point("lora", tiny_spec(lr=lr, steps=40)) for lr in (1e-2, 2e-2, 4e-2)]
    # 3 full runs took 80 s, so 3 more take as long
    assert parse_budget("2.67min", 40).allows(new, known, store)
    assert not parse_budget("2.66min", 40).allows(new, known, store)
    assert parse_budget("6runs", 40).allows(new, known, store)
    assert not parse_budget("5.9runs", 40).allows(new, known, store)
    # 10 s for a quarter of a run, so one more takes 40 s
    fits = [parse_budget(t, 40).allows(new[:1], known[:1], store) for t in ("0.83min", "0.84min")]
    assert fits == [False, True]
    store.claim(new[0].spec)  # begun: they go on
    assert parse_budget("1min", 40).allows(new, known, store)
    assert parse_budget("1min", 40).allows(new, [], store)

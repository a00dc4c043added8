"""The file of looks: two processes that add a round at the same time lose none."""

import dataclasses
import json
import multiprocessing

import pytest

from lorasweep.errors import SpecError
from lorasweep.store import looks
from lorasweep.sweep.grid import Point
from tests.world import tiny_spec

SEEDS = (1, 2, 3, 4)
"""Seeds of the added runs; the known run has seed 0."""


def add(path, start, seed):
    known = [Point("lora", tiny_spec())]
    start.wait()
    looks.append(path, [{"like": known[0].id, "lr": 1e-3, "seed": seed}], "hash", known)


def test_rounds_added_at_the_same_time_are_all_recorded(tmp_path):
    path = looks.path_of(tmp_path, "rank-smoke")
    looks.note_look(path, "hash", planned=5)
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(len(SEEDS))
    workers = [fork.Process(target=add, args=(path, start, seed)) for seed in SEEDS]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    rounds = looks.read(path)
    assert [r["round"] for r in rounds] == [2, 3, 4, 5]
    assert {r["runs"][0]["seed"] for r in rounds} == set(SEEDS)
    spec = tiny_spec()
    with pytest.raises(SpecError, match="optional stopping"):
        looks.append(path, [{"like": spec.id, "lr": 1e-3, "seed": 9}], "hash", [Point("a", spec)])


def test_the_first_look_is_recorded_once(tmp_path):
    path = looks.path_of(tmp_path, "rank-smoke")
    looks.note_look(path, "first", planned=2)
    looks.note_look(path, "second", planned=5)
    assert json.loads(path.read_text())["claims_hash"] == "first"
    spec = dataclasses.replace(tiny_spec(), seed=3)
    with pytest.raises(SpecError, match="must not change after a look"):
        looks.append(path, [], "second", [Point("a", spec)])

"""Runs on several data sets share packs where each data set fills little of one."""

import dataclasses

import pytest

from lorasweep.methods.lora import LoRA
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.memory import pack_bytes
from lorasweep.plan.plan import make_plan
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.execution import Exec
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point
from tests.world import tiny_spec

CPU = Hardware("cpu", processor="a processor", cores=2, memory_gib=16.0, fast_bf16=True)


def runs(count, rates=3, lengths=(64,), steps=(8,)):
    """`rates` runs of each of `count` customers."""
    found = []
    for k in range(count):
        rows = {"max_length": lengths[k % len(lengths)], "n_test": 4, "n_test_curve": 4}
        dataset = DatasetSpec(name=f"c{k}", source="jsonl", location=f"c{k}", **rows)
        fixed = {"method": LoRA(rank=4), "batch_size": 4, "steps": steps[k % len(steps)]}
        spec = tiny_spec(dataset=dataset, **fixed)
        found += [Point(f"c{k}", dataclasses.replace(spec, lr=1e-3 * 2**j)) for j in range(rates)]
    return found


def packs_of(points, tmp_path, **settings):
    exec_ = Exec(runs_dir=str(tmp_path), workers=1, **settings)
    return make_plan(points, RunStore(tmp_path), exec_, CPU).packs


def test_customers_with_few_runs_share_packs_and_those_that_fill_one_do_not(tmp_path):
    sizes = [len(p.points) for p in packs_of(runs(10), tmp_path)]
    assert sum(sizes) == 30 and len(sizes) == 2
    alone = packs_of(runs(3, rates=16), tmp_path)
    assert all(len({p.spec.dataset.name for p in pack.points}) == 1 for pack in alone)


def test_neighbours_are_of_one_length_of_rows_and_of_runs(tmp_path):
    points = runs(10, lengths=(64, 48), steps=(8, 8, 8, 40))
    packs = packs_of(points, tmp_path, pack_size=8)
    shapes = [[(p.spec.dataset.max_length, p.spec.steps) for p in pack.points] for pack in packs]
    assert all(shape == sorted(shape) for shape in shapes)
    assert sum(len(set(shape)) for shape in shapes) <= len(packs) + 3


def test_the_memory_of_a_pack_is_that_of_its_longest_rows(tmp_path):
    (pack,) = packs_of(runs(2, rates=2, lengths=(16, 60)), tmp_path, pack_size=8)
    longest = max((p.spec for p in pack.points), key=lambda s: s.dataset.max_length)
    assert pack.memory_bytes == pack_bytes(4, longest, CPU, pack.micro_batch_size)


@pytest.mark.parametrize(
    "other",
    [
        {"batch_size": 2},
        {"precision": "fp64"},
        {"method": LoRA(rank=4, layers="attention")},
        {"objective": "policy_gradient", "group_size": 2, "max_new_tokens": 4},
    ],
)
def test_other_batches_layers_and_sampled_answers_stay_apart(tmp_path, other):
    points, first = runs(2), 0 if "objective" in other else 3
    points[first:] = [Point(p.arm, dataclasses.replace(p.spec, **other)) for p in points[first:]]
    packs = packs_of(points, tmp_path, pack_size=16)
    assert [len(p.points) for p in packs] == [3, 3]

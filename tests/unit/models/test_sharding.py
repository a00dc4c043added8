"""The mesh: who takes which batches, and what the guard refuses. What it computes is held to one
process in tests/integration/test_distributed.py."""

import pytest
import torch

from lorasweep.errors import TrainingError
from lorasweep.models.sharding import Mesh, guard
from lorasweep.train.optim import OneRun


class Three(Mesh):
    """A mesh of three without processes."""

    size = 3

    def gather(self, value):
        return [value, value, self.other(value)]


def test_every_batch_is_taken_once_and_all_take_as_many_turns():
    mine = [list(Three(rank).turns(7)) for rank in range(3)]
    assert mine == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]  # 7 and 8 are repetitions
    assert [Three(rank).share("abcdef") for rank in range(3)] == [[*"ad"], [*"be"], [*"cf"]]
    assert list(Mesh().turns(3)) == [0, 1, 2] and Mesh().share("abc") == [*"abc"]


def test_one_process_needs_no_others():
    mesh, numbers = Mesh(), torch.ones(2)
    mesh.sum_(numbers)
    assert numbers.tolist() == [1, 1] and mesh.broadcast(3) == 3 and mesh.gather(3) == [3]
    assert mesh.any(True) and not mesh.any(False) and mesh.run(max, 1, 2) == 2


def test_the_guard_refuses_a_trained_tensor_that_is_not_split_and_processes_that_differ():
    """The first is what happens to adapters that are attached to a model already split: its loss is
    right, and the gradients are those of one process."""
    model, mesh = torch.nn.Linear(2, 2), Three(devices=object())
    trained = OneRun({"adapter": torch.zeros(2)})
    with pytest.raises(TrainingError, match="adapter is trained but not spread"):
        guard(model, trained, mesh, [])
    mesh.__class__.other = staticmethod(lambda value: (value[0], [1.5]))
    with pytest.raises(TrainingError, match="differ in losses or gradients"):
        guard(model, OneRun({}), mesh, [1.0])
    mesh.__class__.other = staticmethod(lambda value: ({**value[0], "bias": (0.0, 1.0)}, value[1]))
    with pytest.raises(TrainingError, match="differ in bias"):
        guard(model, OneRun({}), mesh, [1.0])
    mesh.__class__.other = staticmethod(lambda value: value)
    guard(model, OneRun({}), mesh, [1.0, float("nan")])

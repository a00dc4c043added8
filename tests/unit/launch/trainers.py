"""A trainer that trains nothing, and a short way to train packs with it."""

import os
import signal

import torch

from lorasweep.launch.pack import execute
from lorasweep.launch.process import StopFlag
from lorasweep.spec.execution import Exec
from lorasweep.train.events import Event


class Scripted:
    """Trains `steps` updates; `before(step, pack, exec_)` is called before each, and may raise.

    `tried`: (runs, rows, forward_parts, first step) of each attempt. `updates`: run id -> steps.
    """

    def __init__(self, steps, before=lambda step, pack, exec_: None):
        self.steps, self.before, self.tried, self.updates = steps, before, [], {}

    def __call__(self, pack, exec_, resume):
        first = resume[pack[0].id]["meta"]["step"] if resume else 0
        self.tried.append((len(pack), exec_.micro_batch_size, exec_.forward_parts, first))
        ids = [s.id for s in pack]
        for step in range(first + 1, self.steps + 1):
            self.before(step, pack, exec_)
            for i in ids:
                self.updates.setdefault(i, []).append(step)
            ended = {i: ("done", {"test_nll": 1.0}) for i in ids} if step == self.steps else {}

            def snapshot(step=step, ids=tuple(ids)):
                tensors = {"param/w": torch.full((3,), float(step))}
                return {i: {"tensors": tensors, "meta": {"step": step}} for i in ids}

            event = Event(step, {i: {"step": step} for i in ids}, ended, snapshot)
            yield event
            ids = [i for i in ids if i not in event.dropped]


def train(store, specs, trainer, rows=None, stop=None, limits=None, report=None, **settings):
    """Train a pack, without checkpoints unless `settings` of Exec say so; return its events."""
    events = []
    exec_ = Exec(**{"checkpoint_s": 1e9, **settings})
    stop, report = stop or StopFlag(), report or events.append
    execute(specs, exec_, store, trainer, report, stop, rows, limits)
    return events


def steps_of(store, rid):
    return [record["step"] for record in store.records(rid)]


one_update = Scripted(1)
"""For worker processes, which import their trainer by name."""


def __getattr__(name):
    """The trainer `killed` ends its worker before that has claimed a run."""
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise AttributeError(name)

"""Train small packs in tests, and say how far two states may differ on any processor.

Processors add up in different orders, so two ways to compute one number differ in the last digits,
and training lets differences grow: in float64 to 1e-13 after ten updates, to 1e-6 after forty at
1e-2. So two runs are held equal over at most ten updates (`ROUNDING`), on the same weights and on
weights `moved` by one unit in the last place, which stand for another processor. A longer run is
held to the difference that moved weights make to it (`far_apart`).
"""

import copy
import dataclasses

import torch

from lorasweep.launch.trainer import finetune
from lorasweep.models.targets import find_targets
from lorasweep.spec.streams import stream

ROUNDING = {1: 1e-12, 10: 1e-10}
"""Updates: how far two float64 runs may be apart after as many, relative to each tensor's scale."""


EPS = 1e-3
"""Adam's eps in such runs. An update is lr * m / (sqrt(v) + eps), so at 1e-8 a gradient entry that is
zero but for rounding (1e-17) moves its weight by 1e-9 of the others' change, or by as much as they."""


def copied(snapshot):
    """A snapshot that later updates do not change."""
    return {
        i: {
            "tensors": {n: t.clone() for n, t in s["tensors"].items()},
            "meta": copy.deepcopy(s["meta"]),
        }
        for i, s in snapshot.items()
    }


def run(pack, base, rows, **kwargs):
    """Train to the end; the last state of each member, and its records."""
    states, records = {}, {}
    for event in finetune(pack, base, rows, **kwargs):
        if event.ended:
            states |= copied(event.snapshot())
        for i, record in event.records.items():
            records.setdefault(i, []).append(record)
    return states, records


def state_at(step, pack, base, rows):
    """The states of a pack after `step` updates."""
    for event in finetune(pack, base, rows):
        if event.step == step:
            return copied(event.snapshot())
    raise AssertionError(f"the pack ended before update {step}")


def moved(base, seed=0):
    """A copy of a base (or of a model) whose weights each lie one unit in the last place higher or
    lower, at random."""
    if not isinstance(base, torch.nn.Module):
        return dataclasses.replace(base, model=moved(base.model, seed), at_start={})
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name, p in model.named_parameters():
            up = torch.from_numpy(stream("moved", seed, name).random(tuple(p.shape)) < 0.5)
            to = torch.where(up, torch.inf, -torch.inf).to(p)
            p.copy_(torch.nextafter(p, to))
    return model


def worst(a, b):
    """The largest difference between two members' tensors (weights and moments), each relative to
    the largest entry of its tensor."""
    assert a["tensors"].keys() == b["tensors"].keys()
    return max(apart(a["tensors"][n].cpu(), t.cpu()) for n, t in b["tensors"].items())


def apart(a, b):
    """The largest difference between two tensors, relative to the largest entry."""
    a, b = a.detach(), b.detach()
    difference = float((a - b).abs().max())
    return difference and difference / float(b.abs().max())


def attached(method, model, shape, seed=0):
    """One member of `method` on the model: its Trainables."""
    targets = find_targets(model, shape, method.target_layers())
    return method.attach(model, targets, [method], [seed])

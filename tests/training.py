"""Train small packs in tests: the last state of each member, its records, and how far two states are."""

import copy

from lorasweep.models.targets import find_targets
from lorasweep.train.finetune import finetune


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


def worst(a, b):
    """The largest difference between two members' tensors (weights and moments)."""
    assert a["tensors"].keys() == b["tensors"].keys()
    return max(
        float((a["tensors"][n].cpu() - t.cpu()).abs().max()) for n, t in b["tensors"].items()
    )


def attached(method, model, shape, seed=0):
    """One member of `method` on the model: its Trainables."""
    targets = find_targets(model, shape, method.target_layers())
    return method.attach(model, targets, [method], [seed])

"""Trainers that tests put in place of the real one, by name. They learn nothing and load no model.

`steps` moves a small state by a map that forgets nothing: a step that is lost, doubled or resumed
from another state shows in every later record. The state goes through the real checkpoints.
"""

import os
import time
from pathlib import Path

import numpy as np

from lorasweep.train.events import Event

GO = "go"
"""File in the run folder that `held` waits for."""
FREE_STEPS = 60
PAUSE_S = 0.4


def steps(pack, exec_, resume):
    yield from _train(pack, resume)


def held(pack, exec_, resume):
    """Train, but beyond FREE_STEPS slowly until the run folder holds GO: no machine ends earlier."""
    yield from _train(pack, resume, Path(exec_.runs_dir, GO), PAUSE_S, FREE_STEPS)


def slow(pack, exec_, resume):
    """Train slowly, each pack at another pace, until the run folder holds GO."""
    pace = 0.02 * (1 + int(pack[0].id, 16) % 10)
    yield from _train(pack, resume, Path(exec_.runs_dir, GO), pace)


def broken(pack, exec_, resume):
    raise RuntimeError("broken on purpose")


def hungry(pack, exec_, resume):
    """Take 600 MiB; in a job of less, wait there to be killed for it."""
    taken = bytearray(b"x" * (600 << 20))
    while int(os.environ["SLURM_MEM_PER_NODE"]) << 20 < len(taken):
        time.sleep(0.5)
    yield from steps(pack, exec_, resume)


def _train(pack, resume, go=None, pause_s=0.0, free_steps=0):
    """Train; steps beyond the free ones are slow until the file `go` is there."""
    ids = [spec.id for spec in pack]
    last = {i: spec.steps for i, spec in zip(ids, pack)}
    states = {i: _start(i, resume and resume[i]) for i in ids}
    step = resume[ids[0]]["meta"]["step"] if resume else 0
    while ids:
        step += 1
        if go is not None and step > free_steps and not go.exists():
            time.sleep(pause_s)
        for i in ids:
            _move(states[i], step)
        records = {i: {"step": step, "train_nll": float(states[i]["x"].mean())} for i in ids}
        ended = {i: ("done", _final(states[i], step, records[i])) for i in ids if step == last[i]}
        yield Event(step, records, ended, lambda: {i: _save(states[i], step) for i in ids})
        ids = [i for i in ids if i not in ended]


def _start(rid, saved):
    if not saved:
        return {"x": np.random.default_rng(int(rid, 16)).random(8), "m": np.zeros(8), "total": 0.0}
    state = {k: v.numpy().copy() for k, v in saved["tensors"].items()}
    return {**state, "total": saved["meta"]["total"]}


def _move(state, step):
    """Make one step of eight logistic maps in chaos, pushed by a momentum, the step and a total."""
    state["m"] = 0.9 * state["m"] + 0.1 * state["x"]
    push = 0.01 * state["m"] + 0.001 * (step % 7) + 0.001 * (state["total"] % 1)
    state["x"] = 3.7 * state["x"] * (1 - state["x"]) * (1 - push)
    state["total"] += float(state["x"].sum())


def _save(state, step):
    import torch  # not before a checkpoint is due: most jobs of tests start without it

    tensors = {k: torch.from_numpy(state[k].copy()) for k in ("x", "m")}
    return {"tensors": tensors, "meta": {"step": step, "total": state["total"]}}


def _final(state, step, record):
    nll = record["train_nll"]
    curve = [{"step": step, "examples": step, "tokens": step, "test_nll": nll}]
    losses = {"nll_start": 3.0, "test_nll": nll, "train_nll": nll, "floor_nats": None}
    trained = {"steps_done": step, "tokens": step, "base_sha256": "none", "data_sha256": "none"}
    return {**losses, **trained, "curve": curve}

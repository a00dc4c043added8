"""A run folder, owners of runs, and processes that work at the same time."""

import json
import multiprocessing

import pytest
import torch

from lorasweep.store import checkpoint
from lorasweep.store.run_store import RunStore


def save(folder, *steps):
    """Write checkpoints of one run."""
    for step in steps:
        meta = {"step": step, "layout": ["x"], "records_size": 0}
        tensors = {"param/w": torch.full((3,), float(step))}
        checkpoint.save(folder, {"tensors": tensors, "meta": meta})


def at_once(count, do):
    """Call do(k) in `count` processes that live until all have returned; return what they return."""
    fork = multiprocessing.get_context("fork")
    start, end, out = fork.Barrier(count), fork.Barrier(count), fork.Queue()

    def work(k):
        start.wait()
        out.put(do(k))
        end.wait()

    processes = [fork.Process(target=work, args=(k,), daemon=True) for k in range(count)]
    for p in processes:
        p.start()
    found = [out.get(timeout=60) for _ in processes]
    for p in processes:
        p.join()
    return found


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "runs")


@pytest.fixture
def change_owner(store):
    """`change_owner(rid, **fields)` changes the recorded owner of a run's last attempt."""

    def change(rid, **fields):
        path = store.attempt(rid, store.last_attempt(rid)) / "owner.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change

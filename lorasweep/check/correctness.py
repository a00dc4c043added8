"""Part 2 of action=check_gpu: what must hold on every card. The tests call these functions, too.

Every function returns {"difference", "bound", ...}; the check passes if difference <= bound.
"""

import os
import resource
import signal
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorasweep.check.speed import device
from lorasweep.data import load as data_sets
from lorasweep.launch import local
from lorasweep.launch.trainer import TorchTrainer, finetune
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.models.load import Base
from lorasweep.plan import detect
from lorasweep.plan.planner import place
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point
from lorasweep.train.events import Event

EPS = 1e-3
"""Adam's eps, so that a gradient that is zero except for rounding moves no weight."""
UPDATE_BOUND = 1e-10
"""Largest difference of trained weights after an update in float64, relative to the tensor's
largest weight. Two orders of adding up differ by 1e-15 to 1e-12 (docs/log)."""
PACK_STEPS, PACK_BOUND = 10, {"fp64": 1e-9, "fp32": 1e-4, "bf16": 0.02}
"""Updates, and the largest difference in nats of a held-out loss after them."""
RESUME_BOUND = 1e-4
"""The same between a run that was interrupted and one that was not. On a CPU they are equal; on a
GPU some sums have no fixed order."""
SHARES = (0.5, 0.25, 0.12)
"""Shares of the memory that the plan expects for the rows of a batch: what `little_memory` has."""
ROOM = "LORASWEEP_CHECK_ROOM"
"""Environment variable: bytes that `few_bytes` leaves to a worker."""


def update_as_on_cpu(spec: RunSpec, there: torch.device | None = None) -> dict[str, Any]:
    """Compare one float64 update on the device, row by row, with one on the CPU of all rows."""
    spec = replace(spec, precision="fp64", steps=1, eps=EPS)
    data, found = data_sets.load(spec.dataset, []), []
    for where, rows in (("cpu", None), (there or device(), 1)):
        base = models.load(spec.model, [], "fp64")
        base.model.to(where)
        (event,) = finetune([spec], base, data, rows)
        tensors = event.snapshot()[spec.id]["tensors"]
        found.append({name: t.detach().cpu() for name, t in tensors.items()})
    differences = ((found[1][name] - t).abs().max() / t.abs().max() for name, t in found[0].items())
    return {"difference": max(d.nan_to_num().item() for d in differences), "bound": UPDATE_BOUND}


def pack(spec: RunSpec, n_runs: int = 4) -> dict[str, Any]:
    """Compare LoRA runs of ranks 1 to 16 in one pack with each of them alone."""
    runs = [
        replace(spec, lr=1e-3 * (1 + k), steps=PACK_STEPS, method=LoRA(rank=(1, 4, 8, 16)[k]))
        for k in range(n_runs)
    ]
    data = data_sets.load(spec.dataset, [])
    base = models.load(spec.model, [], spec.precision)
    together = _losses(runs, base, data)
    alone = {i: loss for run in runs for i, loss in _losses([run], base, data).items()}
    difference = max(abs(together[i] - alone[i]) for i in alone)
    fall = max(base.at_start[k]["test_nll"] for k in base.at_start) - min(alone.values())
    return {"difference": difference, "bound": PACK_BOUND[spec.precision], "loss_fell_by": fall}


def _losses(runs: Sequence[RunSpec], base: Base, data: Any) -> dict[str, float]:
    ended = (event.ended for event in finetune(runs, base, data))
    return {i: result["test_nll"] for some in ended for i, (_, result) in some.items()}


# ---------------------------------------------------------------- workers


def killed_and_resumed(spec: RunSpec) -> dict[str, Any]:
    """Kill a worker by SIGKILL, train on from its checkpoint; compare with a run in one go."""
    spec, exec_ = replace(spec, steps=12), Exec(checkpoint_s=0.0, workers=1)
    whole = _in_one_go(spec)
    again, env = _trained(spec, exec_, f"{__name__}:kill_once")
    if not env["resumed_from_step"]:
        raise RuntimeError("the run did not resume from a checkpoint")
    return {"difference": abs(again - whole), "bound": RESUME_BOUND}


def little_memory(spec: RunSpec) -> dict[str, Any]:
    """Train with memory for some of a batch's rows; compare with a run with enough memory."""
    spec, hardware = replace(spec, steps=3, batch_size=256), detect.this_machine()
    sizes = (spec.batch_size, 1)
    most, least = (place(spec, hardware, rows=rows).memory_bytes for rows in sizes)
    exec_ = Exec(workers=1, micro_batch_size=spec.batch_size)
    whole = _in_one_go(spec)
    for share in SHARES:  # the plan's estimate may be too high
        os.environ[ROOM] = str(int(share * (most - least)))
        less, env = _trained(spec, exec_, f"{__name__}:few_bytes")
        if env["micro_batch_size"] < spec.batch_size:
            return {"difference": abs(less - whole), "bound": RESUME_BOUND}
    raise RuntimeError("the memory did not run out, so nothing was checked")


def _in_one_go(spec: RunSpec) -> float:
    base = models.load(spec.model, [], spec.precision)
    return _losses([spec], base, data_sets.load(spec.dataset, []))[spec.id]


def _trained(spec: RunSpec, exec_: Exec, trainer: str) -> tuple[float, dict[str, Any]]:
    """Train a run in worker processes; return its loss and the facts about its last attempt."""
    with tempfile.TemporaryDirectory() as folder:
        store = RunStore(folder)
        store.prepare()
        points = [Point(spec.method.name, spec)]
        local.run_points(points, store, replace(exec_, runs_dir=folder), lambda _: None, trainer)
        result = store.result(spec.id)
        if result is None:
            raise RuntimeError(f"the run failed: {store.failure(spec.id)}")
        return result["test_nll"], store.env(spec.id)


def kill_once(pack: list[RunSpec], exec_: Exec, resume: Any) -> Iterator[Event]:
    """Train (a Trainer); kill the process after update 8, unless it has resumed."""
    for event in TorchTrainer()(pack, exec_, resume):
        yield event
        if resume is None and event.step == 8:
            os.kill(os.getpid(), signal.SIGKILL)


def few_bytes(pack: list[RunSpec], exec_: Exec, resume: Any) -> Iterator[Event]:
    """Train (a Trainer) with ROOM bytes of memory beyond those of the base."""
    trainer, room = TorchTrainer(), int(os.environ[ROOM])
    trainer.data(pack[0], exec_)  # loads the base
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
    else:
        status = Path("/proc/self/status").read_text().splitlines()
        data = int(next(s for s in status if s.startswith("VmData")).split()[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (data + room, resource.RLIM_INFINITY))
    yield from trainer(pack, exec_, resume)

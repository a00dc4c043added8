"""The measurements of action=check_gpu: the card, what must hold on every card, updates, sampling.

Speed is measured with random weights, so nothing is downloaded. A check of correctness returns
{"difference", "bound", ...}, and passes if difference <= bound; the tests call these, too.
"""

import math
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lorasweep.data import splits as data_sets
from lorasweep.data.examples import Data, Example, Rewards, answer_of
from lorasweep.launch import local
from lorasweep.launch.out_of_memory import free_memory
from lorasweep.launch.torch_trainer import TorchTrainer, finetune
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.models.load import Base, empty_model
from lorasweep.models.sharding import compute_again
from lorasweep.plan import detect
from lorasweep.plan.planner import place
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.spec.streams import stream
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point
from lorasweep.train.events import Event

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
PRODUCTS = ((8192, 8192, 8192), (16384, 4096, 4096), (16384, 4096, 14336), (4096, 16384, 4096))
"""Shapes of the matrix products; the best one counts."""
WARM, STEPS = 2, 3
"""Updates before those that are timed, and number of those."""
EPS = 1e-3
"""Adam's eps, so that a gradient that is zero except for rounding moves no weight."""
UPDATE_BOUND = 1e-10
"""Largest difference of trained weights after an update in float64, relative to the tensor's
largest weight. Two orders of adding up differ by 1e-15 to 1e-12 (docs/log/2026-11-28.md); with
each result off by 64 units in the last place 1e-11, and one in float32 moves it by 5e-7 or more."""
PACK_STEPS, PACK_BOUND = 10, {"fp64": 1e-9, "fp32": 1e-4, "bf16": 0.02}
"""Updates, and the largest difference in nats of a held-out loss after them."""
MEMORY_BOUND = 1e-4
"""The same between a run with little memory and one with enough."""
ROOM = "LORASWEEP_CHECK_ROOM"
"""Environment variable: bytes that `few_bytes` leaves to a worker."""


def device() -> torch.device:
    """Return the first GPU, or without one the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---------------------------------------------------------------- the card


def node() -> dict[str, Any]:
    """Describe the machine and measure its speeds; RuntimeError if torch cannot use the GPU."""
    there, machine = device(), detect.this_machine()
    small = not machine.gpus
    if there.type != "cuda" and not small:
        raise RuntimeError(
            f"torch {torch.__version__} (for CUDA {torch.version.cuda}) cannot use the GPU "
            f"{machine.gpu_name}. Install a torch for the driver of this node."
        )
    packages = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    x, n = torch.zeros(2**22 if small else 2**28, device=there), 1000
    y, few = torch.empty_like(x), torch.zeros(8, device=there)
    speeds: dict[str, float | None] = {}
    for precision, dtype in DTYPES.items():
        best = 0.0
        for a, b, c in ((512, 512, 512),) if small else PRODUCTS:
            with suppress(RuntimeError):  # a card without this precision, or little memory
                p, q = (torch.randn(*s, device=there).to(dtype) for s in ((a, b), (b, c)))
                best = max(best, 2 * a * b * c / _shortest_s(lambda p=p, q=q: p @ q))  # type: ignore[misc]
        speeds[precision] = best or None
    rows, heads, length, size = (2, 2, 64, 16) if small else (4, 32, 2048, 128)
    shape: Any = {"size": (rows, heads, length, size), "device": there, "dtype": torch.bfloat16}
    qkv, gradient = (
        [torch.randn(**shape, requires_grad=True) for _ in range(3)],
        torch.ones(**shape),
    )

    def attend() -> None:
        out = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        torch.autograd.grad(out, qkv, gradient)

    # the plan's count: 2 operations forward and 5 backward, half of the scores are masked
    flops = 7 * heads * size * length * rows * length
    return {
        "name": machine.gpu_name or machine.processor,
        "gpus": machine.gpus,
        "memory_gib": machine.worker_gib,
        "software": {
            "python": platform.python_version(),
            **{name: packages.get(name) for name in ("torch", "transformers", "peft", "triton")},
            **{"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()},
        },
        "matmul_flops_s": speeds,
        "bandwidth_bytes_s": 8 * x.numel() / _shortest_s(lambda: y.copy_(x)),  # read and written
        "attention": {"flops_s": flops / _shortest_s(attend)},
        "launch_s": _shortest_s(lambda: [few.add_(1.0) for _ in range(n)]) / n,
    }


def _shortest_s(do: Callable[[], object], repeats: int = 10) -> float:
    """Return the shortest time of a call, after one that warms up."""
    best, since = math.inf, time.perf_counter()
    for k in range(repeats + 1):
        started = time.perf_counter()
        do()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if k:
            best = min(best, time.perf_counter() - started)
            if time.perf_counter() - since > 2:  # long enough without a repetition
                break
    return best


# ---------------------------------------------------------------- correctness


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


def little_memory(spec: RunSpec) -> dict[str, Any]:
    """Train with memory for some of a batch's rows; compare with a run with enough memory."""
    spec, hardware = replace(spec, steps=3, batch_size=256), detect.this_machine()
    sizes = (spec.batch_size, 1)
    most, least = (place(spec, hardware, rows=rows).memory_bytes for rows in sizes)
    base = models.load(spec.model, [], spec.precision)
    whole = _losses([spec], base, data_sets.load(spec.dataset, []))[spec.id]
    for share in (0.5, 0.25, 0.12):  # of the plan's estimate, which may be too high
        os.environ[ROOM] = str(int(share * (most - least)))
        with tempfile.TemporaryDirectory() as folder:
            store = RunStore(folder)
            store.prepare()
            exec_ = Exec(workers=1, micro_batch_size=spec.batch_size, runs_dir=folder)
            points, trainer = [Point(spec.method.name, spec)], f"{__name__}:few_bytes"
            local.run_points(points, store, exec_, lambda _: None, trainer)
            result = store.result(spec.id)
            if result is None:
                raise RuntimeError(f"the run failed: {store.failure(spec.id)}")
            if store.env(spec.id)["micro_batch_size"] < spec.batch_size:
                return {"difference": abs(result["test_nll"] - whole), "bound": MEMORY_BOUND}
    raise RuntimeError("the memory did not run out, so nothing was checked")


def few_bytes(pack: list[RunSpec], exec_: Exec, resume: Any) -> Iterator[Event]:
    """Train (a Trainer) with ROOM bytes of memory beyond those of the base."""
    trainer, room = TorchTrainer(), int(os.environ[ROOM])
    if not torch.cuda.is_available():  # a second try loads the base without the first one's limit
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
    trainer.data(pack[0], exec_)  # loads the base
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
    else:
        limit = int(_status("VmData") * 1024) + room
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    yield from trainer(pack, exec_, resume)


def _status(name: str) -> int:
    """Return a number of KiB that Linux counts for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


# ---------------------------------------------------------------- updates and sampling


def step(
    kept: dict[str, Any], spec: RunSpec, n_runs: int, predicted: dict[str, Any]
) -> dict[str, Any]:
    """Measure the updates of a pack in the plan's layout: seconds, tokens a second, and memory.

    `kept` holds the base of the last case, which is used if it is the same.
    """
    key = (spec.model, spec.precision, predicted["checkpointing"])
    if kept.get("key") != key:
        kept.clear()
        free_memory()
        with torch.device("meta"):
            config = empty_model(spec.model).config
        config.max_position_embeddings = 8192
        model = models.without_weights(config, spec.model, spec.precision)
        model = model.to_empty(device=device())
        model.tie_weights()
        generator = torch.Generator(device()).manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():  # those of one dimension are norms
                p.normal_(0, 0.02, generator=generator) if p.dim() > 1 else p.fill_(1)
        for module in model.modules():
            if hasattr(module, "inv_freq"):  # a buffer that is computed, not loaded
                module.inv_freq = type(module)(config=model.config).inv_freq.to(device())
        if predicted["checkpointing"]:
            compute_again(model)
        kept |= {"key": key, "base": Base(model, None, "random")}
    runs = [replace(spec, lr=spec.lr * (1 + k), steps=WARM + STEPS + 1) for k in range(n_runs)]
    sampling, rewards = bool(spec.max_new_tokens), None
    length = spec.dataset.max_length - sampling * (spec.max_new_tokens - 1)
    bears = np.arange(length) >= (length - 1 if sampling else 1)  # in sampling: an answer

    def rows(seed: int, start: int, count: int) -> list[Example]:
        drawn = (stream("random_tokens", seed, start + k) for k in range(count))
        tokens = (rng.integers(0, spec.model.vocab_size, size=length) for rng in drawn)
        return [Example(t.astype(np.int32), bears) for t in tokens]

    if sampling:  # completions that end with an odd sum are rewarded

        def reward(pairs: Any) -> list[float | None]:
            right = (bool(a.sum() % 2) or a.tolist() == answer_of(row).tolist() for row, a in pairs)
            return [float(is_right) for is_right in right]

        rewards = Rewards(reward, ((spec.model.vocab_size,),))
    data = Data(rows, rows(-1, 0, 4 if sampling else 1), None, rewards=rewards)
    free_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # Linux: the process's peak becomes its present memory
            Path("/proc/self/clear_refs").write_text("5")
    events: Any = finetune(runs, kept["base"], data, predicted["rows"])
    # all updates but the last, after which weights are analysed
    records = [event.records[runs[0].id] for event in islice(events, WARM + STEPS)][WARM:]
    events.close()
    tokens_s = "sampled_tokens" if sampling else "tokens"
    names = {"step_s": "step_s", f"{tokens_s}_s": f"{tokens_s}_per_s"}
    medians = {key: statistics.median(r[name] for r in records) for key, name in names.items()}
    if torch.cuda.is_available():  # with CUDA's own memory
        free, total = torch.cuda.mem_get_info()
        peak = total - free - torch.cuda.memory_reserved() + torch.cuda.max_memory_reserved()
    else:
        peak = _status("VmHWM") * 1024
    return {**medians, "step_s": n_runs * medians["step_s"], "memory_gib": peak / 2**30}

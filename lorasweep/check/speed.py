"""Parts 1 and 3 to 5 of action=check_gpu: the card, and time and memory of updates and sampling.

The weights are random, so nothing is downloaded.
"""

import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorasweep.data.examples import Data, Example, Rewards, answer_of
from lorasweep.launch.out_of_memory import free_memory
from lorasweep.launch.trainer import finetune
from lorasweep.models.load import Base, config_of, without_weights
from lorasweep.models.sharding import compute_again
from lorasweep.plan import detect
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import RunSpec
from lorasweep.spec.streams import stream

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "plain": SDPBackend.MATH,
}
PRODUCTS = ((8192, 8192, 8192), (16384, 4096, 4096), (16384, 4096, 14336), (4096, 16384, 4096))
"""Shapes of the matrix products; the best one counts."""
LONG_S = 2.0
"""Seconds after which a measurement is not repeated."""
WARM, STEPS = 2, 3
"""Updates before those that are timed, and number of those."""
SCALE = 0.02
"""Standard deviation of random weights."""


def device() -> torch.device:
    """Return the first GPU, or without one the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---------------------------------------------------------------- the card


def node(small: bool) -> dict[str, Any]:
    """Describe the machine and measure its speeds; `small`: for a CPU.

    Raises RuntimeError if torch cannot use the GPU.
    """
    there, machine = device(), detect.this_machine()
    if there.type != "cuda" and not small:
        raise RuntimeError(
            f"torch {torch.__version__} (for CUDA {torch.version.cuda}) cannot use the GPU "
            f"{machine.gpu_name}. Install a torch for the driver of this node."
        )
    x, n = torch.zeros(2**22 if small else 2**28, device=there), 1000
    y, few = torch.empty_like(x), torch.zeros(8, device=there)
    return {
        "name": machine.gpu_name or machine.processor,
        "gpus": machine.gpus,
        "memory_gib": machine.worker_gib,
        "software": _software(),
        "matmul_flops_s": {p: _product_flops_s(p, small, there) for p in DTYPES},
        "bandwidth_bytes_s": 8 * x.numel() / _shortest_s(lambda: y.copy_(x)),  # read and written
        "attention": _attention(small, there),
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
            if time.perf_counter() - since > LONG_S:
                break
    return best


def _software() -> dict[str, Any]:
    driver = None
    with suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        driver = done.stdout.split("\n")[0].strip()
    packages = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {
        "python": platform.python_version(),
        **{name: packages.get(name) for name in ("torch", "transformers", "peft", "triton")},
        **{"CUDA": torch.version.cuda, "driver": driver, "cuDNN": torch.backends.cudnn.version()},
    }


def _product_flops_s(precision: str, small: bool, there: torch.device) -> float | None:
    """Return the operations per second of the best product; None: not on this device."""
    best = 0.0
    for m, k, n in ((512, 512, 512),) if small else PRODUCTS:
        with suppress(RuntimeError):  # a card without this precision, or little memory
            a, b = (torch.randn(*s, device=there).to(DTYPES[precision]) for s in ((m, k), (k, n)))
            best = max(best, 2 * m * k * n / _shortest_s(lambda a=a, b=b: a @ b))  # type: ignore[misc]
    return best or None


def _attention(small: bool, there: torch.device) -> dict[str, Any]:
    """Time the kernels of causal attention, forward and backward, and the one that torch takes."""
    rows, heads, length, size = (2, 2, 64, 16) if small else (4, 32, 2048, 128)
    as_shape: Any = {"size": (rows, heads, length, size), "device": there, "dtype": torch.bfloat16}
    q, k, v = (torch.randn(**as_shape, requires_grad=True) for _ in range(3))
    gradient = torch.ones(**as_shape)
    # the plan's count: 2 operations forward and 5 backward, half of the scores are masked
    flops = 7 * heads * size * length * rows * length

    def both() -> None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(out, (q, k, v), gradient)

    speeds: dict[str, float | None] = dict.fromkeys(KERNELS)
    for name, kernel in KERNELS.items():
        with suppress(RuntimeError), sdpa_kernel(kernel):
            speeds[name] = flops / _shortest_s(both)
    return {"flops_s": flops / _shortest_s(both), "kernels": speeds}


# ---------------------------------------------------------------- updates and sampling


def step(
    kept: dict[str, Any],
    spec: RunSpec,
    n_runs: int,
    predicted: dict[str, Any],
    ragged: bool = False,
    join_rows: bool = False,
    compile: bool = False,
) -> dict[str, Any]:
    """Measure the updates of a pack in the plan's layout: seconds, tokens a second, and memory.

    Args:
        kept: holds the base of the last case, which is used if it is the same.
        ragged: rows of a quarter to all of the longest length.
    """
    base = _base(kept, spec.model, spec.precision, predicted["checkpointing"], compile)
    runs = [replace(spec, lr=spec.lr * (1 + k), steps=WARM + STEPS + 1) for k in range(n_runs)]
    rows, rewards, held_out = _rows(spec, ragged), None, 1
    if spec.max_new_tokens:  # completions that end with an odd sum are rewarded
        rows = _rows(spec, answer=1, length=spec.dataset.max_length - spec.max_new_tokens + 1)

        def reward(pairs: Any) -> list[float | None]:
            right = (bool(a.sum() % 2) or a.tolist() == answer_of(row).tolist() for row, a in pairs)
            return [float(is_right) for is_right in right]

        rewards, held_out = Rewards(reward, ((spec.model.vocab_size,),)), 4
    data = Data(rows, rows(-1, 0, held_out), None, rewards=rewards)
    _reset_peak()
    events: Any = finetune(runs, base, data, predicted["rows"], None, join_rows)
    # all updates but the last, after which weights are analysed
    records = [event.records[runs[0].id] for event in islice(events, WARM + STEPS)][WARM:]
    events.close()
    names = {"step_s": "step_s", "tokens_s": "tokens_per_s"}
    if spec.max_new_tokens:
        names = {"step_s": "step_s", "sampled_tokens_s": "sampled_tokens_per_s"}
    medians = {key: statistics.median(r[name] for r in records) for key, name in names.items()}
    return {**medians, "step_s": n_runs * medians["step_s"], "memory_gib": _peak_gib()}


def _base(
    kept: dict[str, Any], spec: ModelSpec, precision: str, checkpointing: bool, compiled: bool
) -> Base:
    """Return a base of a model's shape with random weights, as the trainer prepares one."""
    key = (spec, precision, checkpointing, compiled)
    if kept.get("key") == key:
        return kept["base"]
    kept.clear()
    free_memory()
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = config_of(spec, max_position_embeddings=8192, rope_parameters=rope, **tokens)
    model = without_weights(config, spec, precision).to_empty(device=device())
    model.tie_weights()
    generator = torch.Generator(device()).manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():  # those of one dimension are norms
            p.normal_(0, SCALE, generator=generator) if p.dim() > 1 else p.fill_(1)
    for module in model.modules():
        if hasattr(module, "inv_freq"):  # a buffer that is computed, not loaded
            module.inv_freq = type(module)(config=model.config).inv_freq.to(device())
    if checkpointing:
        compute_again(model)
    if compiled:  # on a CPU compiling takes minutes, so there only the capture is checked
        backend = "inductor" if device().type == "cuda" else "eager"
        model.base_model.compile(dynamic=True, backend=backend)
    kept |= {"key": key, "base": Base(model, None, "random")}
    return kept["base"]


def _rows(spec: RunSpec, ragged: bool = False, answer: int = 0, length: int = 0) -> Any:
    """Return a function that draws rows of random tokens; the last `answer` tokens bear loss.

    answer=0: all but the first. length=0: dataset.max_length.
    """
    longest = length or spec.dataset.max_length

    def row(rng: np.random.Generator) -> Example:
        n = int(rng.integers(longest // 4, longest + 1)) if ragged else longest
        tokens = rng.integers(0, spec.model.vocab_size, size=n).astype(np.int32)
        return Example(tokens, np.arange(n) >= (n - answer if answer else 1))

    def rows(seed: int, start: int, count: int) -> list[Example]:
        return [row(stream("random_tokens", seed, start + k)) for k in range(count)]

    return rows


def _reset_peak() -> None:
    free_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # Linux: the process's peak becomes its present memory
            Path("/proc/self/clear_refs").write_text("5")


def _peak_gib() -> float:
    """Return the memory of this process at the peak: on a GPU with CUDA's own memory."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        context = total - free - torch.cuda.memory_reserved()
        return (context + torch.cuda.max_memory_reserved()) / 2**30
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(s for s in status if s.startswith("VmHWM")).split()[1]) / 2**20

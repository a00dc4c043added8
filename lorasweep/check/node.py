"""Part 1 of action=check_gpu: the card, its software, and its speeds.

Shapes: R rows, T tokens, H heads, d head size.
"""

import math
import platform
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata, util
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorasweep.plan import detect

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "plain": SDPBackend.MATH,
}
PRODUCTS = ((8192, 8192, 8192), (16384, 4096, 4096), (16384, 4096, 14336), (4096, 16384, 4096))
"""Shapes of the matrix products; the best one counts."""
SMALL_PRODUCTS = ((512, 512, 512),)
LONG_S = 2.0
"""Seconds after which a measurement is not repeated."""


def device() -> torch.device:
    """Return the first GPU, or without one the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    """Wait for the GPU's queued kernels."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def shortest_s(do: Callable[[], object], repeats: int = 10) -> float:
    """Return the shortest time of a call, after one that warms up."""
    do()
    wait()
    best, since = math.inf, time.perf_counter()
    for _ in range(repeats):
        started = time.perf_counter()
        do()
        wait()
        best = min(best, time.perf_counter() - started)
        if time.perf_counter() - since > LONG_S:
            break
    return best


def measure(small: bool) -> dict[str, Any]:
    """Describe the machine and measure its speeds; `small`: for a CPU.

    Raises RuntimeError if torch cannot use the GPU.
    """
    there, machine = device(), detect.this_machine()
    if there.type != "cuda" and not small:
        raise RuntimeError(
            f"torch {torch.__version__} (for CUDA {torch.version.cuda}) cannot use the GPU "
            f"{machine.gpu_name}. Install a torch for the driver of this node."
        )
    products = SMALL_PRODUCTS if small else PRODUCTS
    found: dict[str, Any] = {
        "name": machine.gpu_name or machine.processor,
        "gpus": machine.gpus,
        "memory_gib": machine.worker_gib,
        "software": _software(),
        "matmul_flops_s": {p: _product_flops_s(p, products, there) for p in DTYPES},
        "bandwidth_bytes_s": _bandwidth(2**22 if small else 2**28, there),
        "attention": _attention(small, there),
        "launch_s": _launch_s(there),
    }
    if there.type == "cuda":
        properties = torch.cuda.get_device_properties(there)
        found["memory_gib"] = properties.total_memory / 2**30
        capability = f"{properties.major}.{properties.minor}"
        found["software"]["compute capability"] = capability
    return found


def _software() -> dict[str, str | None]:
    driver = None
    with suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        driver = done.stdout.split("\n")[0].strip()
    cudnn = torch.backends.cudnn.version()
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "peft")},
        "CUDA": torch.version.cuda,
        "driver": driver,
        "cuDNN": str(cudnn) if cudnn else None,
        "triton": metadata.version("triton") if util.find_spec("triton") else None,
    }


def _product_flops_s(precision: str, shapes: Any, there: torch.device) -> float | None:
    """Return the operations per second of the best product; None: not on this device."""
    best = 0.0
    for m, k, n in shapes:
        try:
            a, b = (torch.randn(*s, device=there).to(DTYPES[precision]) for s in ((m, k), (k, n)))
            best = max(best, 2 * m * k * n / shortest_s(lambda a=a, b=b: a @ b))  # type: ignore[misc]
        except RuntimeError:  # a card without this precision, or little memory
            continue
    return best or None


def _bandwidth(n_floats: int, there: torch.device) -> float:
    """Return the bytes per second of a copy, read and written."""
    a = torch.zeros(n_floats, device=there)
    b = torch.empty_like(a)
    return 2 * 4 * n_floats / shortest_s(lambda: b.copy_(a))


def _attention(small: bool, there: torch.device) -> dict[str, Any]:
    """Time the kernels of causal attention, forward and backward; find the one torch takes."""
    rows, heads, length, d = (2, 2, 64, 16) if small else (4, 32, 2048, 128)
    shape = (rows, heads, length, d)
    q, k, v = (
        torch.randn(shape, device=there, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    # the plan's count: 2 operations forward and 5 backward, half of the scores are masked
    flops = 7 * heads * d * length * rows * length

    gradient = torch.ones(shape, device=there, dtype=torch.bfloat16)

    def both() -> None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(out, (q, k, v), gradient)

    speeds: dict[str, float | None] = dict.fromkeys(KERNELS)
    for name, kernel in KERNELS.items():
        with suppress(RuntimeError), sdpa_kernel(kernel):
            speeds[name] = flops / shortest_s(both)
    chosen = flops / shortest_s(both)
    known = {name: speed for name, speed in speeds.items() if speed}
    taken = min(known, key=lambda name: abs(math.log(known[name] / chosen)), default=None)
    return {"shape": shape, "flops_s": chosen, "kernels": speeds, "most_like": taken}


def _launch_s(there: torch.device, n: int = 1000) -> float:
    """Return the seconds to launch one small kernel."""
    x = torch.zeros(8, device=there)

    def launch() -> None:
        for _ in range(n):
            x.add_(1.0)

    return shortest_s(launch) / n

"""Measure seconds per step by pack and batch size, the peak of matrix products, and profiles."""

import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Log
from lorasweep.config.compose import compose_request
from lorasweep.data import load as data
from lorasweep.launch.process import keep_freed_memory
from lorasweep.launch.trainer import finetune
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.plan import detect
from lorasweep.plan.load import train_flops
from lorasweep.plan.packing import micro_batch
from lorasweep.spec.method import Method
from lorasweep.spec.run import RunSpec
from lorasweep.train import pretrain

GRIDS = {"tiny": ((1, 4, 16), (1, 2, 4, 8, 16)), "small": ((1, 4, 8), (1, 2))}
"""Scale -> batch sizes and pack sizes."""
UPDATES = {"tiny": 10, "small": 5}
RANK = 16
METHODS = (LoRA(rank=RANK), FullFT())
TURNS = 3
"""How often full fine-tuning and LoRA alternate: a machine's speed drifts by 8% in minutes."""
KINDS = (
    ("bmm", "products of adapters and attention"),
    ("mm", "products with the base's weights"),
    ("softmax", "softmax"),
    ("adamw", "optimizer"),
    ("copy", "copies and casts"),
)
"""Part of an operation's name, and the kind of operation that it shows; the first match counts."""


def at(scale: str) -> list[str]:
    """Return the overrides for a scale, with fp32 if the processor has no bf16 instructions."""
    slow = detect.this_machine().fast_bf16 is False
    return [f"scale={scale}", *(["precision=fp32"] if slow else [])]


def gemm_peak(precision: str, threads: int) -> float:
    """Return the best measured rate of large matrix products, in operations per second."""
    torch.set_num_threads(threads)
    dtype, best = torch.bfloat16 if precision == "bf16" else torch.float32, 0.0
    for m, k, n in ((2048, 2048, 2048), (1600, 576, 1536), (4096, 1024, 1024)):
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        for _ in range(8):
            started = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2 * m * k * n / (time.perf_counter() - started))
    return best


class Bench:
    """One base model and its data, loaded once."""

    def __init__(self, scale: str, models_dirs: list[str], data_dirs: list[str]) -> None:
        spec = compose_request(at(scale)).points[0].spec
        few = dataclasses.replace(spec.dataset, n_test=1, n_test_curve=1)
        self.scale, self.spec = scale, dataclasses.replace(spec, dataset=few, steps=UPDATES[scale])
        pretrain.ensure(spec.model, models_dirs)
        self.base = models.load(spec.model, models_dirs, spec.precision)
        self.rows = data.load(few, data_dirs, self.base.tokenizer)

    def pack(self, method: Method, batch_size: int, count: int) -> list[RunSpec]:
        """Make `count` runs with learning rates too small to change anything."""
        spec = dataclasses.replace(self.spec, method=method, batch_size=batch_size)
        return [dataclasses.replace(spec, lr=1e-6 * (1 + k)) for k in range(count)]

    def step_s(self, method: Method, batch_size: int, count: int) -> float:
        """Return the median seconds per step and run, after a training that warms up memory."""
        pack = self.pack(method, batch_size, count)
        self._times(pack)
        return self._median_s(pack)

    def _times(self, pack: list[RunSpec]) -> list[float]:
        micro = micro_batch(pack[0], len(pack), detect.this_machine())
        events = finetune(pack, self.base, self.rows, micro)
        return [next(iter(e.records.values()))["step_s"] for e in events]

    def in_turns(self, methods: Sequence[Method], batch_size: int) -> list[list[float]]:
        """Return each method's median seconds per step, by turn, on the same rows."""
        packs = [self.pack(method, batch_size, 1) for method in methods]
        return harness.in_turns(TURNS, [partial(self._median_s, pack) for pack in packs])

    def _median_s(self, pack: list[RunSpec]) -> float:
        return statistics.median(self._times(pack))

    def profile(self, method: Method, batch_size: int) -> dict[str, float]:
        """Return each kind of operation's share of the time of one step."""
        from torch.profiler import ProfilerActivity, profile

        pack = self.pack(method, batch_size, 1)
        micro = micro_batch(pack[0], 1, detect.this_machine())
        events = finetune(pack, self.base, self.rows, micro)
        for _ in range(4):  # the fifth update has no evaluation, or (as the last) one of one row
            next(events)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            next(events)
        shares: Counter[str] = Counter()
        for row in profiled.key_averages():
            name = row.key.lower()
            rest = "passes over activations, and Python"
            kind = next((what for part, what in KINDS if part in name), rest)
            shares[kind] += row.self_cpu_time_total
        total = sum(shares.values())
        return {kind: round(us / total, 3) for kind, us in shares.most_common()}


def measure(models_dirs: list[str], data_dirs: list[str], log: Log) -> dict[str, Any]:
    """Time steps of full fine-tuning and LoRA of rank 16 on one thread, as a worker does."""
    keep_freed_memory()  # as workers do
    rows: list[dict[str, Any]] = []
    out: dict[str, Any] = {"steps": rows, "lora_over_fullft": {}, "profile": {}}
    for scale, (batches, sizes) in GRIDS.items():
        torch.set_num_threads(1)
        bench = Bench(scale, models_dirs, data_dirs)
        name, ratios = bench.spec.model.name, {}
        for batch in batches:
            adapters, whole = METHODS
            turns, alone = bench.in_turns((whole, adapters), batch)
            full_s = statistics.median(turns)
            own = {"model": name, "batch_size": batch}
            rows.append({**own, "method": "fullft", "pack": 1, "step_s": full_s})
            ratio = {}
            for n in sizes:
                lora_s = bench.step_s(adapters, batch, n) if n > 1 else statistics.median(alone)
                rows.append({**own, "method": "lora", "pack": n, "step_s": lora_s})
                ratio[n] = lora_s / full_s
                log(
                    f"{name}, batch {batch}: a LoRA step in a pack of {n} {lora_s * 1e3:.1f} ms "
                    f"per run, full fine-tuning {full_s * 1e3:.1f} ms"
                )
            # divided by full fine-tuning's step: one LoRA run alone (n1), the best pack size
            ratio[1] = statistics.median(a / b for a, b in zip(alone, turns))
            ratios[str(batch)] = {"n1": ratio[1], "best": min(ratio.values())}
        one = dataclasses.replace(bench.spec, steps=1)
        lora, full = (train_flops(dataclasses.replace(one, method=m)) for m in METHODS)
        out["lora_over_fullft"][name] = {"formula": lora / full, "by_batch": ratios}
        out["profile"][name] = {m.name: bench.profile(m, batches[-1]) for m in METHODS}
    return out

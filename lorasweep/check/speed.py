"""Parts 3 to 5 of action=check_gpu: time and memory of updates, packs and sampling.

The weights are random, so nothing is downloaded.
"""

import statistics
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorasweep.check.node import device
from lorasweep.data.examples import Data, Example, Rewards, answer_of
from lorasweep.launch.out_of_memory import free_memory
from lorasweep.launch.trainer import finetune
from lorasweep.models.load import Base, config_of, without_weights
from lorasweep.models.sharding import compute_again
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import RunSpec
from lorasweep.spec.streams import stream
from lorasweep.train.events import Record

WARM, STEPS = 2, 3
"""Updates before those that are timed, and number of those."""
SCALE = 0.02
"""Standard deviation of random weights."""


def base_of(
    kept: dict[str, Any], model: ModelSpec, precision: str, checkpointing: bool, compiled: bool
) -> Base:
    """Return a base with random weights, as the trainer prepares one.

    `kept`: holds the base of the last case, which is returned if it is the same.
    """
    key = (model, precision, checkpointing, compiled)
    if kept.get("key") != key:
        kept.clear()
        free_memory()
        base = random_base(model, precision)
        if checkpointing:
            compute_again(base.model)
        if compiled:  # on a CPU compiling takes minutes, so there only the capture is checked
            backend = "inductor" if device().type == "cuda" else "eager"
            base.model.base_model.compile(dynamic=True, backend=backend)
        kept |= {"key": key, "base": base}
    return kept["base"]


def random_base(spec: ModelSpec, precision: str) -> Base:
    """Build a base of a model's shape with random weights on the device."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = config_of(spec, max_position_embeddings=8192, rope_parameters=rope, **tokens)
    model = without_weights(config, spec, precision).to_empty(device=device())
    model.tie_weights()
    generator = torch.Generator(device()).manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, SCALE, generator=generator)
            else:  # norms
                p.fill_(1)
    for module in model.modules():
        if hasattr(module, "inv_freq"):  # a buffer that is computed, not loaded
            module.inv_freq = type(module)(config=model.config).inv_freq.to(device())
    return Base(model, None, "random")


def step(
    kept: dict[str, Any],
    spec: RunSpec,
    n_runs: int,
    predicted: dict[str, Any],
    ragged: bool = False,
    join_rows: bool = False,
    compile: bool = False,
) -> dict[str, Any]:
    """Measure the updates of a pack in the plan's layout: step_s, tokens_s, memory_gib.

    `ragged`: rows of a quarter to all of the longest length.
    """
    base = base_of(kept, spec.model, spec.precision, predicted["checkpointing"], compile)
    runs = [replace(spec, lr=spec.lr * (1 + k), steps=WARM + STEPS + 1) for k in range(n_runs)]
    rows = _rows(spec, ragged)
    data = Data(rows, rows(-1, 0, 1), None)
    _reset_peak()
    events = finetune(runs, base, data, predicted["rows"], None, join_rows)
    records = _first_records(events, runs[0])
    return {
        "step_s": n_runs * statistics.median(r["step_s"] for r in records[WARM:]),
        "tokens_s": statistics.median(r["tokens_per_s"] for r in records[WARM:]),
        "memory_gib": _peak_gib(),
        "first_step_s": n_runs * records[0]["step_s"],
    }


def sampling(
    kept: dict[str, Any], spec: RunSpec, n_runs: int, predicted: dict[str, Any]
) -> dict[str, Any]:
    """Measure updates of the RL loop, and the completion tokens that it samples a second."""
    base = base_of(kept, spec.model, spec.precision, predicted["checkpointing"], False)
    run = replace(spec, steps=WARM + STEPS + 1)
    rows = _rows(spec, answer=1, length=spec.dataset.max_length - spec.max_new_tokens + 1)

    def reward(pairs: Any) -> list[float | None]:
        def right(row: Example, answer: np.ndarray) -> bool:
            return bool(answer.sum() % 2) or answer.tolist() == answer_of(row).tolist()

        return [float(right(row, answer)) for row, answer in pairs]

    never = ((spec.model.vocab_size,),)
    data = Data(rows, rows(-1, 0, 4), None, rewards=Rewards(reward, never))
    _reset_peak()
    records = _first_records(finetune([run], base, data, predicted["rows"]), run)
    return {
        "step_s": statistics.median(r["step_s"] for r in records[WARM:]),
        "sampled_tokens_s": statistics.median(r["sampled_tokens_per_s"] for r in records[WARM:]),
        "memory_gib": _peak_gib(),
    }


def _first_records(events: Any, run: RunSpec) -> list[Record]:
    """Return the records of all updates but the last, after which weights are analysed."""
    records = [event.records[run.id] for event in islice(events, WARM + STEPS)]
    events.close()
    return records


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

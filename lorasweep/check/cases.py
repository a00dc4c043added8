"""What action=check_gpu measures: its cases by part, and the plan's prediction of each."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.load import train_flops
from lorasweep.plan.planner import place
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.method import Method
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import RunSpec

NODE, CORRECTNESS, SPEED, PACKS, LOOP = "node", "correctness", "speed", "packs", "loop"
MODELS = ("smollm2-135m", "llama-3.2-1b", "llama-3.1-8b", "qwen3-30b-a3b")
"""Shapes whose speed is measured, with random weights."""
PACKED = ("llama-3.2-1b", "llama-3.1-8b")
RANK = 32
CHANGES_NOTHING = 1e-6
"""Learning rate of measurements of speed."""


@dataclass(frozen=True)
class Size:
    """How large the cases are."""

    length: int
    """Tokens of a row."""
    batch_size: int
    short_length: int
    """Tokens of a row in packs."""
    pack_rows: tuple[int, ...]
    """Batch sizes of the runs of packs."""
    pack_sizes: tuple[int, ...]
    completions: int
    new_tokens: int
    """Tokens of a completion, and of its prompt."""
    shrunken: bool = False
    """Two narrow layers instead of the model's shape."""


ON_GPU = Size(1024, 32, 256, (1, 8, 32), (1, 2, 4, 8, 16), 256, 128)
ON_CPU = Size(32, 4, 16, (1, 4), (1, 4), 8, 4, shrunken=True)


@dataclass(frozen=True)
class Case:
    """One measurement. The results of a part's cases are kept one by one."""

    part: str
    name: str
    measure: str
    """Function that measures it: "module:function" under lorasweep.check."""
    spec: RunSpec | None = None
    n_runs: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the function."""


def shrink(model: ModelSpec) -> ModelSpec:
    """Return the same architecture with two narrow layers."""
    values: dict[str, Any] = {"hidden_size": 64, "mlp_size": 128, "n_layers": 2, "vocab_size": 512}
    values |= {"n_heads": 4, "n_kv_heads": 2, "head_size": 16}
    if model.n_experts:
        values |= {"n_experts": 4, "n_active_experts": 2}
    return dataclasses.replace(model, **values)


def random_tokens(length: int) -> DatasetSpec:
    """Return a data set of rows of `length` tokens that `lorasweep.check.speed` draws."""
    return DatasetSpec(
        *("random_tokens", "synthetic", "bandit"),
        format="tokens",
        max_length=length,
        n_test=1,
        n_test_curve=0,
    )


def cases_of(
    models: Mapping[str, Callable[[], ModelSpec]], small: RunSpec, size: Size, precision: Any
) -> list[Case]:
    """List the cases of all parts.

    Args:
        models: the shapes, by name.
        small: a run on a shipped base, of any method, for the part `correctness`.
        size: ON_GPU or ON_CPU.
        precision: of the cases of speed.
    """

    def run(name: str, method: Method, batch_size: int, length: int, **more: Any) -> RunSpec:
        model = shrink(models[name]()) if size.shrunken else models[name]()
        run = RunSpec(model, random_tokens(length), method, lr=CHANGES_NOTHING)
        return dataclasses.replace(run, batch_size=batch_size, precision=precision, **more)

    small = dataclasses.replace(small, method=LoRA(rank=4))
    cases = [Case(NODE, "node", "node:measure", options={"small": size.shrunken})]
    for method in (LoRA(rank=4), FullFT()):
        spec = dataclasses.replace(small, method=method)
        name = f"one update of {method.name} in fp64, against the CPU"
        cases.append(Case(CORRECTNESS, name, "correctness:update_as_on_cpu", spec))
    for p in ("fp64", "fp32", "bf16"):
        spec = dataclasses.replace(small, precision=p)
        cases.append(
            Case(CORRECTNESS, f"a pack in {p}, against its runs", "correctness:pack", spec)
        )
    for name in ("killed_and_resumed", "little_memory"):
        text = name.replace("_", " ")
        cases.append(Case(CORRECTNESS, text, f"correctness:{name}", small))
    for name in MODELS:
        for method in (LoRA(rank=RANK), FullFT()):
            spec = run(name, method, size.batch_size, size.length)
            cases.append(Case(SPEED, f"{name} {method.name}", "speed:step", spec))
    for name in PACKED:
        for rows in size.pack_rows:
            spec = run(name, LoRA(rank=RANK), rows, size.short_length)
            for n in size.pack_sizes:
                cases.append(Case(PACKS, f"{name} {rows} rows x {n}", "speed:step", spec, n))
    name, group = PACKED[0], 4
    lora = run(name, LoRA(rank=RANK), size.batch_size, size.length)
    rl = run(
        *(name, LoRA(rank=RANK), size.completions, 2 * size.new_tokens),
        objective="policy_gradient",
        max_new_tokens=size.new_tokens,
        group_size=group,
    )
    for text, options in (
        ("padded rows", {"ragged": True}),
        ("joined rows", {"ragged": True, "join_rows": True}),
        ("torch.compile", {"compile": True}),
    ):
        cases.append(Case(LOOP, f"{name} {text}", "speed:step", lora, options=options))
    cases.append(Case(LOOP, f"{name} sampling", "speed:sampling", rl))
    return cases


def predict(case: Case, hardware: Hardware) -> dict[str, Any]:
    """Return what the plan expects of a case on one GPU.

    Keys: rows (of a forward pass), checkpointing, step_s, tokens_s, memory_gib, flops (of an
    update), sampled_tokens_s, parts (seconds by component); or only misfit: why it does not fit.
    """
    assert case.spec is not None
    joined = case.options.get("join_rows", False)
    how: dict[str, Any] = {"checkpointing": (False, True), "join_rows": joined}
    placed = place(case.spec, hardware, case.n_runs, **how)
    if placed.why:
        return {"misfit": placed.why}
    flops = case.n_runs * train_flops(case.spec) / case.spec.steps
    sampled: dict[str, float] = {}
    if seconds := placed.step.get("sampling"):
        tokens = case.n_runs * case.spec.batch_size * case.spec.max_new_tokens
        sampled = {"sampled_tokens_s": tokens / seconds}
    return {
        **sampled,
        "rows": placed.layout.rows,
        "checkpointing": placed.layout.checkpointing,
        "step_s": placed.step_s,
        "tokens_s": placed.tokens / case.spec.steps / placed.step_s,
        "memory_gib": placed.memory_gib,
        "flops": flops,
        "parts": placed.step,
    }


def predictions(cases: list[Case], hardware: Hardware) -> dict[str, Any]:
    """Return the predictions of all cases of speed, with the hardware and the time."""
    found = {c.name: predict(c, hardware) for c in cases if c.part in (SPEED, PACKS, LOOP)}
    return {
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "hardware": dataclasses.asdict(hardware),
        "cases": found,
    }

"""What action=check_gpu measures: its cases by part, and the plan's prediction of each."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
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
    return replace(model, **values)


def cases_of(
    models: Mapping[str, Callable[[], ModelSpec]], small: RunSpec, size: Size, precision: str
) -> list[Case]:
    """List the cases of all parts.

    Args:
        models: the shapes, by name.
        small: a run on a shipped base, for the part `correctness`.
        size: ON_GPU or ON_CPU.
        precision: of the cases of speed.
    """

    def run(name: str, method: Method, batch_size: int, length: int, **more: Any) -> RunSpec:
        model = shrink(models[name]()) if size.shrunken else models[name]()
        rows: dict[str, Any] = {"max_length": length, "n_test": 1, "n_test_curve": 0}
        # rows that lorasweep.check.speed draws
        dataset = DatasetSpec("random_tokens", "synthetic", "bandit", format="tokens", **rows)
        more |= {"batch_size": batch_size, "precision": precision}
        return RunSpec(model, dataset, method, lr=CHANGES_NOTHING, **more)

    lora, full = LoRA(rank=RANK), FullFT()
    small = replace(small, method=LoRA(rank=4))
    cases = [Case(NODE, "node", "speed:node", options={"small": size.shrunken})]
    checks = {
        f"one update of {method.name} in fp64, against the CPU": (
            "update_as_on_cpu",
            replace(small, method=method),
        )
        for method in (small.method, full)
    }
    for p in ("fp64", "fp32", "bf16"):
        checks[f"a pack in {p}, against its runs"] = ("pack", replace(small, precision=p))
    for name in ("killed_and_resumed", "little_memory"):
        checks[name.replace("_", " ")] = (name, small)
    for text, (name, spec) in checks.items():
        cases.append(Case(CORRECTNESS, text, f"correctness:{name}", spec))
    for name in MODELS:
        for method in (lora, full):
            spec = run(name, method, size.batch_size, size.length)
            cases.append(Case(SPEED, f"{name} {method.name}", "speed:step", spec))
    for name in PACKED:
        for rows in size.pack_rows:
            spec = run(name, lora, rows, size.short_length)
            for n in size.pack_sizes:
                cases.append(Case(PACKS, f"{name} {rows} rows x {n}", "speed:step", spec, n))
    name = PACKED[0]
    sft = run(name, lora, size.batch_size, size.length)
    rl: dict[str, Any] = {
        "objective": "policy_gradient",
        "max_new_tokens": size.new_tokens,
        "group_size": 4,
    }
    for text, spec, options in (
        ("padded rows", sft, {"ragged": True}),
        ("joined rows", sft, {"ragged": True, "join_rows": True}),
        ("torch.compile", sft, {"compile": True}),
        ("sampling", run(name, lora, size.completions, 2 * size.new_tokens, **rl), {}),
    ):
        cases.append(Case(LOOP, f"{name} {text}", "speed:step", spec, options=options))
    return cases


def predict(case: Case, hardware: Hardware) -> dict[str, Any]:
    """Return what the plan expects of a case on one GPU.

    Keys: rows (of a forward pass), checkpointing, step_s, tokens_s, memory_gib, flops (of an
    update), sampled_tokens_s, parts (seconds by component); or only misfit: why it does not fit.
    """
    assert case.spec is not None
    spec, joined = case.spec, case.options.get("join_rows", False)
    how: dict[str, Any] = {"checkpointing": (False, True), "join_rows": joined}
    placed = place(spec, hardware, case.n_runs, **how)
    if placed.why:
        return {"misfit": placed.why}
    found = {
        "rows": placed.layout.rows,
        "checkpointing": placed.layout.checkpointing,
        "step_s": placed.step_s,
        "tokens_s": placed.tokens / spec.steps / placed.step_s,
        "memory_gib": placed.memory_gib,
        "flops": case.n_runs * train_flops(spec) / spec.steps,
        "parts": placed.step,
    }
    if seconds := placed.step.get("sampling"):
        tokens = case.n_runs * spec.batch_size * spec.max_new_tokens
        found["sampled_tokens_s"] = tokens / seconds
    return found


def predictions(cases: list[Case], hardware: Hardware) -> dict[str, Any]:
    """Return the predictions of all cases of speed, with the hardware and the time."""
    return {
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "hardware": asdict(hardware),
        "cases": {c.name: predict(c, hardware) for c in cases if c.part in (SPEED, PACKS, LOOP)},
    }

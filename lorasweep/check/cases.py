"""The cases of action=check_gpu by part, the plan's prediction of each, and their measurement.

Cases are measured in a process of their own. If it dies, that case has failed, and another process
goes on with the next one. Results are kept one by one.
"""

import json
import os
import re
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from lorasweep.launch.process import die_with_parent, keep_freed_memory, worker_environment
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.load import train_flops
from lorasweep.plan.planner import place
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.method import Method
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import RunSpec
from lorasweep.store import files

NODE, CORRECTNESS, SPEED, PACKS, LOOP = "node", "correctness", "speed", "packs", "loop"
MODELS = ("smollm2-135m", "llama-3.2-1b", "llama-3.1-8b", "qwen3-30b-a3b")
"""Shapes whose speed is measured, with random weights."""
PACKED = ("llama-3.2-1b", "llama-3.1-8b")
LIMIT_S, LAST_S = 2700.0, 60.0
"""Seconds after which no case begins (the next command measures the cases that are left), and how
much longer the last case may take."""


@dataclass(frozen=True)
class Case:
    """One measurement."""

    part: str
    name: str
    measure: str
    """Function of lorasweep.check.measures."""
    spec: RunSpec | None = None
    n_runs: int = 1


def shrink(model: ModelSpec) -> ModelSpec:
    """Return the same architecture with two narrow layers."""
    values: dict[str, Any] = {"hidden_size": 64, "mlp_size": 128, "n_layers": 2, "vocab_size": 512}
    values |= {"n_heads": 4, "n_kv_heads": 2, "head_size": 16}
    if model.n_experts:
        values |= {"n_experts": 4, "n_active_experts": 2}
    return replace(model, **values)


def cases_of(
    models: Mapping[str, Callable[[], ModelSpec]], small: RunSpec, on_gpu: bool, precision: str
) -> list[Case]:
    """List the cases of all parts; without a GPU they have shrunken shapes.

    Args:
        models: the shapes, by name.
        small: a run on a shipped base, for the part `correctness`.
        precision: of the cases of speed.
    """
    # tokens and rows of an update, the same in packs, runs of a pack, completions and their tokens
    length, rows, short, pack_rows, pack_sizes, completions, new_tokens = (
        (1024, 32, 256, (1, 8, 32), (1, 2, 4, 8, 16), 256, 128)
        if on_gpu
        else (32, 4, 16, (1, 4), (1, 4), 8, 4)
    )

    def run(name: str, method: Method, batch_size: int, length: int, **more: Any) -> RunSpec:
        model = models[name]() if on_gpu else shrink(models[name]())
        sizes: dict[str, Any] = {"max_length": length, "n_test": 1, "n_test_curve": 0}
        # its rows are drawn by lorasweep.check.measures
        dataset = DatasetSpec("random_tokens", "synthetic", "bandit", format="tokens", **sizes)
        more |= {"batch_size": batch_size, "precision": precision}
        return RunSpec(model, dataset, method, lr=1e-6, **more)  # changes nothing

    lora, full, small = LoRA(rank=32), FullFT(), replace(small, method=LoRA(rank=4))
    cases = [Case(NODE, "node", "node")]
    for method in (small.method, full):
        text = f"one update of {method.name} in fp64, against the CPU"
        spec = replace(small, method=method)
        cases.append(Case(CORRECTNESS, text, "update_as_on_cpu", spec))
    for p in ("fp64", "fp32", "bf16"):
        spec = replace(small, precision=p)
        cases.append(Case(CORRECTNESS, f"a pack in {p}, against its runs", "pack", spec))
    cases.append(Case(CORRECTNESS, "little memory", "little_memory", small))
    for name in MODELS:
        for method in (lora, full):
            spec = run(name, method, rows, length)
            cases.append(Case(SPEED, f"{name} {method.name}", "step", spec))
    for name in PACKED:
        for few in pack_rows:
            spec = run(name, lora, few, short)
            cases += [Case(PACKS, f"{name} {few} rows x {n}", "step", spec, n) for n in pack_sizes]
    name = PACKED[0]
    rl: dict[str, Any] = {"objective": "policy_gradient", "group_size": 4}
    spec = run(name, lora, completions, 2 * new_tokens, max_new_tokens=new_tokens, **rl)
    return [*cases, Case(LOOP, f"{name} sampling", "step", spec)]


def predictions(cases: list[Case], hardware: Hardware) -> dict[str, Any]:
    """Return what the plan expects of the cases of speed on one GPU, by name under `cases`.

    Keys of each: rows (of a forward pass), checkpointing, step_s, tokens_s, memory_gib, flops (of
    an update), sampled_tokens_s, parts (seconds by component); or only misfit: why it does not fit.
    """
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        if case.part not in (SPEED, PACKS, LOOP):
            continue
        spec = case.spec
        assert spec is not None
        placed = place(spec, hardware, case.n_runs, checkpointing=(False, True))
        if placed.why:
            found[case.name] = {"misfit": placed.why}
            continue
        found[case.name] = {
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
            found[case.name]["sampled_tokens_s"] = tokens / seconds
    written = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"written": written, "hardware": asdict(hardware), "cases": found}


def path_of(folder: Path, case: Case) -> Path:
    """Return the file of a case's result: its measures, {"misfit": why} or {"failed": cause}."""
    name = re.sub(r"[^a-z0-9.]+", "_", f"{case.part} {case.name}".lower())
    return folder / "cases" / f"{name}.json"


def measure(
    cases: Sequence[Case],
    folder: Path,
    threads: int,
    predicted: Mapping[str, Any],
    report: Callable[[Case, dict[str, Any]], None],
    limit_s: float = LIMIT_S,
) -> None:
    """Measure the cases that have no result, or that failed; keep and report each."""
    until, child, pipe = time.monotonic() + limit_s, None, None
    (folder / "cases").mkdir(parents=True, exist_ok=True)
    try:
        for case in cases:
            path, before = path_of(folder, case), predicted.get(case.name, {})
            known, left_s = files.read_json(path), until - time.monotonic()
            if "misfit" in before:
                result = {"misfit": before["misfit"]}
            elif (known is not None and "failed" not in known) or left_s <= 0:
                continue
            else:
                if child is None:
                    spawn = get_context("spawn")
                    pipe, other_end = spawn.Pipe()
                    child = spawn.Process(target=_serve, args=(other_end, folder, threads))
                    child.start()
                    other_end.close()
                assert pipe is not None
                try:
                    pipe.send((case, before))
                    late = f"it took more than {LAST_S:.0f} s beyond the time of all cases"
                    result = pipe.recv() if pipe.poll(left_s + LAST_S) else {"failed": late}
                except (EOFError, OSError):  # it died
                    child.join()
                    result = {"failed": f"it died with status {child.exitcode} (below 0: a signal)"}
                if "failed" in result:
                    child.kill()
                    child.join()
                    child = None
            files.write_atomic(path, json.dumps(result).encode())
            report(case, result)
    finally:
        if child is not None:
            child.kill()
            child.join()


def _serve(other_end: Any, folder: Path, threads: int) -> None:
    """Measure the cases that come through a pipe; what libraries print goes into log.txt."""
    die_with_parent()
    keep_freed_memory()
    os.environ.update(worker_environment(threads))
    with (folder / "log.txt").open("a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    kept: dict[str, Any] = {}  # the base of a case may serve for the next one
    while True:
        case, predicted = other_end.recv()
        arguments, started = {"spec": case.spec} if case.spec else {}, time.monotonic()
        if predicted:
            arguments |= {"kept": kept, "n_runs": case.n_runs, "predicted": predicted}
        try:
            from lorasweep.check import measures  # after the environment is set: it imports torch

            result = getattr(measures, case.measure)(**arguments)
        except Exception as error:
            traceback.print_exc()
            result = {"failed": " ".join(f"{type(error).__name__}: {error}".split())}
        other_end.send({**result, "seconds": round(time.monotonic() - started, 1)})

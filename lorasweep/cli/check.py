"""The action check_gpu: measure a machine case by case, and write a page."""

import json
import os
import re
import shutil
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import lorasweep
from lorasweep.check import cases as all_cases
from lorasweep.check.cases import NODE, Case
from lorasweep.config import catalogue
from lorasweep.errors import SpecError, TrainingError
from lorasweep.plan import detect
from lorasweep.plan.detect import Hardware, hardware_of
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.run import RunSpec
from lorasweep.store import files
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.request import Request
from lorasweep.work.printed import Answer, notifier


def check_gpu(request: Request, store: RunStore) -> Answer:
    """Measure what is missing on this machine; status 1 if a check failed."""
    files.check_writable(Path(request.exec.reports_dir) / "check_gpu", "exec.reports_dir")
    if request.cluster.kind == "slurm":
        raise SpecError(
            "action=check_gpu measures the machine it runs on. On a cluster, run it inside a job, "
            "with cluster=local: srun --gpus=1 --mem=16G python -m lorasweep action=check_gpu"
        )
    machine, folders = detect.this_machine(), [Path(f) for f in request.folders]
    if shutil.which("nvidia-smi") and not machine.gpus:
        raise SpecError(
            f"this machine has nvidia-smi, but no GPU can be used: torch is "
            f"{metadata.version('torch')}, CUDA_VISIBLE_DEVICES is "
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}. Install a torch for CUDA, or "
            "ask for a GPU (in a Slurm job: --gpus=1)."
        )
    models = catalogue.models(folders)
    how: dict[str, Any] = {"format": "tokens", "mask": "all", "max_length": 32}
    data = DatasetSpec("dialect", "synthetic", "dialect", n_test=32, n_test_curve=0, **how)
    small = RunSpec(models["tiny64"](), data, lr=1e-3, batch_size=4)  # both are shipped
    precision = "fp32" if machine.fast_bf16 is False else "bf16"
    cases = all_cases.cases_of(models, small, bool(machine.gpus), precision)
    named = [m for read in catalogue.machines(folders).values() if (m := read()).gpu_name]
    mine = [m for m in named if m.gpu_name == machine.gpu_name]
    known = hardware_of(request.hardware) if request.hardware else next(iter(mine), None)
    card = (machine.gpu_name or machine.processor or "cpu").lower()
    slug = re.sub(r"[^a-z0-9]+", "_", card).strip("_")
    versions = [metadata.version(p) for p in ("torch", "transformers", "peft")]
    folder = "-".join([slug, lorasweep.__version__, *versions])
    path = Path(request.exec.reports_dir) / "check_gpu" / folder
    file = path / "conf" / "hardware" / f"{slug}_measured.yaml"
    predicted: dict[str, Any] = files.read_json(path / "predicted.json") or {}
    threads, notify = request.exec.threads or machine.cores or 1, notifier(request)

    def results() -> dict[str, dict[str, Any]]:
        found = {c.name: files.read_json(all_cases.path_of(path, c)) for c in cases}
        return {name: result for name, result in found.items() if result is not None}

    def measured() -> Hardware | None:  # with the constants of part 1
        node = results().get("node", {"failed": ""})
        return None if "failed" in node else all_cases.measured_hardware(node, known, file.stem)

    def report(case: Case, result: dict[str, Any]) -> None:
        """Write the page, and the hardware file if part 1 is measured."""
        facts = {k: v for k, v in result.items() if isinstance(v, float | str)}
        numbers = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items())
        notify(f"{case.part:12} {case.name}: {', '.join(numbers)}")
        if hardware := measured():
            file.parent.mkdir(parents=True, exist_ok=True)
            text = all_cases.hardware_file(hardware, results()["node"], time.strftime("%Y-%m-%d"))
            files.write_atomic(file, text.encode())
        text = all_cases.page(cases, predicted, results())
        files.write_atomic(path / "page.md", text.encode())

    for some in (cases[:1], cases[1:]):  # part 1 gives the constants of an unknown card
        hardware = known or measured()
        if not predicted and hardware is not None:  # before anything of speed is measured
            predicted |= all_cases.predictions(cases, hardware)
            path.mkdir(parents=True, exist_ok=True)
            files.write_atomic(path / "predicted.json", json.dumps(predicted, indent=1).encode())
        if hardware is None and some[0].part != NODE:
            raise TrainingError(
                f"part 1 failed, so there are no constants to plan with: {path / 'log.txt'} has "
                "the reason. With hardware=NAME (a file of conf/hardware) the others go on."
            )
        all_cases.measure(some, path, threads, predicted.get("cases", {}), report)
    found, chosen = results(), f"--config-dir {path / 'conf'} hardware={file.stem}"
    wrong = all_cases.failures(cases, found)
    failed = {n: r for n, r in found.items() if "failed" in r or n in wrong}
    return Answer(
        {"page": str(path / "page.md"), "predicted": predicted, "cases": found, "failed": failed},
        [
            *(f"failed: {name}: {result}" for name, result in failed.items()),
            f"page: {path / 'page.md'}\nhardware file: {file}",
            f"plan with it: python -m lorasweep {chosen} +sweep=study scale=paper action=plan",
        ],
        int(bool(failed)),
    )

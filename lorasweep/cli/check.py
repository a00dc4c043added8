"""The action check_gpu: measure a machine case by case, and write a page."""

import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import lorasweep
from lorasweep.check import cases as all_cases
from lorasweep.check import page
from lorasweep.check.cases import NODE, Case
from lorasweep.cli.printed import Answer
from lorasweep.cli.progress import notifier
from lorasweep.config import catalogue
from lorasweep.errors import SpecError, TrainingError
from lorasweep.launch.slurm.planning import hardware_of
from lorasweep.launch.slurm.submit import submit_command
from lorasweep.plan import detect
from lorasweep.plan.hardware import Hardware
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.run import RunSpec
from lorasweep.store import files
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.request import Request

SMALL = ("tiny64", DatasetSpec("dialect", "synthetic", "dialect", format="tokens", mask="all"))
"""Base model and data of the checks of correctness; both come with the package."""


def check_gpu(request: Request, store: RunStore) -> Answer:
    """Measure what is missing, here or as a job; status 1 if a check failed."""
    files.check_writable(Path(request.exec.reports_dir) / "check_gpu", "exec.reports_dir")
    if request.cluster.kind == "slurm":
        return _submit(request)
    machine, folders = detect.this_machine(), [Path(f) for f in request.folders]
    if shutil.which("nvidia-smi") and not machine.gpus:
        raise SpecError(
            f"this machine has nvidia-smi, but no GPU can be used: torch is "
            f"{metadata.version('torch')}, CUDA_VISIBLE_DEVICES is "
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}. Install a torch for CUDA, or "
            "ask for a GPU (in a Slurm job: --gpus=1)."
        )
    models, (name, dataset) = catalogue.models(folders), SMALL
    dataset = replace(dataset, max_length=32, n_test=32, n_test_curve=0)
    small = RunSpec(models[name](), dataset, lr=1e-3, batch_size=4)
    precision = "fp32" if machine.fast_bf16 is False else "bf16"
    cases = all_cases.cases_of(models, small, bool(machine.gpus), precision)
    named = [m for read in catalogue.machines(folders).values() if (m := read()).gpu_name]
    mine = [m for m in named if m.gpu_name == machine.gpu_name]
    known = hardware_of(request) if request.hardware else mine[0] if mine else None
    card = (machine.gpu_name or machine.processor or "cpu").lower()
    slug = re.sub(r"[^a-z0-9]+", "_", card).strip("_")
    versions = [metadata.version(p) for p in ("torch", "transformers", "peft")]
    folder = "-".join([slug, lorasweep.__version__, *versions])
    here = _Folder(Path(request.exec.reports_dir) / "check_gpu" / folder, slug, cases, known)
    threads = request.exec.threads or machine.cores or 1
    for some in (cases[:1], cases[1:]):  # part 1 gives the constants of an unknown card
        here.measure(some, threads, notifier(request))
    results, file = here.results(), here.hardware_path
    chosen = f"--config-dir {here.path / 'conf'} hardware={file.stem}"
    return Answer(
        {"page": str(here.page), "predicted": here.predicted, "cases": results},
        [
            f"page: {here.page}\nhardware file: {file}",
            f"plan with it: python -m lorasweep {chosen} +sweep=study scale=paper action=plan",
        ],
        int(bool(page.failures(cases, results) or any("failed" in r for r in results.values()))),
    )


def _submit(request: Request) -> Answer:
    """Submit this command as a job, with one GPU if hardware= names GPUs."""
    cluster, exec_ = request.cluster, request.exec
    if request.hardware and not cluster.gpus:
        cluster = replace(cluster, gpus=1)
    folders = [f"exec.{n}_dir={getattr(exec_, f'{n}_dir')}" for n in ("runs", "reports")]
    arguments = ["action=check_gpu", *folders]
    if request.hardware:
        own = ["--config-dir", request.folders[0]] if len(request.folders) > 1 else []
        arguments = [*own, f"hardware={request.hardware['name']}", *arguments]
    notify = notifier(request, always=True)
    lines = [submit_command(cluster, exec_, arguments, "check_gpu", notify)]
    if not cluster.gpus:
        lines.append("the job has no GPU, so it measures small shapes: cluster.gpus=1 asks for one")
    return Answer(text=lines)


class _Folder:
    """The cases of a machine, and the folder of their results."""

    def __init__(self, path: Path, slug: str, cases: list[Case], known: Hardware | None) -> None:
        self.path, self.cases, self.known = path, cases, known
        self.page = path / "page.md"
        self.hardware_path = path / "conf" / "hardware" / f"{slug}_measured.yaml"
        self.predicted: dict[str, Any] = files.read_json(path / "predicted.json") or {}

    def results(self) -> dict[str, dict[str, Any]]:
        found = {c.name: files.read_json(all_cases.path_of(self.path, c)) for c in self.cases}
        return {name: result for name, result in found.items() if result is not None}

    def measured(self) -> Hardware | None:
        """Return the machine with the constants of part 1; None before it."""
        node = self.results().get("node", {"failed": ""})
        if "failed" in node:
            return None
        return page.measured_hardware(node, self.known, self.hardware_path.stem)

    def measure(self, cases: list[Case], threads: int, notify: Any) -> None:
        """Measure cases, and write page and hardware file after each one."""
        hardware = self.known or self.measured()
        if not self.predicted and hardware is not None:  # before anything of speed is measured
            self.predicted = all_cases.predictions(self.cases, hardware)
            self.path.mkdir(parents=True, exist_ok=True)
            content = json.dumps(self.predicted, indent=1).encode()
            files.write_atomic(self.path / "predicted.json", content)
        if hardware is None and cases[0].part != NODE:
            raise TrainingError(
                f"part 1 failed, so there are no constants to plan with: {self.path / 'log.txt'} "
                "has the reason. With hardware=NAME (a file of conf/hardware) the others go on."
            )
        plans = self.predicted.get("cases", {})

        def report(case: Case, result: dict[str, Any]) -> None:
            notify(f"{case.part:12} {case.name}: {_line(result, plans.get(case.name, {}))}")
            self.write()

        all_cases.measure(cases, self.path, threads, plans, report)

    def write(self) -> None:
        """Write the page, and the hardware file if part 1 is measured."""
        results, measured = self.results(), self.measured()
        if measured is not None:
            self.hardware_path.parent.mkdir(parents=True, exist_ok=True)
            text = page.hardware_file(measured, results["node"], time.strftime("%Y-%m-%d"))
            files.write_atomic(self.hardware_path, text.encode())
        text = page.page(self.cases, self.predicted, results)
        files.write_atomic(self.page, text.encode())


def _line(result: Mapping[str, Any], predicted: Mapping[str, Any]) -> str:
    """Say in a line what was measured."""
    if "failed" in result or "misfit" in result:
        return " ".join(f"{key}: {result[key]}" for key in ("failed", "misfit") if key in result)
    if "difference" in result:
        return f"difference {result['difference']:.2g}, allowed {result['bound']:.2g}"
    if "step_s" in result:
        return (
            f"{result['step_s']:.4g} s an update (planned {predicted['step_s']:.4g}), "
            f"{result['memory_gib']:.1f} GiB (planned {predicted['memory_gib']:.1f})"
        )
    speeds = {p: s for p, s in result["matmul_flops_s"].items() if s}
    products = ", ".join(f"{s / 1e12:.3g} TFLOP/s in {p}" for p, s in speeds.items())
    return f"{result['name']}, {products}, {result['bandwidth_bytes_s'] / 1e12:.3g} TB/s"

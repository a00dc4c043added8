"""The action check_gpu: measure a machine part by part, and write a page after each part."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import lorasweep
from lorasweep.check import cases as all_cases
from lorasweep.check import page, process
from lorasweep.check.cases import CORRECTNESS, LOOP, NODE, PACKS, SPEED, Case
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
ANSWER_S = 600.0
KEPT = Path(lorasweep.__file__).parents[1] / "analysis" / "results"
"""Kept answers; an installed package has the one that is compared."""


def check_gpu(request: Request, store: RunStore) -> int:
    """Measure what is missing, here or as a job; return 1 if a check failed."""
    files.check_writable(Path(request.exec.reports_dir) / "check_gpu", "exec.reports_dir")
    if request.cluster.kind == "slurm":
        return _submit(request)
    here = _Check(request)
    here.folder.mkdir(parents=True, exist_ok=True)
    for part in (NODE, CORRECTNESS, SPEED, PACKS, LOOP):
        here.measure(part)
    here.answer()
    results = here.results()
    if request.format == "json":
        print(json.dumps({"page": str(here.page), "predicted": here.predicted, "cases": results}))
    else:
        print(f"\npage: {here.page}\nhardware file: {here.hardware_path}")
        chosen = f"--config-dir {here.folder / 'conf'} hardware={here.hardware_path.stem}"
        print(f"plan with it: python -m lorasweep {chosen} +sweep=study scale=paper action=plan")
    failed = [c for c in here.cases if "failed" in results.get(c.name, {})]
    return int(bool(page.failures(here.cases, results) or failed))


def _submit(request: Request) -> int:
    """Submit this command as a job, with one GPU if hardware= names GPUs."""
    cluster, exec_ = request.cluster, request.exec
    if request.hardware and not cluster.gpus:
        cluster = dataclasses.replace(cluster, gpus=1)
    folders = [f"exec.{n}_dir={getattr(exec_, f'{n}_dir')}" for n in ("runs", "reports")]
    arguments = ["action=check_gpu", *folders]
    if request.hardware:
        own = ["--config-dir", request.folders[0]] if len(request.folders) > 1 else []
        arguments = [*own, f"hardware={request.hardware['name']}", *arguments]
    notify = partial(print, file=sys.stderr)
    print(submit_command(cluster, exec_, arguments, "check_gpu", notify))
    if not cluster.gpus:
        print("the job has no GPU, so it measures small shapes: cluster.gpus=1 asks for one")
    return 0


class _Check:
    """A machine, its cases, and the folder of their results."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.machine = detect.this_machine()
        if shutil.which("nvidia-smi") and not self.machine.gpus:
            raise SpecError(
                f"this machine has nvidia-smi, but no GPU can be used: torch is "
                f"{metadata.version('torch')}, CUDA_VISIBLE_DEVICES is "
                f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}. Install a torch for "
                "CUDA, or ask for a GPU (in a Slurm job: --gpus=1)."
            )
        folders = [Path(f) for f in request.folders]
        self.size = all_cases.ON_GPU if self.machine.gpus else all_cases.ON_CPU
        precision = "fp32" if self.machine.fast_bf16 is False else "bf16"
        models = catalogue.models(folders)
        name, dataset = SMALL
        dataset = dataclasses.replace(dataset, max_length=32, n_test=32, n_test_curve=0)
        small = RunSpec(models[name](), dataset, lr=1e-3, batch_size=4)
        self.cases = all_cases.cases_of(models, small, self.size, precision)
        self.known = self._known(folders)
        versions = [metadata.version(p) for p in ("torch", "transformers", "peft")]
        card = self.machine.gpu_name or self.machine.processor or "cpu"
        self.slug = re.sub(r"[^a-z0-9]+", "_", card.lower()).strip("_")
        name = "-".join([self.slug, lorasweep.__version__, *versions])
        self.folder = Path(request.exec.reports_dir) / "check_gpu" / name
        self.page = self.folder / "page.md"
        self.hardware_path = self.folder / "conf" / "hardware" / f"{self.slug}_measured.yaml"
        self.threads = request.exec.threads or self.machine.cores or 1
        self.predicted: dict[str, Any] = files.read_json(self.folder / "predicted.json") or {}

    def _known(self, folders: list[Path]) -> Hardware | None:
        """Return the file of this card: hardware=NAME, or the one that names it."""
        if self.request.hardware:
            return hardware_of(self.request)
        machines = [read() for read in catalogue.machines(folders).values()]
        named = [m for m in machines if m.gpu_name and m.gpu_name == self.machine.gpu_name]
        return named[0] if named else None

    def results(self) -> dict[str, dict[str, Any]]:
        found = {c.name: process.result_of(self.folder, c) for c in self.cases}
        return {name: result for name, result in found.items() if result is not None}

    def measured(self) -> Hardware | None:
        """Return the machine with the constants of part 1; None before it."""
        node = self.results().get("node")
        if node is None or "failed" in node:
            return None
        return page.measured_hardware(node, self.known, self.hardware_path.stem)

    def measure(self, part: str) -> None:
        """Measure a part, and write page and hardware file."""
        hardware = self.known or self.measured()
        if not self.predicted and hardware is not None:  # before anything of speed is measured
            self.predicted = all_cases.predictions(self.cases, hardware)
            files.write_atomic(
                self.folder / "predicted.json", json.dumps(self.predicted, indent=1).encode()
            )
        if part != NODE and hardware is None:
            raise TrainingError(
                f"part 1 failed, so there are no constants to plan with: {self.folder / 'log.txt'} "
                "has the reason. With hardware=NAME (a file of conf/hardware) the others go on."
            )
        chosen = [c for c in self.cases if c.part == part]
        predicted = self.predicted.get("cases", {})
        process.measure(chosen, self.folder, self.threads, predicted, self._report)
        self.write()

    def write(self) -> None:
        """Write the page, and the hardware file if part 1 is measured."""
        results, measured = self.results(), self.measured()
        if measured is not None:
            self.hardware_path.parent.mkdir(parents=True, exist_ok=True)
            text = page.hardware_file(measured, results["node"], time.strftime("%Y-%m-%d"))
            files.write_atomic(self.hardware_path, text.encode())
        answer = files.read_json(self.folder / "answer.json")
        text = page.page(self.cases, self.predicted, results, answer, measured)
        files.write_atomic(self.page, text.encode())

    def _report(self, case: Case, result: dict[str, Any]) -> None:
        if self.request.format != "json":
            before = self.predicted.get("cases", {}).get(case.name, {})
            print(f"{case.part:12} {case.name}: {_line(result, before)}", flush=True)

    def answer(self) -> None:
        """Answer lr_ratio on this machine, and compare the estimates with the kept ones."""
        path = self.folder / "answer.json"
        if path.exists():
            return
        scale = "smoke" if self.size.shrunken else "tiny"
        folders = [f"exec.{n}_dir={self.folder / n}" for n in ("runs", "reports")]
        command = [sys.executable, "-m", "lorasweep", "+sweep=lr_ratio", f"scale={scale}", *folders]
        with (self.folder / "log.txt").open("a") as log:
            with_log = {"stdout": log, "stderr": log, "timeout": ANSWER_S}
            try:
                done = subprocess.run(command, **with_log)  # type: ignore[call-overload]
            except subprocess.TimeoutExpired:
                return
        title = f"lr_ratio-{scale}"
        here = files.read_json(self.folder / "reports" / title / "results.json")
        if done.returncode or here is None:
            print(f"answer: {title} failed; see {self.folder / 'log.txt'}", file=sys.stderr)
            return
        kept = files.read_json(KEPT / title / "results.json") or {"verdicts": []}
        found = {"sweep": title, "claims": compare(here["verdicts"], kept["verdicts"])}
        files.write_atomic(path, json.dumps(found).encode())
        self.write()


def compare(here: list[dict[str, Any]], kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each claim the estimate here, the kept one, and whether it lies in its interval.

    `inside` is None if one of the two is missing.
    """
    before = {(v["claim"], v["group"]): v["estimate"] for v in kept}
    claims = []
    for verdict in here:
        value = (verdict["estimate"] or {}).get("value")
        old = before.get((verdict["claim"], verdict["group"]))
        known = value is not None and old is not None and old["value"] is not None
        inside = old["low"] <= value <= old["high"] if known and old else None
        claims.append({"claim": verdict["claim"], "value": value, "kept": old, "inside": inside})
    return claims


def _line(result: dict[str, Any], predicted: dict[str, Any]) -> str:
    if "failed" in result:
        return f"failed: {result['failed']}"
    if "misfit" in result:
        return f"left out: {result['misfit']}"
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

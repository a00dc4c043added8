"""Measure step times of runs and packs on request (action=measure_packs), for the planner."""

import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Sequence

from lorasweep.errors import TrainingError
from lorasweep.launch.out_of_memory import is_out_of_memory
from lorasweep.launch.process import keep_freed_memory, worker_environment
from lorasweep.launch.trainer import TorchTrainer
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.planner import GPU_SIZES, SIZES, Speeds, measured_path, place, shape_of
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.store import files
from lorasweep.store.run_store import RunStore

BUDGET_S = 25.0
"""Seconds per shape (kind of run, `shape_of`) to try larger packs, until one is not faster."""
STEPS, WARM = 4, 1
"""Updates per measurement, and number of first updates that the median leaves out."""
MEMORY_SHARE = 0.7
"""Packs that are expected to need more than this fraction of a worker's memory are not measured."""


def measure_packs(
    specs: Sequence[RunSpec],
    store: RunStore,
    exec_: Exec,
    hardware: Hardware,
    report: files.Notify,
) -> None:
    """Measure the shapes of `specs` that were not measured on this machine, in this process.

    Raises TrainingError if the measurement fails; finished shapes are kept. Raises StoreError if
    another process is measuring in this run folder and does not end.
    """
    os.environ.update(worker_environment(threads=1))  # before torch is imported
    keep_freed_memory()
    shapes = list({shape_of(s): s for s in specs}.values())
    folder, trainer = store.root / ".calibration", TorchTrainer()
    with files.locked(folder / ".lock", 30 + 2 * BUDGET_S * len(shapes), report):
        known = Speeds(store, hardware, exec_)
        missing = [s for s in shapes if not known.of(s)]
        if not missing:
            return report("all kinds of run were measured on this machine before")
        bound = f"at most about {BUDGET_S * len(missing):.0f} s"
        report(f"measuring {len(missing)} kind(s) of run on this machine, once: {bound}")
        here = dataclasses.replace(exec_, threads=1, runs_dir=str(folder))
        for spec in missing:
            try:
                found: dict[str, object] = {"step_s": measure(spec, here, hardware, trainer)}
            except Exception as error:
                raise TrainingError(
                    f"the measurement failed: {error}. Run the sweep without it, or lower "
                    "exec.pack_size."
                ) from error
            found |= {"model": spec.model.name, "method": spec.method.name}
            found |= {"batch_size": spec.batch_size, "precision": spec.precision}
            path = measured_path(store.root, spec, hardware, exec_)
            files.write_atomic(path, json.dumps(found).encode())


def measure(
    spec: RunSpec, exec_: Exec, hardware: Hardware, trainer: TorchTrainer
) -> dict[int, float]:
    """Time STEPS updates of packs of runs like `spec`; return size -> seconds per step and run."""
    n_train = min(64, spec.dataset.n_train or 64)
    few = dataclasses.replace(spec.dataset, n_test=1, n_test_curve=1, n_train=n_train)
    spec = dataclasses.replace(spec, dataset=few, steps=STEPS, schedule="constant", warmup_steps=0)
    trainer.data(spec, exec_)  # loads the base
    found: dict[int, float] = {}
    left = BUDGET_S
    sizes = GPU_SIZES if hardware.gpus else SIZES
    for size in sizes[: 1 if spec.method.MAX_PACK == 1 else None]:
        planned = place(spec, hardware, size, exec_.micro_batch_size)
        most = MEMORY_SHARE * (hardware.worker_gib or math.inf)
        if size > 1 and planned.memory_gib > most:
            break
        started = time.monotonic()
        # learning rates too small to change anything
        pack = [dataclasses.replace(spec, lr=1e-6 * (1 + k)) for k in range(size)]
        try:
            as_planned = dataclasses.replace(exec_, micro_batch_size=planned.layout.rows)
            events = trainer(pack, as_planned, None)
            times = [next(iter(event.records.values()))["step_s"] for event in events]
        except Exception as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            break
        found[size] = statistics.median_high(times[WARM:])
        took = time.monotonic() - started
        left -= took
        if left < 2 * took or found[size] > 1.05 * min(found.values()):
            break
    return found

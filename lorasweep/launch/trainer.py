"""Load base and data of a pack, and train the pack; measure packs for the planner.

Functions import torch, for a fast start.
"""

import dataclasses
import hashlib
import importlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.errors import DataError, ModelError, TrainingError
from lorasweep.launch.out_of_memory import is_out_of_memory
from lorasweep.launch.process import StopFlag, Stopped, keep_freed_memory, worker_environment
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.planner import GPU_SIZES, SIZES, Speeds, measured_path, place, shape_of
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.store import files
from lorasweep.store.checkpoint import State
from lorasweep.store.run_store import RunStore
from lorasweep.train.events import Event

if TYPE_CHECKING:
    from lorasweep.data.examples import Data
    from lorasweep.models.load import Base
    from lorasweep.models.sharding import Mesh
    from lorasweep.train.objectives.base import Objective

TOKENS = ".tokens"
"""Folder in the run folder with tokenized text, shared by all workers."""
FINGERPRINTS = ".data"
"""Folder in the run folder with the data's fingerprint for every model and data set."""
BUDGET_S = 25.0
"""Seconds per shape (kind of run, `shape_of`) to try larger packs, until one is not faster."""
STEPS, WARM = 4, 1
"""Updates per measurement, and number of first updates that the median leaves out."""
MEMORY_SHARE = 0.7
"""Packs that are expected to need more than this fraction of a worker's memory are not measured."""
Report = Callable[[dict[str, Any]], None]
"""Receives events: {run, ended, ...}, {runs, step} after an update, {note} for the user."""


Events = Generator[Event, None, None]
Trainer = Callable[[list[RunSpec], Exec, dict[str, State] | None], Events]
"""Trains the runs of a pack together, from the start or from the states of all runs; yields an
event per update."""


def trainer_named(
    name: str | None, stop: StopFlag | None = None, mesh: "Mesh | None" = None
) -> Trainer:
    """Return the trainer `name` (package.module:object); None: TorchTrainer."""
    if name is None:
        return TorchTrainer(stop, mesh)
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


class TorchTrainer:
    """Trains packs; keeps the loaded base and data for the next pack."""

    def __init__(self, stop: StopFlag | None = None, mesh: "Mesh | None" = None) -> None:
        """Watch `stop` while a base is pretrained. `mesh`: processes that train a run together."""
        self._stop, self._mesh = stop or StopFlag(), mesh
        self._base: Base | None = None
        self._base_key: object = None
        self._data: dict[tuple[DatasetSpec, int | None], Any] = {}

    def __call__(
        self, pack: list[RunSpec], exec_: Exec, resume: dict[str, State] | None, /
    ) -> Events:
        """Train a pack on one base. Errors of data have an attribute: the `dataset` at fault."""
        base, data = self.base(pack[0], exec_), {}
        for spec in pack:
            try:
                data[spec.id] = self.data(spec, exec_, base)
            except (DataError, OSError) as error:
                error.__dict__["dataset"] = spec.dataset
                raise
        if base.mesh.size > 1:
            self._base = None  # a sharded model cannot be used again
        rows = exec_.micro_batch_size
        yield from finetune(pack, base, data, rows, resume, exec_.join_rows, exec_.forward_parts)

    def data(self, spec: RunSpec, exec_: Exec, base: "Base | None" = None) -> "Data":
        """Load the rows of a run; `base` has the tokenizer (None: the run's base is loaded).

        Raises DataError if the data cannot be used, or differ from those that the run folder knows:
        the analysis would refuse the runs, but only after training.
        """
        from lorasweep.data.load import load

        base = base or self.base(spec, exec_)
        cached = (spec.dataset, spec.draw)
        if cached in self._data:
            return self._data[cached]
        root = Path(exec_.runs_dir)
        data = load(spec.dataset, exec_.data_dir, base.tokenizer, str(root / TOKENS), spec.draw)
        if data.sha256 is not None and root.is_dir():
            key = f"{spec.model.canonical}{spec.dataset.canonical}".encode()
            path = root / FINGERPRINTS / f"{hashlib.sha256(key).hexdigest()[:16]}.json"
            mine = {"model": spec.model.name, "dataset": spec.dataset.name}
            mine |= {"data_sha256": data.sha256}
            if files.read_json(path) is None and os.access(root, os.W_OK):
                path.parent.mkdir(exist_ok=True)
                files.create_once(path, json.dumps(mine).encode())
            known = files.read_json(path) or mine  # another process may have been faster
            if known["data_sha256"] != data.sha256:
                raise DataError(
                    f"dataset {spec.dataset.name!r}: the data have changed since runs in {root} "
                    f"were trained on them ({path}). Restore the old data, give the new data "
                    f"another name, or use a new run folder (exec.runs_dir={root}-2)."
                )
        return self._data.setdefault(cached, data)

    def base(self, spec: RunSpec, exec_: Exec) -> "Base":
        """Return the base of a run, loaded unless it was the last one."""
        import torch

        from lorasweep.models import load as models
        from lorasweep.models.sharding import compute_again
        from lorasweep.train import pretrain

        if exec_.threads:
            torch.set_num_threads(exec_.threads)
        key = (spec.model, spec.precision, exec_.activation_checkpointing)
        if self._base is not None and self._base_key == key:
            return self._base
        self._base, self._data = None, {}  # one base in memory at a time
        if self._mesh is None or self._mesh.rank == 0:

            def check_stop(step: int, nll: float) -> None:
                if self._stop.set:
                    raise Stopped

            pretrain.ensure(spec.model, exec_.models_dir, check_stop)
        try:
            self._base = models.load(spec.model, exec_.models_dir, spec.precision, self._mesh)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise ModelError(
                f"model {spec.model.name!r}: its weights do not fit into the memory ({error}). "
                "Choose a smaller model=, or a larger device (see action=plan)."
            ) from None
        self._base_key = key
        if exec_.activation_checkpointing:
            compute_again(self._base.model)
        return self._base


def finetune(
    pack: Sequence[RunSpec],
    base: "Base",
    data: "Data | Mapping[str, Data]",
    micro_batch_size: int | None = None,
    resume: dict[str, State] | None = None,
    join_rows: bool = False,
    forward_parts: int = 1,
) -> Iterator[Event]:
    """Train the runs of `pack` together; yield an Event per update.

    `data`: one data set for all runs, or run id -> data set. `micro_batch_size`: sequences per run
    and training forward pass; None: all of an update. `resume`: run id -> state from an event's
    snapshot(), or of the run's trial, which is then measured (`measure_trials`).
    """
    from lorasweep.train.loop import measure_trials, train
    from lorasweep.train.objectives.policy_gradient import PolicyGradient
    from lorasweep.train.objectives.sft import SupervisedFineTuning

    kinds = {"sft": SupervisedFineTuning, "policy_gradient": PolicyGradient}
    by_run = data if isinstance(data, Mapping) else {s.id: data for s in pack}
    objective: Objective = kinds[pack[0].objective](
        by_run, pack[0].precision, micro_batch_size, join_rows, forward_parts
    )
    if resume and "result" in resume[pack[0].id]["meta"]:
        return measure_trials(pack, base, objective, resume)
    return train(pack, base, objective, resume)


# ---------------------------------------------------------------- action=measure_packs


def measure_packs(
    specs: Sequence[RunSpec],
    store: RunStore,
    exec_: Exec,
    hardware: Hardware,
    report: files.Notify,
) -> None:
    """Time STEPS updates of ever larger packs for each shape of `specs` that is not measured yet.

    Finished shapes are kept. Raises TrainingError if a measurement fails, StoreError if another
    process measures and does not end.
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
        report(f"measuring {len(missing)} kind(s) of run, about {BUDGET_S:.0f} s for each")
        here = dataclasses.replace(exec_, threads=1, runs_dir=str(folder))
        for spec in missing:
            n_train = min(64, spec.dataset.n_train or 64)
            few = dataclasses.replace(spec.dataset, n_test=1, n_test_curve=1, n_train=n_train)
            short: dict[str, Any] = {
                "dataset": few,
                "steps": STEPS,
                "schedule": "constant",
                "warmup_steps": 0,
            }
            spec_ = dataclasses.replace(spec, **short)
            step_s: dict[int, float] = {}
            left = BUDGET_S
            sizes = GPU_SIZES if hardware.gpus else SIZES
            for size in sizes[: 1 if spec.method.MAX_PACK == 1 else None]:
                planned = place(spec_, hardware, size, here.micro_batch_size)
                most = MEMORY_SHARE * (hardware.worker_gib or math.inf)
                if size > 1 and planned.memory_gib > most:
                    break
                # learning rates too small to change anything
                pack = [dataclasses.replace(spec_, lr=1e-6 * (1 + k)) for k in range(size)]
                as_planned = dataclasses.replace(here, micro_batch_size=planned.layout.rows)
                try:
                    trainer.data(spec_, here)  # loads the base, once
                    started = time.monotonic()
                    events = trainer(pack, as_planned, None)
                    times = [next(iter(event.records.values()))["step_s"] for event in events]
                except Exception as error:
                    if size > 1 and is_out_of_memory(error):
                        break
                    remedy = "Run the sweep without it, or lower exec.pack_size."
                    raise TrainingError(f"the measurement failed: {error}. {remedy}") from error
                step_s[size] = statistics.median_high(times[WARM:])
                took = time.monotonic() - started
                left -= took
                if left < 2 * took or step_s[size] > 1.05 * min(step_s.values()):
                    break
            found: dict[str, Any] = {
                "step_s": step_s,
                "model": spec.model.name,
                "method": spec.method.name,
            }
            found |= {"batch_size": spec.batch_size, "precision": spec.precision}
            path = measured_path(store.root, spec, hardware, exec_)
            files.write_atomic(path, json.dumps(found).encode())

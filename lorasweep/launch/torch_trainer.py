"""Load base and data of a pack, and train the pack.

Functions import torch, for a fast start.
"""

import hashlib
import importlib
import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.errors import DataError, ModelError
from lorasweep.launch import external
from lorasweep.launch.out_of_memory import is_out_of_memory
from lorasweep.launch.process import StopFlag, Stopped
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.store import files
from lorasweep.store.checkpoint import State
from lorasweep.train.events import Event

if TYPE_CHECKING:
    from lorasweep.data.examples import Data
    from lorasweep.models.load import Base
    from lorasweep.models.sharding import Mesh
    from lorasweep.train.loop import Objective

TOKENS = ".tokens"
"""Folder in the run folder with tokenized text, shared by all workers."""
FINGERPRINTS = ".data"
"""Folder in the run folder with the data's fingerprint for every model and data set."""
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
        if pack[0].trainer.command:
            yield from external.train(self, pack[0], exec_, self._stop)
            return
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
        yield from finetune(pack, base, data, rows, resume, exec_.forward_parts)

    def release(self) -> None:
        """Forget the base and the data."""
        self._base, self._base_key, self._data = None, None, {}

    def data(self, spec: RunSpec, exec_: Exec, base: "Base | None" = None) -> "Data":
        """Load the rows of a run; `base` has the tokenizer (None: the run's base is loaded).

        Raises DataError if the data cannot be used, or differ from those that the run folder knows:
        the analysis would refuse the runs, but only after training.
        """
        from lorasweep.data.splits import load

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
        by_run, pack[0].precision, micro_batch_size, forward_parts
    )
    if resume and "result" in resume[pack[0].id]["meta"]:
        return measure_trials(pack, base, objective, resume)
    return train(pack, base, objective, resume)

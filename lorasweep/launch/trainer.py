"""Load base and data of a pack, and train the pack. Functions import torch, for a fast start."""

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lorasweep.errors import DataError, ModelError
from lorasweep.launch.out_of_memory import is_out_of_memory
from lorasweep.launch.process import StopFlag, Stopped
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.execution import Exec
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import RunSpec
from lorasweep.store import files
from lorasweep.store.checkpoint import State
from lorasweep.train.events import Event

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from lorasweep.data.examples import Data, Example
    from lorasweep.models.load import Base
    from lorasweep.models.sharding import Mesh
    from lorasweep.train.objectives.base import Objective
    from lorasweep.train.objectives.sft import FirstLoss

TOKENS = ".tokens"
"""Folder in the run folder with tokenized text, shared by all workers."""
FINGERPRINTS = ".data"
"""Folder in the run folder with the data's fingerprint for every model and data set."""
EVAL_ROWS = 4
"""Default number of rows per forward pass without gradients; few, as logits take much memory."""
Report = Callable[[dict[str, Any]], None]
"""Receives events: {run, ended, ...} at the end of a run, {runs, step} after an update, {note} for
the user."""


class Trainer(Protocol):
    """Trains the runs of a pack together; yields an event per update."""

    def __call__(
        self, pack: list[RunSpec], exec_: Exec, resume: dict[str, State] | None, /
    ) -> Iterator[Event]:
        """Train from the start, or from the states of all runs in `resume`."""


class UnusableData(DataError):
    """Some data sets of a pack cannot be used. `causes`: run id -> cause, for runs on them."""

    def __init__(self, causes: dict[str, str]) -> None:
        super().__init__(next(iter(causes.values())))
        self.causes = causes


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
        self._base_key: tuple[ModelSpec, str, bool, bool] | None = None
        self._data: dict[tuple[DatasetSpec, int | None], Any] = {}

    def __call__(
        self, pack: list[RunSpec], exec_: Exec, resume: dict[str, State] | None, /
    ) -> Iterator[Event]:
        """Train a pack, whose runs share base model and precision."""
        base = self._load_base(pack[0], exec_)
        data, causes = {}, {}
        for spec in pack:
            try:
                data[spec.id] = self.data(spec, exec_, base)
            except DataError as error:
                if not exec_.skip_broken_data:
                    raise
                causes[spec.id] = str(error)
        if causes:
            raise UnusableData(causes)
        if base.mesh.size > 1:
            self._base = None  # a sharded model cannot be used again
        rows = exec_.micro_batch_size
        yield from finetune(pack, base, data, rows, resume, exec_.join_rows, exec_.forward_parts)

    def first_pass(self, spec: RunSpec, exec_: Exec) -> "list[FirstLoss]":
        """Return the loss of every batch of a run under the base model, without training."""
        from lorasweep.train.objectives.sft import first_pass

        base = self._load_base(spec, exec_)
        rows = exec_.micro_batch_size or EVAL_ROWS
        return first_pass(spec, base, self.data(spec, exec_, base), rows)

    def log_p(
        self,
        spec: RunSpec,
        exec_: Exec,
        rows: "Sequence[Example]",
        weights: "Mapping[str, Tensor] | None" = None,
    ) -> "np.ndarray":
        """Return log p of rows under a run's base, or with `weights` under its adapter."""
        from lorasweep.train.loop import log_p

        return log_p(self._load_base(spec, exec_), spec, rows, weights)

    def data(self, spec: RunSpec, exec_: Exec, base: "Base | None" = None) -> "Data":
        """Load the rows of a run; `base` has the tokenizer (None: the run's base is loaded).

        Raises DataError if the data cannot be used, or if their fingerprint differs from the one in
        the run folder. Otherwise the analysis would refuse the runs, but only after training.
        """
        from lorasweep.data.load import load

        base = base or self._load_base(spec, exec_)
        cached = (spec.dataset, spec.draw)
        if cached in self._data:
            return self._data[cached]
        root = Path(exec_.runs_dir)
        data = load(spec.dataset, exec_.data_dir, base.tokenizer, str(root / TOKENS), spec.draw)
        if data.sha256 is None or not root.is_dir():
            return self._data.setdefault(cached, data)
        key = hashlib.sha256(f"{spec.model.canonical}{spec.dataset.canonical}".encode()).hexdigest()
        path = root / FINGERPRINTS / f"{key[:16]}.json"
        mine = {"model": spec.model.name, "dataset": spec.dataset.name, "data_sha256": data.sha256}
        known = files.read_json(path)
        if known is None:
            try:
                path.parent.mkdir(exist_ok=True)
                files.create_once(path, json.dumps(mine).encode())
            except OSError as error:  # a read-only folder: no run is trained there
                if error.errno not in files.READ_ONLY:
                    raise
            known = files.read_json(path) or mine  # another process may have been faster
        if known["data_sha256"] != data.sha256:
            raise DataError(
                f"dataset {spec.dataset.name!r}: the data have changed since runs in {root} were "
                f"trained on them ({path}). Restore the old data, give the new data another name, "
                f"or use a new run folder (exec.runs_dir={root}-2)."
            )
        return self._data.setdefault(cached, data)

    def _load_base(self, spec: RunSpec, exec_: Exec) -> "Base":
        import torch

        from lorasweep.models import load as models
        from lorasweep.models.sharding import compute_again
        from lorasweep.train import pretrain

        if exec_.threads:
            torch.set_num_threads(exec_.threads)
        key = (spec.model, spec.precision, exec_.compile, exec_.activation_checkpointing)
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
        if exec_.compile:
            # without the unembedding, which is computed in chunks
            self._base.model.base_model.compile(dynamic=True)
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
    and training forward pass; None: all sequences of an update. `resume`: run id -> state from the
    snapshot() of an event, or the state of the run's trial, which is then measured (see
    `measure_trials`). `join_rows`, `forward_parts`: see Exec.
    """
    from lorasweep.train.loop import measure_trials, train
    from lorasweep.train.objectives.policy_gradient import PolicyGradient
    from lorasweep.train.objectives.sft import SupervisedFineTuning

    objectives: dict[str, Callable[..., Objective]]
    objectives = {"sft": SupervisedFineTuning, "policy_gradient": PolicyGradient}
    by_run = data if isinstance(data, Mapping) else {s.id: data for s in pack}
    objective = objectives[pack[0].objective](
        by_run, pack[0].precision, micro_batch_size, join_rows, forward_parts
    )
    if resume and "result" in resume[pack[0].id]["meta"]:
        return measure_trials(pack, base, objective, resume)
    return train(pack, base, objective, resume)

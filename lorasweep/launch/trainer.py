"""The interface of a trainer, and the real one.

Torch is imported inside functions, so that launching starts without it.
"""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lorasweep.errors import DataError, ModelError
from lorasweep.launch.data_identity import check_same_data
from lorasweep.launch.out_of_memory import is_out_of_memory
from lorasweep.launch.process import StopFlag, Stopped
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.execution import Exec
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import RunSpec
from lorasweep.store.checkpoint import State
from lorasweep.train.events import Event

if TYPE_CHECKING:
    from lorasweep.data.examples import Data
    from lorasweep.models.load import Base
    from lorasweep.models.sharding import Mesh
    from lorasweep.train.first_pass import Batch

TOKENS = ".tokens"
"""Folder in the run folder with tokenized text, which all workers share."""
EVAL_ROWS = 4
"""Rows of a forward pass without gradients where none are set: few, for the memory of logits."""
Report = Callable[[dict[str, Any]], None]
"""Receives events: {run, ended, ...} at the end of a run, {runs, step} after an update, {note} for
what the user should read."""


class UnusableData(DataError):
    """Data sets of a pack that cannot be used; the other runs can be trained without them."""

    def __init__(self, causes: dict[str, str]) -> None:
        """Hold the cause of each run, by its id."""
        super().__init__(next(iter(causes.values())))
        self.causes = causes


class Trainer(Protocol):
    """Trains the runs of a pack together and yields an event per update."""

    def __call__(
        self, pack: list[RunSpec], exec_: Exec, resume: dict[str, State] | None, /
    ) -> Iterator[Event]:
        """Train from the start, or from the states of all members."""


class TorchTrainer:
    """Trains packs with `lorasweep.train.finetune`. Keeps the loaded base and data for the next."""

    def __init__(self, stop: StopFlag | None = None, mesh: "Mesh | None" = None) -> None:
        """Look at `stop` while a base model is pretrained. The caller looks at it during runs.

        `mesh`: the processes that train together, each with such a trainer; None: this one alone.
        """
        self._stop, self._mesh = stop or StopFlag(), mesh
        self._base: Base | None = None
        self._base_key: tuple[ModelSpec, str, bool, bool] | None = None
        self._data: dict[tuple[DatasetSpec, int | None], Any] = {}

    def __call__(
        self, pack: list[RunSpec], exec_: Exec, resume: dict[str, State] | None, /
    ) -> Iterator[Event]:
        """Train a pack; its members share base model and precision."""
        import torch

        from lorasweep.train.finetune import finetune

        if exec_.threads:
            torch.set_num_threads(exec_.threads)
        base = self._load_base(pack[0], exec_)
        data = self._data_of(pack, exec_, base)
        if base.mesh.size > 1:
            self._base = None  # a model that was spread over processes cannot be used again
        how = (exec_.micro_batch_size, resume, exec_.join_rows, exec_.forward_parts)
        yield from finetune(pack, base, data, *how)

    def _data_of(self, pack: list[RunSpec], exec_: Exec, base: "Base") -> dict[str, Any]:
        data, causes = {}, {}
        for spec in pack:
            try:
                data[spec.id] = self._load_data(spec, exec_, base)
            except DataError as error:
                if not exec_.skip_broken_data:
                    raise
                causes[spec.id] = str(error)
        if causes:
            raise UnusableData(causes)
        return data

    def data(self, spec: RunSpec, exec_: Exec) -> "Data":
        """Load the rows of a run, and its base for the tokenizer."""
        data: Data = self._load_data(spec, exec_, self._load_base(spec, exec_))
        return data

    def first_pass(self, spec: RunSpec, exec_: Exec) -> "list[Batch]":
        """Return the loss of every batch of a run under its base, which learns nothing."""
        import torch

        from lorasweep.train.first_pass import first_pass

        if exec_.threads:
            torch.set_num_threads(exec_.threads)
        base = self._load_base(spec, exec_)
        rows = exec_.micro_batch_size or EVAL_ROWS
        return first_pass(spec, base, self._load_data(spec, exec_, base), rows)

    def _load_data(self, spec: RunSpec, exec_: Exec, base: "Base") -> Any:
        from lorasweep.data.load import load

        key = (spec.dataset, spec.draw)
        if key not in self._data:
            root = Path(exec_.runs_dir)
            cache = str(root / TOKENS)
            data = load(spec.dataset, exec_.data_dir, base.tokenizer, cache, spec.draw)
            check_same_data(root, spec, data.sha256)
            self._data[key] = data
        return self._data[key]

    def _load_base(self, spec: RunSpec, exec_: Exec) -> "Base":
        from lorasweep.models import load as models
        from lorasweep.models.sharding import compute_again
        from lorasweep.train import pretrain

        key = (spec.model, spec.precision, exec_.compile, exec_.activation_checkpointing)
        if self._base is None or self._base_key != key:
            self._base, self._data = None, {}  # one base in memory at a time
            if self._mesh is None or self._mesh.rank == 0:
                pretrain.ensure(spec.model, exec_.models_dir, self._go_on)
            try:
                self._base = models.load(spec.model, exec_.models_dir, spec.precision, self._mesh)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise ModelError(
                    f"model {spec.model.name!r}: its weights do not fit into the memory "
                    f"({type(error).__name__}: {error}). Choose a smaller model=, or a device with "
                    "more memory: action=plan says how much is expected."
                ) from None
            self._base_key = key
            if exec_.activation_checkpointing:
                compute_again(self._base.model)
            if exec_.compile:
                # without the unembedding, which is computed in chunks
                self._base.model.base_model.compile(dynamic=True)
        return self._base

    def _go_on(self, step: int, nll: float) -> None:
        if self._stop.set:
            raise Stopped


def trainer_named(
    name: str | None, stop: StopFlag | None = None, mesh: "Mesh | None" = None
) -> Trainer:
    """Return the trainer named `name` (package.module:object); None: the real one."""
    if name is None:
        return TorchTrainer(stop, mesh)
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)

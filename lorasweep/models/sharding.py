"""One run on several processes: their mesh, and a model sharded over it by FSDP2.

The only file that knows torch.distributed. With one process, a Mesh sends nothing.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint

from lorasweep.errors import ModelError, TrainingError

if TYPE_CHECKING:
    from lorasweep.methods.trainables import Trainables

T = TypeVar("T")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a split tensor, as a view; return other tensors unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Mesh:
    """The processes that train a run together; by default one."""

    rank: int = 0
    devices: DeviceMesh | None = None
    """None: one process."""
    entry: "_Entry | None" = None
    """The sharded model; None before `shard`."""

    @classmethod
    def join(cls) -> "Mesh":
        """Join the processes that torchrun started; with GPUs, use GPU number LOCAL_RANK."""
        kind, backend = "cpu", "gloo"
        if torch.cuda.is_available():
            kind, backend = "cuda", "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # the longest wait for the others, such as process 0 while it reads the weights
        dist.init_process_group(backend, timeout=timedelta(hours=2))
        return cls(dist.get_rank(), init_device_mesh(kind, (dist.get_world_size(),)))

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.devices.size() if self.devices else 1

    @property
    def device(self) -> torch.device:
        """Device of this process's tensors. Only for several processes."""
        assert self.devices is not None
        if self.devices.device_type == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def share(self, batches: Sequence[T]) -> list[T]:
        """Return this process's micro-batches of an update: every size-th one."""
        return list(batches[self.rank :: self.size])

    def turns(self, n: int) -> range:
        """Return this process's share of 0 .. n - 1; numbers >= n fill up to equal lengths."""
        return range(self.rank, -(-n // self.size) * self.size, self.size)

    def sum_(self, *tensors: torch.Tensor) -> None:
        """Sum tensors over the processes, in place."""
        if self.devices:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        flags = torch.tensor(int(flag))
        self.sum_(flags)
        return bool(flags)

    def broadcast(self, value: Any = None) -> Any:
        """Return process 0's value in every process."""
        values = [value]
        if self.devices:
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes."""
        found: list[Any] = [value] * self.size
        if self.devices:
            dist.all_gather_object(found, value)
        return found

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function`, which runs forward passes. All processes must call it together."""
        if self.entry is None:
            return function(*args)
        found = self.entry(function, *args)
        if not (isinstance(found, torch.Tensor) and found.requires_grad):
            for part in _split(self.entry):
                part.reshard()  # otherwise the backward pass reshards
        return found


ALONE = Mesh()


class _Entry(nn.Module):
    """The root module of FSDP2, in whose forward pass all code that uses the model runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def shard(model: nn.Module, trainables: "Trainables", mesh: Mesh, precision: str) -> Mesh:
    """Shard a model with its attached adapters; return the mesh that runs it.

    Process 0 has the values, on the CPU; in other processes tensors may be on the device 'meta'.
    All tensors except frozen vectors are split over all processes. A layer is gathered while it
    computes; tensors outside the layers stay gathered during a whole pass. Under bf16 a layer's
    matrices are sent in bf16, to which autocast would round them anyway. Gradients are summed,
    because the loss is already divided by the weight of the whole batch. ModelError: the number of
    processes does not fit the model.
    """
    assert mesh.devices is not None
    whole = {name: t.detach() for name, t in _tensors(model)} if mesh.rank == 0 else {}
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(p), []).append((module, name))

    def placement(p: nn.Parameter) -> Shard | None:
        # None: split along the first axis. A stack of one run cannot be split along it, and FSDP2
        # requires that the number of processes divides any other axis.
        if p.dim() < 3 or p.shape[0] > 1:
            return None
        fitting = [axis for axis in range(1, p.dim()) if p.shape[axis] % mesh.size == 0]
        if not fitting:
            raise ModelError(
                f"exec.world_size={mesh.size} divides no side of an adapter {tuple(p.shape[1:])}. "
                "Choose a number that divides the model's width, such as a power of 2."
            )
        return Shard(max(fitting, key=lambda axis: p.shape[axis]))

    ignored = {p for p in model.parameters() if p.dim() < 2 and not p.requires_grad}
    types = (torch.bfloat16, torch.float32) if precision == "bf16" else (None, None)
    common: dict[str, Any] = {"mesh": mesh.devices, "ignored_params": ignored}
    common |= {"shard_placement_fn": placement}
    plain = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in blocks(model):
        for part in block.modules():
            own = list(part.parameters(recurse=False))
            if own and all(p.dim() < 2 for p in own) and any(p.requires_grad for p in own):
                fully_shard(part, mp_policy=plain, reshard_after_forward=False, **common)
        policy = MixedPrecisionPolicy(*types, cast_forward_inputs=False)
        fully_shard(block, mp_policy=policy, **common)
    entry = _Entry(model)
    fully_shard(entry, mp_policy=plain, **common)
    for made in _split(entry):
        made.set_gradient_divide_factor(1.0)
        made.set_force_sum_reduction_for_comms(True)
    if mesh.rank:
        entry.to_empty(device=mesh.device)
        for first, *others in owners.values():  # tie the shared parameters again
            for module, name in others:
                setattr(module, name, getattr(*first))
    else:
        for _, tensor in _tensors(entry):
            if not isinstance(tensor, DTensor):  # FSDP2 moves DTensors
                tensor.data = tensor.data.to(mesh.device)
    with torch.no_grad():  # copy the values from process 0 to all parts
        for name, tensor in _tensors(model):
            if mesh.rank == 0:
                values = whole.pop(name).to(mesh.device)
            else:
                values = torch.empty(tensor.shape, dtype=tensor.dtype, device=mesh.device)
            if isinstance(tensor, DTensor):
                parts = distribute_tensor(values, mesh.devices, tensor.placements)
                local(tensor).copy_(local(parts))
            else:
                dist.broadcast(values, src=0)
                tensor.copy_(values)
    trainables.refresh()
    guard(model, trainables, mesh, [])
    return Mesh(mesh.rank, mesh.devices, entry)


def blocks(model: Any) -> list[nn.Module]:
    """Return the model's layers; raise ModelError if transformers does not name them."""
    names = set(model._no_split_modules or ())
    found = [m for m in model.modules() if type(m).__name__ in names]
    if not found:
        raise ModelError(
            f"{type(model).__name__} does not name its layers (_no_split_modules), so it cannot be "
            "spread over processes. Train it in one process: exec.world_size=1."
        )
    return found


@contextmanager
def layers_together(model: Any) -> Iterator[None]:
    """Keep the layers of a sharded model gathered over many forward passes, inside `Mesh.run`.

    So drawing a token sends no weights, and processes may draw different numbers of tokens.
    """
    names = {f"FSDP{name}" for name in model._no_split_modules or ()}  # as fully_shard names them
    layers = [part for part in _split(model) if type(part).__name__ in names]
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True, recurse=False)
            layer.reshard()


def compute_again(model: nn.Module) -> None:
    """Keep only each layer's input, and recompute its activations in the backward pass."""
    for block in blocks(model):
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )


def _split(entry: nn.Module) -> list[FSDPModule]:
    return [part for part in entry.modules() if isinstance(part, FSDPModule)]


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """List parameters and buffers by name, each once."""
    return [*model.named_parameters(), *model.named_buffers()]


def guard(model: nn.Module, trained: "Trainables", mesh: Mesh, measures: Sequence[float]) -> None:
    """Raise TrainingError if a trained tensor is not split, or processes differ in other tensors.

    `measures`: numbers that must also be equal in all processes, such as losses.
    """
    if not mesh.devices:
        return
    alone = "train in one process: exec.world_size=1."
    for name, p in trained.parameters().items():
        if not isinstance(p, DTensor) or p.device_mesh != mesh.devices:
            raise TrainingError(f"{name} is trained, but each process has its gradient: {alone}")
    whole = {n: t.detach().double() for n, t in _tensors(model) if not isinstance(t, DTensor)}
    sums = {n: (t.sum().item(), t.square().sum().item()) for n, t in whole.items()}
    found = mesh.gather((sums, list(measures)))
    if any(repr(other) != repr(found[0]) for other in found):
        names = [n for n in sums if any(other[0][n] != found[0][0][n] for other in found)]
        raise TrainingError(
            f"the processes of a run differ in {', '.join(names) or 'losses or gradients'}: "
            f"{[other[1] for other in found]}. Run the command again; if it happens again, {alone}"
        )


# ---------------------------------------------------------------- checkpoints
# Any number of processes can read a checkpoint of one or of several processes (one file each).


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], mesh: Mesh) -> dict[str, str]:
    """Write split tensors into an empty folder, in all processes; return file -> SHA-256."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:  # not an Exception: raise the first cause
        cause, _ = next(iter(error.failures.values()))
        raise cause from None
    sums = {}
    for path in folder.glob(f"shard-{mesh.rank + 1:05d}-*"):
        with open(path, "rb") as file:
            sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return {name: digest for found in mesh.gather(sums) for name, digest in found.items()}


@torch.no_grad()
def read_tensors(path: Path, tensors: Mapping[str, torch.Tensor], mesh: Mesh) -> None:
    """Read tensors in place, in all processes, from a folder of `write_tensors` or one file."""
    if path.is_dir():
        reader = HuggingFaceStorageReader(str(path))
        dcp.load(dict(tensors), storage_reader=reader, no_dist=mesh.size == 1)
        return
    with safe_open(path, framework="pt") as file:
        for name, tensor in tensors.items():
            part = file.get_slice(name)
            if isinstance(tensor, DTensor):
                shape, offset = compute_local_shape_and_global_offset(
                    tensor.shape, tensor.device_mesh, tensor.placements
                )
                at = tuple(slice(o, o + n) for o, n in zip(offset, shape))
                local(tensor).copy_(part[at] if 0 not in shape else local(tensor))
            else:
                tensor.copy_(part[:])

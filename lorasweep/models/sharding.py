"""One run on several processes: the mesh that they form, and a model spread over it by FSDP2.

The only file that knows of torch.distributed, with `sharded_tensors.py`. One process is a mesh of
one, for which everything here does nothing. Refuses to know methods, objectives and the run folder.

Every tensor of the model is split over all processes. A decoder layer is put together while it
computes, what is outside the layers during a whole pass. Gradients are summed over the processes:
the loss is already divided by the weight of the whole batch. Adapters must be attached before,
because FSDP2 reduces the gradients of what it has split only.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from lorasweep.errors import ModelError, TrainingError

if TYPE_CHECKING:
    from lorasweep.methods.trainables import Parameters, Trainables

T = TypeVar("T")
PATIENCE = timedelta(hours=2)
"""How long a process waits for the others, e.g. while process 0 reads the weights. Whoever started
the processes ends all of them as soon as one ends."""


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a split tensor, which shares its memory; others as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Mesh:
    """The processes that train a run together; by default this one alone."""

    rank: int = 0
    devices: DeviceMesh | None = None
    """None: one process."""
    entry: "_Entry | None" = None
    """The model that is spread over it; None: none yet."""

    @classmethod
    def join(cls) -> "Mesh":
        """Join the processes that torchrun's environment variables name, and wait for them.

        With GPUs each process takes the one with the number LOCAL_RANK.
        """
        kind, backend = "cpu", "gloo"
        if torch.cuda.is_available():
            kind, backend = "cuda", "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend, timeout=PATIENCE)
        return cls(dist.get_rank(), init_device_mesh(kind, (dist.get_world_size(),)))

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.devices.size() if self.devices else 1

    @property
    def device(self) -> torch.device:
        """Device of this process's tensors, of several processes."""
        assert self.devices is not None
        if self.devices.device_type == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def share(self, batches: Sequence[T]) -> list[T]:
        """Return this process's micro-batches of an update: every size-th one."""
        return list(batches[self.rank :: self.size])

    def turns(self, n: int) -> range:
        """Return this process's part of the numbers 0 to n - 1, as many as every process has.

        The last one may be n or more: then it is a repetition that does not count.
        """
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
        if not self.devices:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes."""
        found: list[Any] = [None] * self.size
        if not self.devices:
            return [value]
        dist.all_gather_object(found, value)
        return found

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function`, which runs forward passes of the model, in all processes at once."""
        if self.entry is None:
            return function(*args)
        found = self.entry(function, *args)
        if not (isinstance(found, torch.Tensor) and found.requires_grad):
            for part in _split(self.entry):
                part.reshard()  # no backward pass will do so
        return found


class _Entry(nn.Module):
    """The root that FSDP2 sees: whatever uses the model runs inside its forward pass.

    So parts of the model may be called on their own, several times.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def shard(model: nn.Module, trainables: "Trainables", mesh: Mesh, precision: str) -> Mesh:
    """Spread a model with what is attached to it over the mesh; return the mesh that runs it.

    Process 0 has the values, on the CPU; in the others tensors may be on the device 'meta'. Under
    bf16 a layer's matrices are sent in bf16, which autocast would round them to anyway; vectors
    stay as they are, and frozen ones are whole in every process.

    Raises:
        ModelError: the number of processes does not fit the model.
    """
    assert mesh.devices is not None
    whole = dict(_tensors(model)) if mesh.rank == 0 else {}
    whole = {name: t.detach() for name, t in whole.items()}
    tied = _tied(model)
    ignored = {p for p in model.parameters() if p.dim() < 2 and not p.requires_grad}
    bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    common: dict[str, Any] = {
        "mesh": mesh.devices,
        "ignored_params": ignored,
        "shard_placement_fn": lambda p: _placement(p, mesh.size),
    }
    plain = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in blocks(model):
        for part in block.modules():
            own = list(part.parameters(recurse=False))
            if own and all(p.dim() < 2 for p in own) and any(p.requires_grad for p in own):
                fully_shard(part, mp_policy=plain, reshard_after_forward=False, **common)
        fully_shard(block, mp_policy=bf16 if precision == "bf16" else plain, **common)
    entry = _Entry(model)
    fully_shard(entry, mp_policy=plain, **common)
    for split in _split(entry):
        split.set_gradient_divide_factor(1.0)
        split.set_force_sum_reduction_for_comms(True)
    if mesh.rank:
        entry.to_empty(device=mesh.device)
        for first, *others in tied:
            for module, name in others:
                setattr(module, name, getattr(*first))
    else:
        _move_whole(entry, mesh.device)
    _fill(model, whole, mesh)
    trainables.spread()
    guard(model, trainables, mesh, [])
    return Mesh(mesh.rank, mesh.devices, entry)


def blocks(model: Any) -> list[nn.Module]:
    """Return the model's layers, each of which is put together and computed again as a whole.

    Raises:
        ModelError: transformers does not say which modules these are.
    """
    names = set(model._no_split_modules or ())
    found = [m for m in model.modules() if type(m).__name__ in names]
    if not found:
        raise ModelError(
            f"{type(model).__name__} does not name its layers (_no_split_modules), so it cannot be "
            "spread over processes. Train it in one: exec.world_size=1."
        )
    return found


@contextmanager
def layers_together(model: Any) -> Iterator[None]:
    """Keep the layers of a spread model together once they are, over many forward passes.

    So drawing a token sends nothing, and processes may draw different numbers of tokens. To be used
    inside `Mesh.run`. A model of one process stays as it is.
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
    """Keep a layer's input only, and compute its activations again in the backward pass."""
    for block in blocks(model):
        forward = block.forward

        def again(*args: Any, forward: Callable[..., Any] = forward, **kwargs: Any) -> Any:
            return checkpoint(
                forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
            )

        block.forward = again


def _split(entry: nn.Module) -> list[FSDPModule]:
    return [part for part in entry.modules() if isinstance(part, FSDPModule)]


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """List parameters and buffers by name, each once."""
    return [*model.named_parameters(), *model.named_buffers()]


def _tied(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """List the parameters that several modules have, as (module, name) each."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(p), []).append((module, name))
    return [found for found in owners.values() if len(found) > 1]


def _placement(p: nn.Parameter, size: int) -> Shard | None:
    """Choose the axis along which a tensor is split; None: the first.

    That of a stack of one member is of no use. FSDP2 asks that the size divides any other axis.
    """
    if p.dim() < 3 or p.shape[0] > 1:
        return None
    fitting = [axis for axis in range(1, p.dim()) if p.shape[axis] % size == 0]
    if not fitting:
        raise ModelError(
            f"exec.world_size={size} divides no side of an adapter {tuple(p.shape[1:])}, so it "
            "cannot be split. Choose a number that divides the model's width, such as a power of 2."
        )
    return Shard(max(fitting, key=lambda axis: p.shape[axis]))


def _move_whole(entry: nn.Module, device: torch.device) -> None:
    """Move what is not split to the device, which FSDP2 does for what it splits."""
    for _, tensor in _tensors(entry):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)


@torch.no_grad()
def _fill(model: nn.Module, whole: dict[str, torch.Tensor], mesh: Mesh) -> None:
    """Copy process 0's values, by name, into every process's part."""
    assert mesh.devices is not None
    for name, tensor in _tensors(model):
        if mesh.rank == 0:
            values = whole.pop(name).to(mesh.device)
        else:
            values = torch.empty(tensor.shape, dtype=tensor.dtype, device=mesh.device)
        if isinstance(tensor, DTensor):
            placements = tensor.placements
            local(tensor).copy_(local(distribute_tensor(values, mesh.devices, placements)))
        else:
            dist.broadcast(values, src=0)
            tensor.copy_(values)


def guard(model: nn.Module, trained: "Parameters", mesh: Mesh, measures: Sequence[float]) -> None:
    """Check that all that is trained is split over the mesh, and what is not split is the same.

    `measures`: what every process must have found equal, such as losses and gradient norms.

    Raises:
        TrainingError: it is not.
    """
    if not mesh.devices:
        return
    for name, p in trained.parameters().items():
        if not isinstance(p, DTensor) or p.device_mesh != mesh.devices:
            raise TrainingError(
                f"{name} is trained but not spread over the processes, so its gradient would be "
                "that of one process only. Train in one process: exec.world_size=1."
            )
    whole = {n: t.detach().double() for n, t in _tensors(model) if not isinstance(t, DTensor)}
    sums = {n: (t.sum().item(), t.square().sum().item()) for n, t in whole.items()}
    found = mesh.gather((sums, list(measures)))
    if any(repr(other) != repr(found[0]) for other in found):
        names = [n for n in sums if any(other[0][n] != found[0][0][n] for other in found)]
        raise TrainingError(
            f"the processes of a run differ in {', '.join(names) or 'losses or gradients'}: "
            f"{[other[1] for other in found]}. Their results would be worthless. Run the command "
            "again; if it happens again, train in one process: exec.world_size=1."
        )

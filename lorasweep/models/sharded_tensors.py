"""Write and read the tensors of a run that several processes hold, by torch.distributed.checkpoint.

Each process writes one safetensors file, which holds no code. They can be read by any number of
processes, and so can the one file that a single process writes.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lorasweep.models.sharding import Mesh, local


def write(folder: Path, tensors: Mapping[str, torch.Tensor], mesh: Mesh) -> dict[str, str]:
    """Write split tensors into an empty folder, in all processes at once.

    Returns the SHA-256 of each file by name.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:  # not an Exception; what went wrong in the first process
        cause, _ = next(iter(error.failures.values()))
        raise cause from None
    sums = {}
    for path in folder.glob(f"shard-{mesh.rank + 1:05d}-*"):
        with open(path, "rb") as file:
            sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return {name: digest for found in mesh.gather(sums) for name, digest in found.items()}


@torch.no_grad()
def read(path: Path, tensors: Mapping[str, torch.Tensor], mesh: Mesh) -> None:
    """Read tensors in place, in all processes at once.

    `path`: a folder of `write`, or one safetensors file with whole tensors.
    """
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

"""The real trainer with little memory: the last process runs out, and the others wait for it."""

from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lorasweep.launch.trainer import TorchTrainer
from lorasweep.models.sharding import Mesh

ERROR = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has a total capacity of 79.10 GiB"
ROOM = 1
"""Rows that fit."""
BACKWARDS = 5
"""Backward passes that succeed before, so that there is a checkpoint to resume from."""


def trainer(pack, exec_, resume):
    """Train as usual until more than ROOM rows are in a forward pass."""
    mesh = Mesh(dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),)))
    was, done = torch.autograd.backward, []

    def backward(*args, **kwargs):
        done.append(None)
        full = exec_.rows_of(pack[0].batch_size) > ROOM
        if full and mesh.rank == mesh.size - 1 and len(done) > BACKWARDS:
            raise torch.OutOfMemoryError(ERROR)
        return was(*args, **kwargs)

    with mock.patch("torch.autograd.backward", backward):
        yield from TorchTrainer(None, mesh)(pack, exec_, resume)

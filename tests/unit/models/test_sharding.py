"""The mesh: who takes which batches, what its guard refuses, what a process holds whole."""

import dataclasses
import json
import os
import socket
from types import SimpleNamespace

import pytest
import torch

from lorasweep.errors import TrainingError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.models.forward import autocast, hold_in_bf16
from lorasweep.models.sharding import Mesh, guard, shard
from lorasweep.models.targets import find_targets
from lorasweep.plan.load import Layout, load_of, memory_parts
from tests.unit.plan.test_saved_tensors import LLAMA, transformers_model


class Three(Mesh):
    """A mesh of three without processes."""

    size = 3

    def gather(self, value):
        return [value, value, self.other(value)]


def test_every_batch_is_taken_once_and_all_take_as_many_turns():
    mine = [list(Three(rank).turns(7)) for rank in range(3)]
    assert mine == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]  # 7 and 8 are repetitions
    assert [Three(rank).share("abcdef") for rank in range(3)] == [[*"ad"], [*"be"], [*"cf"]]
    assert list(Mesh().turns(3)) == [0, 1, 2] and Mesh().share("abc") == [*"abc"]


def test_the_guard_refuses_a_trained_tensor_that_is_not_split_and_processes_that_differ():
    """The first is what happens to adapters that are attached to a model already split: its loss is
    right, and the gradients are those of one process."""
    model, mesh = torch.nn.Linear(2, 2), Three(devices=object())
    none, trained = (
        SimpleNamespace(parameters=lambda p=p: p) for p in ({}, {"adapter": torch.zeros(2)})
    )
    with pytest.raises(TrainingError, match="adapter is trained, but each"):
        guard(model, trained, mesh, [])
    mesh.__class__.other = staticmethod(lambda value: (value[0], [1.5]))
    with pytest.raises(TrainingError, match="differ in losses or gradients"):
        guard(model, none, mesh, [1.0])
    mesh.__class__.other = staticmethod(lambda value: ({**value[0], "bias": (0.0, 1.0)}, value[1]))
    with pytest.raises(TrainingError, match="differ in bias"):
        guard(model, none, mesh, [1.0])
    mesh.__class__.other = staticmethod(lambda value: value)
    guard(model, none, mesh, [1.0, float("nan")])


METHODS = {"full": FullFT(), "adapters": LoRA(rank=2, layers="attention+mlp")}
OUTER = dataclasses.replace(LLAMA, hidden_size=64, mlp_size=128, vocab_size=4096)


def measure(rank, port, folder):
    """In one of two processes: write the bytes of whole weights and gradients, by method and part."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    joined, found = Mesh.join(), {}
    for name, method in METHODS.items():
        bytes_of = found[name] = {k: [] for k in ("outer", "outer grads", "layer", "layer grads")}
        model = transformers_model(OUTER)
        hold_in_bf16(model)
        targets = find_targets(model, OUTER, method.target_layers())
        mesh = shard(model, method.attach(model, targets, [method], [0]), joined, "bf16")

        def note(part, weights, bytes_of=bytes_of):
            for w in weights:
                bytes_of[part].append(w.nbytes)
                if w.requires_grad:
                    count = bytes_of[f"{part} grads"].append
                    w.register_hook(lambda g, count=count: count(g.nbytes))

        def loss(model, tokens, note=note):
            inside = {id(p) for p in model.model.layers.parameters()}
            note("outer", [p for p in model.parameters() if id(p) not in inside])
            first = model.model.layers[0]
            hook = first.register_forward_pre_hook(lambda b, _: note("layer", b.parameters()))
            with autocast("bf16", tokens.device):
                total = model(input_ids=tokens, use_cache=False).logits.float().sum()
            hook.remove()
            return total

        mesh.run(loss, model, torch.zeros(1, 8, dtype=torch.int64)).backward()
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.mark.full
@pytest.mark.slow
def test_the_plan_counts_what_a_process_of_several_holds_whole(tmp_path):
    """A layer arrives in bf16, a trained embedding or unembedding in fp32, as its gradient."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(measure, (str(port), tmp_path), nprocs=2)
    found = json.loads((tmp_path / "found.json").read_text())
    found = {m: {part: sum(counts) for part, counts in of.items()} for m, of in found.items()}
    n_outer = 2 * 4096 * 64
    for name, per_weight in (("full", [4, 4]), ("adapters", [2, 0])):
        outer = [found[name][part] / n_outer for part in ("outer", "outer grads")]
        assert outer == pytest.approx(per_weight, rel=0.01)
    for name, method in METHODS.items():
        held = found[name]
        # of no tokens, so that gradients have no room where activations were
        planned = memory_parts(load_of(OUTER, method), Layout(2, 1, False), 0)
        # two layers at a time, and of one of them gradients in bf16 that are reduced in fp32
        reduced = 2 * held["layer grads"]
        whole = held["outer"] + held["outer grads"] + 2 * held["layer"] + held["layer grads"]
        assert planned["copies and buffers"] == pytest.approx(whole + reduced, rel=0.01)

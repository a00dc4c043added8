"""A base published in bf16 stays bf16 while it is frozen: the same bits everywhere, half the bytes.
Attention of short rows on a CPU is torch's, in float64. The mesh: who takes which batches, what its
guard refuses, what a process holds whole."""

import copy
import dataclasses
import json
import os
import socket
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import Gemma2Config

from lorasweep.data import load as data
from lorasweep.data.examples import collate, merge
from lorasweep.errors import ModelError, TrainingError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.models.forward import SHORT_BYTES, attention, autocast, frozen_in_bf16, hold_in_bf16
from lorasweep.models.load import find_targets, weights_sha256
from lorasweep.models.sharding import Mesh, guard, shard
from lorasweep.plan.load import Layout, load_of, memory_parts
from lorasweep.train.objectives.nll import nll_sums
from tests.training import family_model, pack_of, run
from tests.unit.plan.test_saved_tensors import LLAMA
from tests.world import tiny_spec


@pytest.fixture(scope="module")
def world():
    """The shipped base, whose weights are bf16 numbers, held in fp32 and in bf16."""
    spec = tiny_spec(precision="bf16", method=LoRA(rank=4), lr=5e-3, steps=3)
    shapes = (dataclasses.replace(spec.model, weights_dtype=t) for t in ("fp32", "bf16"))
    wide, narrow = (models.load(shape, [], "bf16") for shape in shapes)
    return spec, wide, narrow, data.load(spec.dataset, [])


def of_family(family, tied):
    wide = family_model(family, tie_word_embeddings=tied)
    for p in wide.parameters():
        p.data = p.data.bfloat16().float()
    narrow = copy.deepcopy(wide)
    hold_in_bf16(narrow)
    return wide, narrow


def test_matrices_are_bf16_and_the_base_is_the_same(world):
    spec, wide, narrow, _ = world
    norms = {n: p for n, p in narrow.model.named_parameters() if "norm" in n}
    types = {n: p.dtype for n, p in narrow.model.named_parameters()}
    assert all(t == (torch.float32 if n in norms else torch.bfloat16) for n, t in types.items())
    n_norms = sum(p.numel() for p in norms.values())
    held = sum(p.nbytes for p in narrow.model.parameters())
    assert held == 2 * (spec.model.n_params - n_norms) + 4 * n_norms
    assert wide.sha256 == narrow.sha256 == weights_sha256(narrow.model)
    in_fp32 = models.load(dataclasses.replace(spec.model, weights_dtype="bf16"), [], "fp32")
    assert {p.dtype for p in in_fp32.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_logits_loss_and_gradients_have_the_same_bits(world, family, tied):
    batch = merge([collate(world[3].train(k, 0, 3)) for k in range(2)])
    found = []
    for model in of_family(family, tied):
        with torch.no_grad(), autocast("bf16", torch.device("cpu")):
            logits = model(input_ids=torch.from_numpy(batch.tokens_NRT).flatten(0, 1)).logits
        params = pack_of([LoRA(rank=2), LoRA(rank=3)], model, perturb=0.1).parameters()
        assert {p.dtype for p in params.values()} == {torch.float32}
        sums = nll_sums(model, batch, "bf16")
        sums.sum().backward()
        found.append([logits, sums.detach(), *(p.grad for p in params.values())])
    assert len(found[0]) > 20 and all(map(torch.equal, *found))
    assert all(float(g.abs().max()) > 0 for g in found[1])
    with frozen_in_bf16(model := of_family(family, tied)[0].requires_grad_(False), "bf16"):
        held = model.lm_head, model.model.layers[0].mlp.up_proj, model.model.norm
        assert [m.weight.dtype.itemsize for m in held] == [2, 2, 4]


@pytest.mark.parametrize(
    "method", [LoRA(rank=4), FullFT(), FullFT(scope="matrices", layers="mlp")], ids=lambda m: m.name
)
def test_whole_runs_have_the_same_bits(world, method):
    """Full fine-tuning has fp32 masters of the trained matrices only, and restores the base."""
    spec, wide, narrow, rows = world
    spec = dataclasses.replace(spec, method=method, lr=1e-3)
    (a, records_a), (b, records_b) = (run([spec], base, rows) for base in (wide, narrow))
    for name, tensor in a[spec.id]["tensors"].items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, b[spec.id]["tensors"][name]), name
    for one, other in zip(records_a[spec.id], records_b[spec.id]):
        assert all(one[k] == other[k] for k in ("train_nll", "grad_norm"))
    last = [r[spec.id][-1]["test_nll"] for r in (records_a, records_b)]
    assert last[0] == last[1] != records_a[spec.id][0]["test_nll"]
    assert {b.sha256 for b in (wide, narrow)} == {weights_sha256(b.model) for b in (wide, narrow)}
    trainables = pack_of([method], narrow.model, spec.model)
    types = {n: p.dtype for n, p in narrow.model.named_parameters() if "norm" not in n}
    trained = trainables.parameters().keys()
    trainables.detach()
    wanted = {n: torch.float32 if n in trained else torch.bfloat16 for n in types}
    assert types == wanted or method.name == "lora"  # its adapters are no part of the base


def test_weights_that_are_finer_than_described_are_refused(world):
    spec = world[0]
    model = models.load(spec.model, [], "fp32").model
    described = dataclasses.replace(spec.model, weights_dtype="bf16")
    models.check_shape(model, described)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1 + 1e-4
    models.check_shape(model, spec.model)
    with pytest.raises(ModelError, match=r"weights_dtype is fp32 \(lm_head\.weight\)"):
        models.check_shape(model, described)


def test_a_module_that_does_more_with_its_weight_keeps_it():
    class Scaled(torch.nn.Embedding):
        def forward(self, x):
            return super().forward(x) * torch.tensor(3.3).to(self.weight.dtype)

    head, own = torch.nn.Linear(2, 4), torch.nn.Linear(2, 2)
    model = torch.nn.ModuleDict({"e": Scaled(4, 2), "head": head, "own": own})
    head.weight = model["e"].weight
    hold_in_bf16(model)
    assert head.weight.dtype == torch.float32
    assert (own.weight.dtype, own.bias.dtype) == (torch.bfloat16, torch.float32)


# ---------------------------------------------------------------- attention of short rows on a CPU


@pytest.mark.parametrize("tokens", [48, 1 + SHORT_BYTES // 8])
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_and_gradients_are_torchs(tokens, masked):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, tokens, 16).double().requires_grad_() for n in (6, 2, 2))
    some = torch.rand(2, 1, tokens, tokens).lt(0.5) | torch.eye(tokens).bool()
    mask, module = some if masked else None, Mock(num_key_value_groups=3, is_causal=True)
    want = sdpa(q, k, v, mask, is_causal=mask is None, scale=0.3, enable_gqa=True).transpose(1, 2)
    outputs = attention(module, q, k, v, mask, scaling=0.3)[0], want
    found = [[out, *torch.autograd.grad(out.square().sum(), (q, k, v))] for out in outputs]
    torch.testing.assert_close(*found)
    with patch("transformers.integrations.sdpa_attention.sdpa_attention_forward") as left:
        attention(module, q, k, v, mask, scaling=0.3, softcap=20.0)
    assert left.call_args.kwargs == {"scaling": 0.3, "softcap": 20.0}  # it cannot compute these


def test_a_softcap_of_scores_is_not_dropped():
    """On transformers 5.8 Gemma 2 takes torch's attention, which has none."""
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    spec = tiny_spec().model
    for softcap, kinds in ((20.0, {"eager"}), (None, {"eager", "short_rows"})):
        config = Gemma2Config(**small, **heads, attn_logit_softcapping=softcap)
        assert models.without_weights(config, spec, "fp32").config._attn_implementation in kinds


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
        model = models.empty_model(OUTER).eval()
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

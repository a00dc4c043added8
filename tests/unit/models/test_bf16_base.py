"""A base published in bf16 stays bf16 while it is frozen: the same bits everywhere, half the bytes."""

import copy
import dataclasses

import pytest
import torch

from lorasweep.data import load as data
from lorasweep.data.batches import collate, merge
from lorasweep.errors import ModelError, SpecError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.models.load import weights_sha256
from lorasweep.models.precision import autocast, hold_in_bf16
from lorasweep.models.recipe import empty_model
from lorasweep.spec.run import validate
from lorasweep.train.objectives import nll
from tests.training import attached, run
from tests.world import compose_request, tiny_spec


@pytest.fixture(scope="module")
def world():
    """The shipped base, whose weights are bf16 numbers, held in fp32 and in bf16."""
    spec = tiny_spec(precision="bf16", method=LoRA(rank=4), lr=5e-3, steps=3)
    model = dataclasses.replace(spec.model, weights_dtype="bf16")
    wide = models.load(spec.model, ["/nonexistent"], "bf16")
    narrow = models.load(model, ["/nonexistent"], "bf16")
    return spec, wide, narrow, data.load(spec.dataset, [])


@pytest.fixture(params=["cpu_llama", "transformers"])
def passes(request, monkeypatch):
    if request.param == "transformers":
        monkeypatch.setattr(nll, "cpu_llama_for", lambda model: None)


def of_family(family, tied):
    """A random model of bf16 numbers, held in fp32 and in bf16."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=32,
        tie_word_embeddings=tied,
        pad_token_id=None,
    )
    wide = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in wide.parameters():
            p.copy_(p.bfloat16())
    narrow = copy.deepcopy(wide)
    hold_in_bf16(narrow)
    return wide, narrow


def bytes_of(model):
    return sum(p.numel() * p.element_size() for p in model.parameters())


def test_matrices_are_bf16_and_the_base_is_the_same(world):
    spec, wide, narrow, _ = world
    types = {n: p.dtype for n, p in narrow.model.named_parameters()}
    norms = {n for n in types if "norm" in n}
    assert {types[n] for n in norms} == {torch.float32}
    assert {types[n] for n in types.keys() - norms} == {torch.bfloat16}
    n_norms = sum(p.numel() for n, p in narrow.model.named_parameters() if n in norms)
    assert bytes_of(narrow.model) == 2 * (spec.model.n_params - n_norms) + 4 * n_norms
    assert wide.sha256 == narrow.sha256 == weights_sha256(narrow.model)
    in_fp32 = dataclasses.replace(spec.model, weights_dtype="bf16")
    base = models.load(in_fp32, ["/nonexistent"], "fp32")
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}


def test_llama_8b_takes_the_bytes_that_a_plan_counts():
    """On torch's meta device, which holds shapes only: 15.0 GiB, where fp32 takes 29.9."""
    shape = compose_request(["model=llama-3.1-8b"]).points[0].spec.model
    with torch.device("meta"):
        model = empty_model(shape)
    assert bytes_of(model) == 4 * shape.n_params
    hold_in_bf16(model)
    assert bytes_of(model) == pytest.approx(2 * shape.n_params, rel=1e-3)
    assert bytes_of(model) / 2**30 == pytest.approx(15.0, abs=0.05)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_logits_loss_and_gradients_have_the_same_bits(world, passes, family, tied):
    spec, rows = world[0], world[3]
    batch = merge([collate(rows.train(k, 0, 3)) for k in range(2)])
    found = []
    for model in of_family(family, tied):
        with torch.no_grad(), autocast("bf16", torch.device("cpu")):
            logits = model(input_ids=torch.from_numpy(batch.tokens_NX)).logits
        linears = {n: m for n, m in model.named_modules() if type(m) is torch.nn.Linear}
        methods = [LoRA(rank=2), LoRA(rank=3)]
        trainables = methods[0].attach(model, linears, methods, [0, 1])
        params = trainables.parameters()
        torch.manual_seed(1)
        with torch.no_grad():
            for p in params.values():
                assert p.dtype == torch.float32
                p.add_(torch.randn_like(p), alpha=0.1)
        sums = nll.nll_sums(model, batch, spec.precision)
        sums.sum().backward()
        found.append(
            {"logits": logits, "sums": sums.detach(), **{n: p.grad for n, p in params.items()}}
        )
    wide, narrow = found
    assert len(wide) > 20 and all(torch.equal(wide[n], narrow[n]) for n in wide)
    assert all(float(g.abs().max()) > 0 for g in narrow.values())


@pytest.mark.parametrize(
    "method", [LoRA(rank=4), FullFT(), FullFT(scope="matrices", layers="mlp")], ids=lambda m: m.name
)
def test_whole_runs_have_the_same_bits(world, passes, method):
    """Full fine-tuning trains fp32 masters, of what it trains only, and puts the base back."""
    spec, wide, narrow, rows = world
    spec = dataclasses.replace(spec, method=method, lr=1e-3)
    (a, records_a), (b, records_b) = (run([spec], base, rows) for base in (wide, narrow))
    for name, tensor in a[spec.id]["tensors"].items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, b[spec.id]["tensors"][name]), name
    for one, other in zip(records_a[spec.id], records_b[spec.id]):
        assert [one[k] for k in ("train_nll", "grad_norm")] == [
            other[k] for k in ("train_nll", "grad_norm")
        ]
    last = [r[spec.id][-1]["test_nll"] for r in (records_a, records_b)]
    assert last[0] == last[1] != records_a[spec.id][0]["test_nll"]
    assert weights_sha256(narrow.model) == narrow.sha256
    assert narrow.model.lm_head.weight.dtype == torch.bfloat16


def test_only_what_is_trained_becomes_fp32(world):
    spec, _, narrow, _ = world
    trainables = attached(FullFT(scope="matrices", layers="mlp"), narrow.model, spec.model)
    try:
        types = {n: p.dtype for n, p in narrow.model.named_parameters() if "norm" not in n}
        trained = set(trainables.parameters())
        assert {types[n] for n in trained} == {torch.float32}
        assert {types[n] for n in types.keys() - trained} == {torch.bfloat16}
    finally:
        trainables.detach()


def test_the_backward_pass_keeps_no_copies_of_frozen_matrices():
    """Autocast's copies of fp32 matrices live until the backward pass; of bf16 ones there are none."""
    rows = data.load(tiny_spec().dataset, [])
    batch = collate(rows.train(0, 0, 3))
    kept = []
    for model in of_family("Qwen3", False):
        linears = {n: m for n, m in model.named_modules() if type(m) is torch.nn.Linear}
        LoRA(rank=2).attach(model, linears, [LoRA(rank=2)], [0])
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {}

        def pack(t, own=own, storages=storages):
            if t.untyped_storage().data_ptr() not in own:
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = nll.nll_sums(model, batch, "bf16").sum()
        kept.append(sum(s.nbytes() for s in storages.values()))
        del loss
    first = [f"model.layers.0.self_attn.{m}_proj" for m in "qkv"]  # their input needs no gradient
    copies = sum(2 * m.weight.numel() for n, m in linears.items() if n not in first)
    assert kept[0] - kept[1] == copies > 0


def test_weights_that_are_finer_than_described_are_refused(world):
    spec = world[0]
    model = models.load(spec.model, ["/nonexistent"], "fp32").model
    described = dataclasses.replace(spec.model, weights_dtype="bf16")
    models.check_shape(model, described)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1 + 1e-4
    models.check_shape(model, spec.model)
    with pytest.raises(ModelError, match=r"weights_dtype is fp32 \(lm_head\.weight\)"):
        models.check_shape(model, described)
    with pytest.raises(SpecError, match=r"weights_dtype='fp8'\. Allowed: fp32, bf16"):
        validate(
            dataclasses.replace(spec, model=dataclasses.replace(spec.model, weights_dtype="fp8"))
        )


def test_a_module_that_does_more_with_its_weight_keeps_it():
    class Scaled(torch.nn.Embedding):
        def forward(self, x):
            return super().forward(x) * torch.tensor(3.3).to(self.weight.dtype)

    model = torch.nn.ModuleDict(
        {"e": Scaled(4, 2), "head": torch.nn.Linear(2, 4), "own": torch.nn.Linear(2, 2)}
    )
    model["head"].weight = model["e"].weight
    hold_in_bf16(model)
    assert model["head"].weight.dtype == torch.float32
    assert (model["own"].weight.dtype, model["own"].bias.dtype) == (torch.bfloat16, torch.float32)

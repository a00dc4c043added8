"""Adapters of experts against a loop over merged weights and against PEFT; their counts and packs."""

import copy
import dataclasses
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.func import functional_call

from lorasweep.config.compose import shipped_model
from lorasweep.errors import ModelError, SpecError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.methods.stacked import in_peft_layout
from lorasweep.models import load as models
from lorasweep.models.forward import autocast, hold_in_bf16
from lorasweep.models.load import find_targets
from lorasweep.train.optim import AdamW
from tests.training import (
    EPS,
    ROUNDING,
    apart,
    as_alone,
    by_torch,
    moe,
    pack_of,
    ragged,
    run,
    state_of,
)
from tests.training import SMALL_MOE as SHAPE
from tests.world import tiny_spec

EXPERTS = "model.layers.1.mlp.experts"


def merged(model, method, state):
    """The base's weights with one run's adapters added, expert by expert."""
    weights = {n: p.detach() for n, p in model.named_parameters()}
    rank = method.expert_rank_of(SHAPE.n_experts, SHAPE.n_active_experts)
    for name in {n.rpartition(".")[0] for n in state}:
        a, b = state[f"{name}.A"], state[f"{name}.B"]
        experts, _, part = name.rpartition(".")
        if not experts.endswith("experts"):
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + method.scaling * b @ a
            continue
        width = SHAPE.hidden_size if part == "down_proj" else SHAPE.mlp_size
        deltas = []
        for e in range(SHAPE.n_experts):  # a factor of fewer rows is shared
            own_a = a if len(a) == rank else a[e * rank : (e + 1) * rank]
            own_b = b if len(b) == width else b[e * width : (e + 1) * width]
            deltas.append(method.expert_scaling(rank) * own_b @ own_a)
        whole, delta = "down_proj" if part == "down_proj" else "gate_up_proj", torch.stack(deltas)
        if part != "down_proj":
            none = torch.zeros_like(delta)
            delta = torch.cat([delta, none] if part == "gate_proj" else [none, delta], 1)
        weights[f"{experts}.{whole}"] = weights[f"{experts}.{whole}"] + delta
    return weights


DENSE = dataclasses.replace(SHAPE, n_experts=0, n_active_experts=0)
READINGS = [
    LoRA(rank=4, expert_rank="all"),
    LoRA(rank=4, expert_rank="all", expert_alpha=8.0),
    LoRA(rank=4),
    LoRA(rank=4, expert_rank="whole", alpha=8.0, expert_alpha=32.0, scaling_by="sqrt_rank"),
    LoRA(rank=8, expert_rank="all"),
]


@pytest.mark.numerics
@pytest.mark.parametrize("outer", ["own", "shared"])
@pytest.mark.parametrize("layers", ["mlp", "all"])
def test_a_pack_is_a_loop_over_merged_experts(norms_in_float64, layers, outer, other_weights):
    methods = [dataclasses.replace(m, layers=layers, expert_outer=outer) for m in READINGS]
    for method in methods:
        method.check(SHAPE)
    model, reference = moe(), other_weights(moe("eager"))
    tokens = torch.randint(SHAPE.vocab_size, (3 * len(methods), 7))
    with torch.no_grad():
        start = model(input_ids=tokens).logits
        assert apart(start, reference(input_ids=tokens).logits) < ROUNDING[1]
    trainables = pack_of(methods, model, SHAPE, perturb=0.2)
    mixed = torch.randn(len(methods), 21, SHAPE.vocab_size, dtype=torch.float64)
    logits = model(input_ids=tokens).logits.view_as(mixed)
    (logits * mixed).sum().backward()
    spectra, norms = trainables.spectra(), trainables.norms()
    base = {n: p.detach() for n, p in moe().named_parameters()}
    for k, method in enumerate(methods):
        state = {n: t.clone().requires_grad_() for n, t in state_of(trainables, k).items()}
        assert sum(p.numel() for p in state.values()) == method.n_trainable(SHAPE)
        own = tokens.view(len(methods), 3, 7)[k]
        want = functional_call(reference, merged(reference, method, state), (own,)).logits
        assert apart(logits[k], want.flatten(0, 1)) < ROUNDING[1]
        (want.flatten(0, 1) * mixed[k]).sum().backward()
        ours = state_of(trainables, k, "grad")
        for name, p in state.items():
            assert float(p.grad.abs().max()) > 0, name
            assert apart(ours[name], p.grad) < ROUNDING[1], name
        # norms are of all deltas, and a stack's spectrum is that of its largest expert
        deltas = {n: p.detach() - base[n] for n, p in merged(moe(), method, state).items()}
        largest = torch.linalg.matrix_norm(deltas[f"{EXPERTS}.down_proj"], 2).max()
        assert spectra[k][f"{EXPERTS}.down_proj"]["delta"] == pytest.approx(
            float(largest), rel=1e-9
        )
        total = sum(float(d.square().sum()) for d in deltas.values()) ** 0.5
        assert norms[k]["norm_delta"] == pytest.approx(total, rel=1e-9)
    trainables.detach()
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, start)


@pytest.mark.numerics
def test_a_training_step_is_that_of_pefts_target_parameters(norms_in_float64, other_weights):
    """PEFT's one pair for gate and up may mix them; where its B is block-diagonal, and stays so, it
    is our two. Loss, gradients and one AdamW step, in float64."""
    method, model = LoRA(rank=4, layers="mlp", expert_alpha=6.0), moe()
    rank = method.expert_rank_of(SHAPE.n_experts, SHAPE.n_active_experts)
    alpha, stacks = method.expert_scaling(rank) * rank, ["mlp.experts.gate_up_proj"]
    config = LoraConfig(
        **{"r": rank, "lora_alpha": alpha, "target_modules": []},
        target_parameters=[*stacks, "mlp.experts.down_proj"],
        rank_pattern={stacks[0]: 2 * rank},
        alpha_pattern={stacks[0]: 2 * alpha},
    )
    reference = get_peft_model(other_weights(moe("eager")), config).double()
    trainables = pack_of([method], model, SHAPE, perturb=0.2)
    theirs = {
        n.removeprefix("base_model.model.").removesuffix(".default.weight"): p
        for n, p in reference.named_parameters()
        if p.requires_grad
    }

    def state(what):
        tensors = trainables.parameters().items()
        named = {trainables.part_of(n)[0]: what(p)[0] for n, p in tensors}
        return in_peft_layout(named, SHAPE.n_experts)[0]

    with torch.no_grad():
        start = state(torch.detach)
        assert start.keys() == theirs.keys()
        for name, p in theirs.items():
            p.copy_(start[name])
    tokens = torch.randint(SHAPE.vocab_size, (4, 9))
    losses = [m(input_ids=tokens, labels=tokens).loss for m in (model, reference)]
    sum(losses).backward()
    assert apart(*losses) < ROUNDING[1]
    gradients, ones = state(lambda p: p.grad), state(torch.ones_like)
    for name, p in theirs.items():
        p.grad *= ones[name]  # keep gate and up apart
        assert float(p.grad.abs().max()) > 0
        assert apart(p.grad, gradients[name]) < ROUNDING[1], name
    optimizer = AdamW(trainables, [tiny_spec(method=method, lr=1e-2, eps=EPS)])
    optimizer.step(0, optimizer.grad_norms())
    torch.optim.AdamW(theirs.values(), lr=1e-2, betas=(0.9, 0.95), eps=EPS, weight_decay=0).step()
    after = state(torch.detach)
    for name, p in theirs.items():
        assert apart(p, after[name]) < ROUNDING[1], name


@pytest.mark.parametrize(
    ("method", "words", "shape"),
    [
        (LoRA(rank=3), r"rank/2 by method.expert_rank=active.*a multiple of 2 up to 32", SHAPE),
        (LoRA(rank=2, expert_rank="all"), "rank/4 by .*all", SHAPE),
        (LoRA(rank=4, expert_rank="some"), "Allowed: active, all, whole", SHAPE),
        (LoRA(rank=4, expert_outer="none"), "Allowed: own, shared", SHAPE),
        (LoRA(rank=4, expert_alpha=0.0), "expert_alpha=0.0", SHAPE),
        (LoRA(rank=4, layers="attention", expert_rank="all"), "no expert is adapted", SHAPE),
        (LoRA(rank=4, expert_rank="whole"), "expert_rank=whole has no effect on model", DENSE),
    ],
)
def test_bad_settings_are_refused(method, words, shape):
    with pytest.raises(SpecError, match=words):
        method.check(shape)


@pytest.mark.parametrize(("outer", "experts"), [("own", 51_904_512), ("shared", 14_450_688)])
def test_published_counts_of_qwen3_30b(outer, experts):
    """Tinker's table. By the study's reading of the rank: tests/unit/spec/test_run.py."""
    model = shipped_model("qwen3-30b-a3b-base")
    method = LoRA(rank=8, expert_rank="whole", expert_outer=outer)
    assert method.n_trainable(model) == 8 * (experts + 835_584 + 153_984)
    assert dataclasses.replace(method, layers="mlp").n_trainable(model) == 8 * experts
    assert LoRA(layers="all").target_layers() == ("attention", "mlp", "unembedding")
    LoRA(rank=3, layers="attention").check(SHAPE)  # experts that are not adapted share no rank
    assert "expert" not in tiny_spec(method=LoRA(rank=4)).method.canonical


def test_a_set_that_matches_nothing_is_refused():
    transposed, fewer = moe(), dataclasses.replace(SHAPE, n_active_experts=1)
    transposed.model.layers[1].mlp.experts.is_transposed = True
    narrow = dataclasses.replace(SHAPE, mlp_size=32)
    for model, shape, words in (
        (moe(), DENSE, r"expected 6 modules named \['down_proj', .*found 0"),
        (moe(), narrow, r"gate_up_proj \[4, 64, 16\].*mlp\.experts"),
        (transposed, SHAPE, r"Not of that kind: .*layers\.1\.mlp\.experts"),
    ):
        with pytest.raises(ModelError, match=words):
            find_targets(model, shape, ("mlp",))
    with pytest.raises(ModelError, match="active experts is 2, described as 1"):
        models.check_shape(moe(), fewer)


def logits_and_gradients(model, trainables, tokens):
    logits = model(input_ids=tokens).logits
    logits.float().square().sum().backward()
    return [logits.detach(), *(p.grad for p in trainables.parameters().values())]


ROWS = ragged(SHAPE.vocab_size, 30)


@pytest.fixture
def based():
    spec = tiny_spec(precision="fp64", lr=2e-3, steps=4, batch_size=3, eps=EPS)
    return dataclasses.replace(spec, model=SHAPE), models.Base(moe(), None, "random")


@pytest.mark.numerics
def test_packs_are_the_runs_alone(based, norms_in_float64, other_weights):
    """All readings in one pack, one of which ends early; states after the last update."""
    spec, base = based
    pack = [
        dataclasses.replace(spec, method=m, seed=k % 2, lr=1e-3 * (1 + k), steps=2 if k == 1 else 4)
        for k, m in enumerate(READINGS)
    ]
    as_alone(pack, base, ROWS, other_weights(base), micro=2)


@pytest.mark.numerics
@pytest.mark.parametrize("layers", ["all", "mlp"])
def test_full_fine_tuning_trains_the_stacks(based, norms_in_float64, layers, other_weights):
    """One step is torch's AdamW on the eager model; norms and spectra are those of each expert."""
    spec, base = based
    method = FullFT() if layers == "all" else FullFT(scope="matrices", layers=layers)
    spec = dataclasses.replace(spec, method=method, steps=1)
    wanted = "experts" if layers == "mlp" else ""
    reference = other_weights(moe("eager"))
    theirs = {n: p for n, p in reference.named_parameters() if wanted in n}
    assert sum(p.numel() for p in theirs.values()) == method.n_trainable(SHAPE)
    start = {n: p.detach().clone() for n, p in theirs.items()}
    by_torch(spec, reference, ROWS, wanted)
    states, records = run([spec], base, ROWS)
    got = states[spec.id]["tensors"]
    assert {n.removeprefix("param/") for n in got if n.startswith("param/")} == theirs.keys()
    for name, p in theirs.items():
        assert apart(got[f"param/{name}"], p) < ROUNDING[1], name
    delta = sum(float((p.detach() - start[n]).square().sum()) for n, p in theirs.items()) ** 0.5
    assert records[spec.id][-1]["norm_delta"] == pytest.approx(delta, rel=1e-3)


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="torch before 2.10")
def test_grouped_products_in_fp32_are_those_of_the_loop_in_float64(norms_in_float64, monkeypatch):
    """torch's grouped_mm, with ranks padded to its alignment, for groups of which some are empty."""
    grouped = Mock(wraps=torch.nn.functional.grouped_mm)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", grouped)
    tokens, found = torch.randint(SHAPE.vocab_size, (5, 3)), []
    for model in (moe(), moe().float()):
        trainables = pack_of(READINGS, model, SHAPE, perturb=0.2)
        for p in trainables.parameters().values():
            p.data.copy_(p.float())  # the same numbers in both
        found.append(logits_and_gradients(model, trainables, tokens))
        assert grouped.called == (model.dtype == torch.float32)
    assert any((call.kwargs["offs"].diff() == 0).any() for call in grouped.call_args_list)
    assert max(apart(got, want) for want, got in zip(*found)) < 1e-4


def test_under_autocast_experts_are_computed_in_bf16_whatever_they_are_held_in():
    wide = moe().float()
    for p in wide.parameters():
        p.data = p.data.to(torch.bfloat16).float()
    narrow = copy.deepcopy(wide)
    hold_in_bf16(narrow)
    assert narrow.model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16
    tokens, found = torch.randint(SHAPE.vocab_size, (4, 8)), []
    for model in (wide, narrow):
        trainables = pack_of(READINGS[:2], model, SHAPE, perturb=0.2)
        with autocast("bf16", torch.device("cpu")):
            found.append(logits_and_gradients(model, trainables, tokens))
    assert all(torch.equal(one, other) for one, other in zip(*found))
    assert all(float(g.abs().max()) > 0 for g in found[0][1:])

"""LoRA against PEFT, full fine-tuning against torch, in float64; starts; LoRA's further fields."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from lorasweep.data import load as data
from lorasweep.data.batches import collate, eval_batches
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.train.objectives.nll import evaluate, nll_sums
from lorasweep.train.optim import AdamW
from tests.training import EPS, ROUNDING, apart, attached, results, run, small_world
from tests.world import tiny_spec

pytestmark = pytest.mark.usefixtures("norms_in_float64")


@pytest.fixture(scope="module")
def world():
    return small_world(lr=8e-3)


def peft_model(base, method):
    model = copy.deepcopy(base.model)
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    size = {"r": method.rank, "lora_alpha": method.alpha, "target_modules": linears}
    return get_peft_model(model, LoraConfig(**size, task_type="CAUSAL_LM")).double()


@pytest.mark.numerics
def test_stacked_adapters_equal_peft_at_every_point_of_a_run(world, other_weights):
    """Same start, loss, gradients; at each step one update within 1e-12, with decay and clipping."""
    spec, base, dataset = world
    spec = dataclasses.replace(spec, weight_decay=0.1, clip_norm=0.05)
    reference = peft_model(other_weights(base), spec.method)
    theirs = {n: p for n, p in reference.named_parameters() if p.requires_grad}
    trainables = attached(spec.method, base.model, spec.model, spec.seed)
    try:
        ours = trainables.parameters()
        parts = {n: trainables.part_of(n)[0] for n in ours}
        name = "base_model.model.{}.lora_{}.default.weight".format
        pair = {n: name(p[:-2], p[-1]) for n, p in parts.items()}
        assert set(pair.values()) == set(theirs)
        optimizer = AdamW(trainables, [spec])
        settings = {"lr": spec.lr, "betas": (0.9, 0.95), "eps": EPS, "weight_decay": 0.1}
        torch_optimizer = torch.optim.AdamW(theirs.values(), **settings)
        for step in range(spec.steps):
            with torch.no_grad():  # the same state on both sides
                for n, p in ours.items():
                    theirs[pair[n]].copy_(p[0])
            batch = collate(dataset.train(spec.seed, step * 4, 4))
            models = (base.model, reference.get_base_model())
            losses = [nll_sums(m, batch, "fp64")[0] / batch.n_loss for m in models]
            for loss in losses:
                loss.backward()
            assert apart(*losses) < ROUNDING[1]
            for n, p in ours.items():
                assert apart(p.grad[0], theirs[pair[n]].grad) < ROUNDING[1], (step, n)
            optimizer.step(step, optimizer.grad_norms())
            assert torch.nn.utils.clip_grad_norm_(theirs.values(), 0.05) > 0.05
            torch_optimizer.step()
            for n, p in ours.items():
                assert apart(p[0], theirs[pair[n]]) < ROUNDING[1], (step, n)
            optimizer.zero_grad()
            torch_optimizer.zero_grad()
    finally:
        trainables.detach()


@pytest.mark.numerics
def test_full_fine_tuning_equals_torch_over_a_whole_run(world, other_weights):
    spec, base, dataset = world
    spec = dataclasses.replace(spec, method=FullFT(), lr=2e-3, weight_decay=0.1, clip_norm=0.5)
    reference = copy.deepcopy(other_weights(base).model).requires_grad_(True)
    optimizer = torch.optim.AdamW(
        reference.parameters(), lr=spec.lr, betas=(0.9, 0.95), eps=EPS, weight_decay=0.1
    )
    states, records = run([spec], base, dataset)
    clipped = []
    for step in range(spec.steps):
        rows = dataset.train(spec.seed, step * spec.batch_size, spec.batch_size)
        tokens = torch.tensor(np.stack([e.tokens for e in rows]).astype(np.int64))
        bears = torch.tensor(np.stack([e.loss for e in rows]))[:, 1:]
        logits = reference(input_ids=tokens).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits[bears], tokens[:, 1:][bears])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        clipped.append(float(norm) > 0.5)
        optimizer.step()
        found = records[spec.id][step]["train_nll"]
        assert float(loss.detach()) == pytest.approx(found, rel=ROUNDING[10])
    assert any(clipped)
    for name, p in reference.named_parameters():
        assert apart(p, states[spec.id]["tensors"][f"param/{name}"]) < ROUNDING[10], name


@pytest.mark.parametrize(
    "method",
    [
        *(LoRA(rank=2, layers=x) for x in ("all", "attention", "mlp", "unembedding")),
        LoRA(rank=1, layers="mlp+unembedding"),
        FullFT(),
        FullFT(scope="matrices", layers="mlp"),
    ],
)
def test_a_method_starts_as_the_base_and_trains_all_that_it_counts(world, method):
    """All gradients after two updates: B is zero before the first, so A's first gradient is too."""
    spec, base, dataset = world
    batches = [eval_batches(dataset.test, 4096)]
    before = evaluate(base.model, batches, "fp64")
    trainables = attached(method, base.model, spec.model)
    try:
        assert evaluate(base.model, batches, "fp64") == before
        params = trainables.parameters()
        assert sum(p.numel() for p in params.values()) == method.n_trainable(spec.model)
        optimizer = AdamW(trainables, [dataclasses.replace(spec, method=method)])
        for step in range(2):
            if step == 1:
                optimizer.step(0, optimizer.grad_norms())
                optimizer.zero_grad()
            batch = collate(dataset.train(0, step * 4, 4))
            (nll_sums(base.model, batch, "fp64")[0] / batch.n_loss).backward()
        assert all(float(p.grad.abs().max()) > 0 for p in params.values())
        trained = {id(p) for p in params.values()}
        assert all(not p.requires_grad for p in base.model.parameters() if id(p) not in trained)
    finally:
        trainables.detach()
    assert evaluate(base.model, batches, "fp64") == before


@pytest.fixture(scope="module")
def short(world):
    spec, base, _ = world
    rows = dataclasses.replace(spec.dataset, n_test=8, n_test_curve=8)
    return dataclasses.replace(spec, dataset=rows, lr=2e-3, steps=4, eps=1e-30), base


def trained(pack, base):
    return results(pack, base, data.load(pack[0].dataset, []))


def nlls(result):
    return np.array([p["test_nll"] for p in result["curve"]])


def test_twins_are_one_run_in_float64(short):
    """Also inside a pack, whose runs may differ in the further fields."""
    spec, base = short
    twins = []
    for p, q in ((2.0, 1.0), (1.0, 2.0), (4.0, 0.5), (0.25, 2.0)):
        method = LoRA(rank=4, alpha=32 / (p * q), init_scale=p, lr_b_ratio=q / p)
        twins.append(dataclasses.replace(spec, lr=2e-3 * p, method=method))
    alone = [trained([run], base)[0] for run in (spec, *twins)]
    for other in (*alone[1:], *trained([spec, *twins], base)):
        assert np.abs(nlls(alone[0]) - nlls(other)).max() <= 1e-9


def test_rules_of_scaling_and_the_other_start(short):
    spec, base = short
    rules = ("rank", "sqrt_rank", "none")
    assert [LoRA(rank=4, scaling_by=s).scaling for s in rules] == [8, 16, 32]
    b = LoRA(rank=4, random_factor="b")
    longer = dataclasses.replace(spec, method=b, steps=8, dataset=tiny_spec().dataset)
    (final,) = trained([longer], base)
    assert final["norm_a"] > 0 and final["norm_b"] > 0
    assert nlls(final)[-1] < final["nll_start"]
    methods = [LoRA(rank=4, init_seed=k) for k in (0, 1)]
    one, other = trained([dataclasses.replace(spec, method=m) for m in methods], base)
    assert one["test_nll"] != other["test_nll"]


@pytest.mark.parametrize("method", [LoRA(rank=4), FullFT()], ids=["lora", "fullft"])
def test_shares_of_the_gradient_by_layer_set(short, method):
    spec, base = short
    (final,) = trained([dataclasses.replace(spec, method=method)], base)
    share = final["curve"][0]["grad_share"]
    assert sum(share.values()) == pytest.approx(1) and ("rest" in share) == (method == FullFT())
    assert set(share) >= {"attention", "mlp", "unembedding"}

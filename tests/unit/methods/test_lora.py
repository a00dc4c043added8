"""LoRA against PEFT, full fine-tuning against torch, in float64; starts; LoRA's further fields."""

import copy
import dataclasses
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from lorasweep.data import load as data
from lorasweep.data.batches import collate, eval_batches
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.train.objectives.nll import evaluate, nll_sums
from lorasweep.train.optim import AdamW
from tests.training import (
    EPS,
    ROUNDING,
    apart,
    beside_peft,
    by_torch,
    pack_of,
    results,
    run,
    small_world,
)
from tests.world import tiny_spec

pytestmark = pytest.mark.usefixtures("norms_in_float64")


@pytest.fixture(scope="module")
def world():
    return small_world(lr=8e-3)


@contextmanager
def attached(method, model, spec):
    """One run's Trainables on the model, which is left as it was."""
    trainables = pack_of([method], model, spec.model, [spec.seed])
    try:
        yield trainables
    finally:
        trainables.detach()


@pytest.mark.numerics
def test_stacked_adapters_equal_peft_at_every_point_of_a_run(world, other_weights):
    """Same start, loss, gradients; at each step one update within 1e-12, with decay and clipping."""
    spec, base, dataset = world
    spec = dataclasses.replace(spec, weight_decay=0.1, clip_norm=0.05)
    other = copy.deepcopy(other_weights(base).model)
    with attached(spec.method, base.model, spec) as trainables:
        reference, pairs = beside_peft(trainables, other, spec.method)
        optimizer, theirs = AdamW(trainables, [spec]), [p for _, p in pairs]
        settings = {"lr": spec.lr, "betas": (0.9, 0.95), "eps": EPS, "weight_decay": 0.1}
        torch_optimizer = torch.optim.AdamW(theirs, **settings)
        for step in range(spec.steps):
            with torch.no_grad():  # the same state on both sides
                for ours, other in pairs:
                    other.copy_(ours[0])
            batch = collate(dataset.train(spec.seed, step * 4, 4))
            models = (base.model, reference.get_base_model())
            losses = [nll_sums(m, batch, "fp64")[0] / batch.n_loss for m in models]
            for loss in losses:
                loss.backward()
            assert apart(*losses) < ROUNDING[1]
            assert max(apart(p.grad[0], q.grad) for p, q in pairs) < ROUNDING[1], step
            optimizer.step(step, optimizer.grad_norms())
            assert torch.nn.utils.clip_grad_norm_(theirs, 0.05) > 0.05
            torch_optimizer.step()
            assert max(apart(p[0], q) for p, q in pairs) < ROUNDING[1], step
            optimizer.zero_grad()
            torch_optimizer.zero_grad()


@pytest.mark.numerics
def test_full_fine_tuning_equals_torch_over_a_whole_run(world, other_weights):
    spec, base, dataset = world
    spec = dataclasses.replace(spec, method=FullFT(), lr=2e-3, weight_decay=0.1, clip_norm=0.5)
    reference = copy.deepcopy(other_weights(base).model)
    states, records = run([spec], base, dataset)
    losses, norms = zip(*by_torch(spec, reference, dataset))
    found = [record["train_nll"] for record in records[spec.id]]
    assert found == pytest.approx(losses, rel=ROUNDING[10]) and max(norms) > 0.5
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
    with attached(method, base.model, spec) as trainables:
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
    assert evaluate(base.model, batches, "fp64") == before


@pytest.fixture(scope="module")
def trained(world):
    """Train runs on few rows and return their results, NLLs of the curve as an array."""
    spec, base, _ = world
    rows = dataclasses.replace(spec.dataset, n_test=8, n_test_curve=8)
    short = dataclasses.replace(spec, dataset=rows, lr=2e-3, steps=4, eps=1e-30)

    def train(*changes):
        pack = [dataclasses.replace(short, **c) for c in changes]
        found = results(pack, base, data.load(pack[0].dataset, []))
        return [{**r, "nlls": np.array([p["test_nll"] for p in r["curve"]])} for r in found]

    return train


def test_twins_are_one_run_in_float64(trained):
    """Also inside a pack, whose runs may differ in the further fields."""
    twins = [{}]
    for p, q in ((2.0, 1.0), (1.0, 2.0), (4.0, 0.5), (0.25, 2.0)):
        method = LoRA(rank=4, alpha=32 / (p * q), init_scale=p, lr_b_ratio=q / p)
        twins.append({"lr": 2e-3 * p, "method": method})
    first, *others = [trained(one)[0] for one in twins]
    for other in (*others, *trained(*twins)):
        assert np.abs(first["nlls"] - other["nlls"]).max() <= 1e-9


def test_rules_of_scaling_and_the_other_start(trained):
    rules = ("rank", "sqrt_rank", "none")
    assert [LoRA(rank=4, scaling_by=s).scaling for s in rules] == [8, 16, 32]
    b = LoRA(rank=4, random_factor="b")
    (final,) = trained({"method": b, "steps": 8, "dataset": tiny_spec().dataset})
    assert final["norm_a"] > 0 and final["norm_b"] > 0
    assert final["nlls"][-1] < final["nll_start"]
    one, other = trained(*({"method": LoRA(rank=4, init_seed=k)} for k in (0, 1)))
    assert one["test_nll"] != other["test_nll"]


@pytest.mark.parametrize("method", [LoRA(rank=4), FullFT()], ids=["lora", "fullft"])
def test_shares_of_the_gradient_by_layer_set(trained, method):
    (final,) = trained({"method": method})
    share = final["curve"][0]["grad_share"]
    assert sum(share.values()) == pytest.approx(1) and ("rest" in share) == (method == FullFT())
    assert set(share) >= {"attention", "mlp", "unembedding"}

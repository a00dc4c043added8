"""What holds for every method: it starts as the base, all that it trains gets a gradient."""

import dataclasses

import pytest

from lorasweep.data import load as data
from lorasweep.data.batches import collate, eval_batches
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.train.objectives.held_out import evaluate
from lorasweep.train.objectives.nll import nll_sums
from lorasweep.train.optim import AdamW
from tests.training import attached
from tests.world import tiny_spec


@pytest.fixture(scope="module")
def world():
    spec = tiny_spec(precision="fp64", method=LoRA(rank=4), lr=5e-3, steps=6)
    return spec, models.load(spec.model, ["/nonexistent"], "fp64"), data.load(spec.dataset, [])


pytestmark = pytest.mark.usefixtures("norms_in_float64")


@pytest.mark.parametrize("method", [LoRA(rank=4), LoRA(rank=1, layers="attention"), FullFT()])
def test_step_zero_changes_nothing(world, method):
    spec, base, dataset = world
    batches = eval_batches(dataset.test, 4096)
    before = evaluate(base.model, [batches], "fp64")
    trainables = attached(method, base.model, spec.model)
    try:
        assert evaluate(base.model, [batches], "fp64") == before
    finally:
        trainables.detach()
    assert evaluate(base.model, [batches], "fp64") == before


@pytest.mark.parametrize(
    "method",
    [
        LoRA(rank=2),
        LoRA(rank=2, layers="attention"),
        LoRA(rank=2, layers="mlp"),
        LoRA(rank=2, layers="unembedding"),
        LoRA(rank=2, layers="mlp+unembedding"),
        FullFT(),
        FullFT(scope="matrices", layers="mlp"),
    ],
)
def test_every_intended_tensor_gets_a_gradient_and_the_count_is_right(world, method):
    """After two updates (B is zero before the first, so A's first gradient is too)."""
    spec, base, dataset = world
    spec = dataclasses.replace(spec, method=method, steps=2)
    trainables = attached(method, base.model, spec.model)
    try:
        params = trainables.parameters()
        assert sum(p.numel() for p in params.values()) == method.n_trainable(spec.model)
        optimizer = AdamW.start(trainables, [spec])
        for step in range(2):
            batch = collate(dataset.train(0, step * 4, 4))
            optimizer.zero_grad()
            (nll_sums(base.model, batch, "fp64")[0] / batch.n_loss).backward()
            if step == 0:
                optimizer.step(0, optimizer.grad_norms())
        still = [n for n, p in params.items() if p.grad is None or float(p.grad.abs().max()) == 0]
        assert not still
        trained = {id(p) for p in params.values()}
        assert all(not p.requires_grad for p in base.model.parameters() if id(p) not in trained)
    finally:
        trainables.detach()

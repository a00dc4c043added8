"""LoRA against PEFT, in float64, at every update."""

import dataclasses

import pytest
import torch

from lorasweep.data import load as data
from lorasweep.data.batches import collate
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.train.objectives.nll import nll_sums
from lorasweep.train.optim import AdamW
from tests.training import EPS, ROUNDING, apart, attached
from tests.world import tiny_spec


@pytest.fixture(scope="module")
def world():
    spec = tiny_spec(precision="fp64", method=LoRA(rank=4), lr=5e-3, steps=6, eps=EPS)
    return spec, models.load(spec.model, ["/nonexistent"], "fp64"), data.load(spec.dataset, [])


pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("norms_in_float64")]


def peft_model(base, spec):
    """The reference: PEFT's LoRA on the same base, A set to ours."""
    import copy

    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(base.model)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    config = LoraConfig(
        r=spec.method.rank,
        lora_alpha=spec.method.alpha,
        lora_dropout=0.0,
        target_modules=names,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config).double()


def test_stacked_adapters_equal_peft_at_every_point_of_a_run(world, other_weights):
    """Same start, loss and gradients; one update from the same state, at each step, within 1e-12."""
    spec, base, dataset = world
    spec = dataclasses.replace(spec, steps=6, lr=8e-3)
    reference = peft_model(other_weights(base), spec)
    theirs = {n: p for n, p in reference.named_parameters() if p.requires_grad}
    trainables = attached(spec.method, base.model, spec.model, spec.seed)
    try:
        ours = trainables.parameters()
        parts = {n: trainables.part_of(n)[0] for n in ours}
        pair = {
            n: f"base_model.model.{p[:-2]}.lora_{p[-1]}.default.weight" for n, p in parts.items()
        }
        assert set(pair.values()) == set(theirs)
        optimizer = AdamW.start(trainables, [spec])
        torch_optimizer = torch.optim.AdamW(
            theirs.values(), lr=spec.lr, betas=(0.9, 0.95), eps=EPS, weight_decay=0
        )
        for step in range(spec.steps):
            with torch.no_grad():  # the same state on both sides
                for n, p in ours.items():
                    theirs[pair[n]].copy_(p[0])
            batch = collate(dataset.train(spec.seed, step * 4, 4))
            count = batch.n_loss
            loss_a = nll_sums(base.model, batch, "fp64")[0] / count
            loss_b = nll_sums(reference, batch, "fp64")[0] / count
            loss_a.backward()
            loss_b.backward()
            assert apart(loss_a, loss_b) < ROUNDING[1]
            for n, p in ours.items():
                assert apart(p.grad[0], theirs[pair[n]].grad) < ROUNDING[1], (step, n)
            optimizer.step(step, optimizer.grad_norms())
            torch_optimizer.step()
            for n, p in ours.items():
                assert apart(p[0], theirs[pair[n]]) < ROUNDING[1], (step, n)
            optimizer.zero_grad()
            torch_optimizer.zero_grad()
    finally:
        trainables.detach()

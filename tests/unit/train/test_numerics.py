"""The training maths against certified answers: torch in float64, and invariances."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from lorasweep.launch.trainer import finetune
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from tests.training import EPS, ROUNDING, Trained, apart, moved, run, small_world, worst


@pytest.fixture(scope="module")
def world():
    return small_world()


pytestmark = pytest.mark.usefixtures("norms_in_float64")


@pytest.mark.numerics
@pytest.mark.parametrize("method", [LoRA(rank=4), FullFT()])
def test_micro_batches_change_nothing(world, method, other_weights):
    spec, base, dataset = world
    spec = dataclasses.replace(spec, method=method, lr=1e-3)
    whole, _ = run([spec], base, dataset)
    for rows in (1, 3):
        parts, _ = run([spec], other_weights(base), dataset, micro_batch_size=rows)
        assert worst(whole[spec.id], parts[spec.id]) < ROUNDING[10], rows


def test_a_diverging_run_leaves_and_disturbs_no_other(world):
    spec, base, dataset = world
    calm, wild = (dataclasses.replace(spec, lr=lr, steps=10) for lr in (1e-3, 3.0))
    found = Trained(finetune([wild, calm], base, dataset))
    assert [found.ends[s.id] for s in (wild, calm)] == ["diverged", "done"]
    assert len(found.records[wild.id]) < len(found.records[calm.id]) == 10
    for weights in (base, moved(base)):
        alone, _ = run([calm], weights, dataset)
        assert worst(alone[calm.id], found.states[calm.id]) < ROUNDING[10]


@pytest.mark.numerics
def test_full_fine_tuning_equals_torch_over_a_whole_run(world, other_weights):
    """Against a plain loop of transformers' forward and torch.optim.AdamW."""
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

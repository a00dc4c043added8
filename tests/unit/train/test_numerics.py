"""The training maths against certified answers: torch in float64, and invariances."""

import dataclasses

import numpy as np
import pytest
import torch

from lorasweep.data import load as data
from lorasweep.data.batches import collate
from lorasweep.data.examples import Example
from lorasweep.launch.trainer import finetune
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.spec.evaluations import eval_steps
from lorasweep.train.objectives.nll import nll_sums
from lorasweep.train.optim import AdamW, OneRun
from tests.training import EPS, ROUNDING, apart, moved, run, state_at, worst
from tests.world import tiny_spec


@pytest.fixture(scope="module")
def world():
    spec = tiny_spec(precision="fp64", method=LoRA(rank=4), lr=5e-3, steps=6, eps=EPS)
    return spec, models.load(spec.model, ["/nonexistent"], "fp64"), data.load(spec.dataset, [])


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


def test_a_diverging_member_leaves_and_disturbs_nobody(world):
    spec, base, dataset = world
    calm, wild = (
        dataclasses.replace(spec, lr=1e-3, steps=10),
        dataclasses.replace(spec, lr=3.0, steps=10),
    )
    ended = {}
    for event in finetune([wild, calm], base, dataset):
        ended |= {rid: (state, event.step) for rid, (state, _) in event.ended.items()}
    assert ended[wild.id][0] == "diverged" and ended[wild.id][1] < 10
    assert ended[calm.id] == ("done", 10)
    together, _ = run([wild, calm], base, dataset)
    for weights in (base, moved(base)):
        alone, _ = run([calm], weights, dataset)
        assert worst(alone[calm.id], together[calm.id]) < ROUNDING[10]


def test_resumed_run_is_bit_identical(world):
    spec, base, dataset = world
    whole, _ = run([spec], base, dataset)
    rest, _ = run([spec], base, dataset, resume=state_at(3, [spec], base, dataset))
    for name, tensor in whole[spec.id]["tensors"].items():
        assert torch.equal(tensor, rest[spec.id]["tensors"][name]), name


def test_adamw_equals_torch_with_decay_and_clipping():
    spec = tiny_spec(weight_decay=0.1, clip_norm=0.5, lr=1e-2)
    start = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    optimizer = AdamW.start(OneRun({"w": ours}), [spec])
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(10):
        for w in (ours, theirs):
            w.grad = None
            ((w - 1) ** 2).sum().backward()
        optimizer.step(step, optimizer.grad_norms())
        torch.nn.utils.clip_grad_norm_([theirs], 0.5)
        reference.step()
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.numerics
def test_full_fine_tuning_equals_torch_over_a_whole_run(world, other_weights):
    """Against a plain loop of transformers' forward and torch.optim.AdamW: stale copies of weights
    would show."""
    import copy

    spec, base, dataset = world
    spec = dataclasses.replace(spec, method=FullFT(), lr=2e-3)
    reference = copy.deepcopy(other_weights(base).model).requires_grad_(True)
    optimizer = torch.optim.AdamW(
        reference.parameters(), lr=spec.lr, betas=(0.9, 0.95), eps=EPS, weight_decay=0
    )
    states, records = run([spec], base, dataset)
    for step in range(spec.steps):
        rows = dataset.train(spec.seed, step * spec.batch_size, spec.batch_size)
        tokens = torch.tensor(np.stack([e.tokens for e in rows]).astype(np.int64))
        bears = torch.tensor(np.stack([e.loss for e in rows]))[:, 1:]
        logits = reference(input_ids=tokens).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits[bears], tokens[:, 1:][bears])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found = records[spec.id][step]["train_nll"]
        assert float(loss.detach()) == pytest.approx(found, rel=ROUNDING[10])
    for name, p in reference.named_parameters():
        assert apart(p, states[spec.id]["tensors"][f"param/{name}"]) < ROUNDING[10], name


@pytest.mark.numerics
def test_loss_is_torch_cross_entropy_over_loss_bearing_tokens(world):
    _spec, base, _dataset = world
    examples = [
        Example(np.array([1, 2, 3, 4, 5], dtype=np.int32), np.array([0, 0, 1, 1, 0], dtype=bool)),
        Example(np.array([7, 8, 9], dtype=np.int32), np.array([0, 1, 0], dtype=bool)),
    ]
    got = nll_sums(base.model, collate(examples), "fp64")[0]
    want = 0.0
    for e in examples:
        logits = (
            base.model(input_ids=torch.tensor(e.tokens[None].astype(np.int64)))
            .logits[0]
            .log_softmax(-1)
        )
        want -= sum(float(logits[t - 1, e.tokens[t]]) for t in np.flatnonzero(e.loss))
    assert float(got) == pytest.approx(want, rel=ROUNDING[1])


def test_eval_steps_of_a_short_run_begin_those_of_a_long_one():
    assert eval_steps(8) == [1, 2, 3, 4, 6, 8]
    assert set(eval_steps(30)[:-1]) <= set(eval_steps(1000))
    assert eval_steps(1) == [1]
    assert eval_steps(30, curve=False) == [30]

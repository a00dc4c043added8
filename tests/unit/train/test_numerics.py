"""The training maths against certified answers: PEFT and torch in float64, and invariances."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from lorasweep.data import load as data
from lorasweep.data.batches import collate, eval_batches
from lorasweep.data.examples import Example
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.models.targets import find_targets
from lorasweep.train.finetune import finetune
from lorasweep.train.objectives.sft import evaluate, nll_sums
from lorasweep.train.optim import AdamW, OneRun
from lorasweep.train.progress import eval_steps
from tests.world import tiny_spec


@pytest.fixture(scope="module")
def world():
    spec = tiny_spec(precision="fp64", method=LoRA(rank=4), lr=5e-3, steps=6)
    return spec, models.load(spec.model, ["/nonexistent"], "fp64"), data.load(spec.dataset, [])


@pytest.fixture(autouse=True)
def norms_in_float64(monkeypatch):
    """transformers' norm goes through float32 even in a float64 model; a reference of 1e-9 cannot."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def forward(self, x):
        return self.weight * (
            x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def run_all(pack, base, dataset, **kwargs):
    """Train to the end; return the final state tensors of each member as of its last event, and all
    records."""
    states, records = {}, {}
    for event in finetune(pack, base, dataset, **kwargs):
        for rid, state in event.snapshot().items():
            states[rid] = {k: v.clone() for k, v in state["tensors"].items()}
        for rid, record in event.records.items():
            records.setdefault(rid, []).append(record)
    return states, records


def attached(method, model, shape, seed=0):
    """One member of `method` on the model: its Trainables."""
    targets = find_targets(model, shape, method.target_layers())
    return method.attach(model, targets, [method], [seed])


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


def test_stacked_adapters_equal_peft_at_every_point_of_a_run(world):
    """Same start, same logits, same gradients; one update from the same state, at each step, within
    1e-9."""
    spec, base, dataset = world
    spec = dataclasses.replace(spec, steps=12, lr=8e-3)
    reference = peft_model(base, spec)
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
            theirs.values(), lr=spec.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0
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
            assert abs(float((loss_a - loss_b).detach())) < 1e-9
            for n, p in ours.items():
                assert torch.allclose(p.grad[0], theirs[pair[n]].grad, rtol=0, atol=1e-9), (step, n)
            optimizer.step(step, optimizer.grad_norms())
            torch_optimizer.step()
            # Adam divides by sqrt(v): a gradient of rounding size may flip an update, so compare
            # where v is above it
            for n, p in ours.items():
                solid = optimizer.exp_avg_sq[n][0].sqrt() > 1e-10
                difference = (p[0] - theirs[pair[n]]).detach().abs()[solid]
                assert not len(difference) or float(difference.max()) < 1e-9, (step, n)
            optimizer.zero_grad()
            torch_optimizer.zero_grad()
    finally:
        trainables.detach()


def test_adapter_in_peft_format_is_loaded_by_peft(world, tmp_path):
    from peft import PeftModel

    from lorasweep.methods.stacked.peft_export import save_peft

    spec, base, dataset = world
    states, records = run_all([spec], base, dataset)
    state = {
        k.removeprefix("param/"): v for k, v in states[spec.id].items() if k.startswith("param/")
    }
    save_peft(tmp_path / "adapter", state, spec.method.rank, spec.method.alpha, "tiny64")
    loaded = PeftModel.from_pretrained(base.model, tmp_path / "adapter").double()
    try:
        nll = evaluate(loaded, [eval_batches(dataset.test, 4096)], "fp64")[0]
    finally:
        loaded.unload()
    assert nll == pytest.approx(records[spec.id][-1]["test_nll"], abs=1e-9)


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


@pytest.mark.parametrize("method", [LoRA(rank=4), FullFT()])
def test_micro_batches_change_nothing(world, method):
    spec, base, dataset = world
    spec = dataclasses.replace(spec, method=method, lr=1e-3)
    whole, _ = run_all([spec], base, dataset)
    for rows in (1, 3):
        parts, _ = run_all([spec], base, dataset, micro_batch_size=rows)
        for name, tensor in whole[spec.id].items():
            assert torch.allclose(tensor, parts[spec.id][name], rtol=0, atol=1e-9), (
                rows,
                name,
            )


def test_pack_equals_runs_alone(world):
    """Members with other rates, alphas and seeds, in float64, below the edge of stability."""
    spec, base, dataset = world
    pack = [
        dataclasses.replace(spec, lr=1e-3),
        dataclasses.replace(spec, lr=4e-3, seed=1),
        dataclasses.replace(spec, method=LoRA(rank=4, alpha=8.0)),
        dataclasses.replace(spec, lr=2e-3, steps=4),
    ]
    together, _ = run_all(pack, base, dataset)
    for member in pack:
        alone, _ = run_all([member], base, dataset)
        for name, tensor in alone[member.id].items():
            assert torch.allclose(tensor, together[member.id][name], rtol=0, atol=1e-9), name


def test_a_diverging_member_leaves_and_disturbs_nobody(world):
    spec, base, dataset = world
    calm, wild = (
        dataclasses.replace(spec, lr=1e-3, steps=14),
        dataclasses.replace(spec, lr=3.0, steps=14),
    )
    ended = {}
    for event in finetune([wild, calm], base, dataset):
        ended |= {rid: (state, event.step) for rid, (state, _) in event.ended.items()}
    assert ended[wild.id][0] == "diverged" and ended[wild.id][1] < 14
    assert ended[calm.id] == ("done", 14)
    alone, _ = run_all([calm], base, dataset)
    together, _ = run_all([wild, calm], base, dataset)
    for name, tensor in alone[calm.id].items():
        assert torch.allclose(tensor, together[calm.id][name], rtol=0, atol=1e-9)


def test_resumed_run_is_bit_identical(world):
    spec, base, dataset = world
    whole, _ = run_all([spec], base, dataset)
    for event in finetune([spec], base, dataset):
        if event.step == 3:
            middle = event.snapshot()
            middle = {
                i: {"tensors": {k: v.clone() for k, v in s["tensors"].items()}, "meta": s["meta"]}
                for i, s in middle.items()
            }
            break
    rest, _ = run_all([spec], base, dataset, resume=middle)
    for name, tensor in whole[spec.id].items():
        assert torch.equal(tensor, rest[spec.id][name])


def test_adamw_equals_torch_with_decay_and_clipping():
    spec = tiny_spec(weight_decay=0.1, clip_norm=0.5, lr=1e-2)
    start = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    optimizer = AdamW.start(OneRun({"w": ours}), [spec])
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(20):
        for w in (ours, theirs):
            w.grad = None
            ((w - 1) ** 2).sum().backward()
        optimizer.step(step, optimizer.grad_norms())
        torch.nn.utils.clip_grad_norm_([theirs], 0.5)
        reference.step()
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_full_fine_tuning_equals_torch_over_a_whole_run(world):
    """Against a plain loop of transformers' forward and torch.optim.AdamW: stale copies of weights
    would show."""
    import copy

    spec, base, dataset = world
    spec = dataclasses.replace(spec, method=FullFT(), lr=2e-3)
    reference = copy.deepcopy(base.model).requires_grad_(True)
    optimizer = torch.optim.AdamW(
        reference.parameters(), lr=spec.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0
    )
    states, records = run_all([spec], base, dataset)
    for step in range(spec.steps):
        rows = dataset.train(spec.seed, step * spec.batch_size, spec.batch_size)
        tokens = torch.tensor(np.stack([e.tokens for e in rows]).astype(np.int64))
        bears = torch.tensor(np.stack([e.loss for e in rows]))[:, 1:]
        logits = reference(input_ids=tokens).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits[bears], tokens[:, 1:][bears])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert float(loss.detach()) == pytest.approx(records[spec.id][step]["train_nll"], abs=1e-9)
    for name, p in reference.named_parameters():
        assert torch.allclose(p, states[spec.id][f"param/{name}"], rtol=0, atol=1e-9), name


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
    assert float(got) == pytest.approx(want, abs=1e-9)


def test_eval_steps_of_a_short_run_begin_those_of_a_long_one():
    assert eval_steps(8) == [1, 2, 3, 4, 6, 8]
    assert set(eval_steps(30)[:-1]) <= set(eval_steps(1000))
    assert eval_steps(1) == [1]


def test_shipped_base_is_near_its_floor_and_far_from_the_dialects(world):
    """The base knows its language; the dialect is a task: its NLL starts at least 0.3 above the
    floor."""
    spec, base, dataset = world
    start = evaluate(base.model, [eval_batches(dataset.test, 4096)], "fp64")[0]
    language = data.load(
        dataclasses.replace(
            spec.dataset, generator_params={"rule_shift": 0.0, "new_exceptions": 0.0}
        ),
        [],
    )
    known = evaluate(base.model, [eval_batches(language.test, 4096)], "fp64")[0]
    assert known - language.entropy_floor_nats < 0.25
    assert start - dataset.entropy_floor_nats > 0.3
    assert math.isfinite(start)

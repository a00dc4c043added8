"""LoRA against PEFT, full fine-tuning against torch, in float64; LoRA's further fields; norms and
spectra against a decomposition; the adapter's file against PEFT."""

import copy
import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from peft import PeftModel

from lorasweep.cli import finished_runs
from lorasweep.cli.actions import act
from lorasweep.data import load as data
from lorasweep.data.examples import collate, eval_batches
from lorasweep.errors import TrainingError
from lorasweep.launch.trainer import TorchTrainer, finetune
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.methods.stacked import save_peft, spectral_norm
from lorasweep.models.load import empty_model
from lorasweep.store.run_store import RunStore
from lorasweep.train.objectives.nll import evaluate, nll_sums
from lorasweep.train.optim import AdamW
from tests.training import (
    EPS,
    ROUNDING,
    SMALL,
    SMALL_MOE,
    Trained,
    apart,
    beside_peft,
    by_torch,
    moe,
    pack_of,
    run,
    small_world,
    state_of,
)
from tests.world import tiny_spec

pytestmark = pytest.mark.usefixtures("norms_in_float64")


@pytest.fixture(scope="module")
def world():
    return small_world(lr=8e-3)


@pytest.mark.numerics
def test_stacked_adapters_equal_peft_at_every_point_of_a_run(world, other_weights):
    """Same start, loss, gradients; at each step one update within 1e-12, with decay and clipping."""
    spec, base, dataset = world
    spec = dataclasses.replace(spec, weight_decay=0.1, clip_norm=0.05)
    other, model = (copy.deepcopy(one.model) for one in (other_weights(base), base))
    trainables = pack_of([spec.method], model, spec.model)
    reference, pairs = beside_peft(trainables, other, spec.method)
    optimizer, theirs = AdamW(trainables, [spec]), [p for _, p in pairs]
    settings = {"lr": spec.lr, "betas": (0.9, 0.95), "eps": EPS, "weight_decay": 0.1}
    torch_optimizer = torch.optim.AdamW(theirs, **settings)
    for step in range(spec.steps):
        with torch.no_grad():  # the same state on both sides
            for ours, other in pairs:
                other.copy_(ours[0])
        batch = collate(dataset.train(spec.seed, step * 4, 4))
        models = (model, reference.get_base_model())
        losses = [nll_sums(m, batch, "fp64")[0] / batch.n_loss for m in models]
        sum(losses).backward()
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
    trainables = pack_of([method], base.model, spec.model)
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
    trainables.detach()
    assert evaluate(base.model, batches, "fp64") == before


@pytest.fixture(scope="module")
def trained(world):
    """Train runs on few rows and return their results, NLLs of the curve as an array."""
    spec, base, _ = world
    rows = dataclasses.replace(spec.dataset, n_test=8, n_test_curve=8)
    short = dataclasses.replace(spec, dataset=rows, lr=2e-3, steps=4, eps=1e-30)

    def train(*changes):
        pack = [dataclasses.replace(short, **c) for c in changes]
        found = Trained(finetune(pack, base, data.load(pack[0].dataset, []))).results
        ordered = [found[one.id] for one in pack]
        return [{**r, "nlls": np.array([p["test_nll"] for p in r["curve"]])} for r in ordered]

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


def test_rules_of_scaling_the_other_start_and_shares_of_the_gradient(trained):
    rules = ("rank", "sqrt_rank", "none")
    assert [LoRA(rank=4, scaling_by=s).scaling for s in rules] == [8, 16, 32]
    b = LoRA(rank=4, random_factor="b")
    (final,) = trained({"method": b, "steps": 8, "dataset": tiny_spec().dataset})
    assert final["norm_a"] > 0 and final["norm_b"] > 0
    assert final["nlls"][-1] < final["nll_start"]
    one, other = trained(*({"method": LoRA(rank=4, init_seed=k)} for k in (0, 1)))
    assert one["test_nll"] != other["test_nll"]
    (full,) = trained({"method": FullFT()})
    for result, sets in ((one, set()), (full, {"rest"})):
        share = result["curve"][0]["grad_share"]
        assert share.keys() == {"attention", "mlp", "unembedding"} | sets
        assert sum(share.values()) == pytest.approx(1)


def perturbed(world, methods):
    """A pack with random tensors and gradients, on a copy of the base."""
    model = copy.deepcopy(world[1].model)
    trainables = pack_of(methods, model, world[0].model, perturb=0.1)
    for p in trainables.parameters().values():
        p.grad = torch.randn_like(p)
    return trainables


def decomposed(matrix):
    return float(torch.linalg.svdvals(matrix.double())[0]), float(matrix.double().norm())


@pytest.mark.parametrize("ranks", [(4,), (2, 2, 8)])
def test_adapters_equal_a_decomposition(world, ranks):
    methods = [LoRA(rank=r, alpha=8 + k, scaling_by="sqrt_rank") for k, r in enumerate(ranks)]
    trainables = perturbed(world, methods)
    pack = [dataclasses.replace(world[0], method=m) for m in methods]
    norms, spectra = trainables.norms(), trainables.spectra()
    squares = AdamW(trainables, pack).grad_squares()
    for name, p in trainables.parameters().items():
        short, runs = trainables.part_of(name)
        for k, grad in zip(range(runs.start, runs.stop), p.grad):
            want = float(grad.double().square().sum())
            assert squares[k][short] == pytest.approx(want, rel=1e-12)
    for k, method in enumerate(methods):
        tensors, total = state_of(trainables, k), 0.0
        assert len(spectra[k]) == len(tensors) / 2
        for name, found in spectra[k].items():
            a, b = tensors[f"{name}.A"].double(), tensors[f"{name}.B"].double()
            largest, frobenius = decomposed(method.scaling * b @ a)
            want = {"a": decomposed(a)[0], "b": decomposed(b)[0], "delta": largest}
            assert found == pytest.approx(want, rel=1e-6), name
            total += frobenius**2
        assert norms[k]["norm_delta"] == pytest.approx(total**0.5, rel=1e-6)
    with torch.no_grad():  # a run that broke down leaves the spectra of others
        for name, p in trainables.parameters().items():
            if trainables.part_of(name)[1].start == 0:
                p[0] = torch.nan
    broken, *well = trainables.spectra()
    assert well == spectra[1:]
    assert all(value != value for norms in broken.values() for value in norms.values())


def test_full_fine_tuning_equals_a_decomposition(world):
    start = {n: p.detach().clone() for n, p in world[1].model.named_parameters()}
    trainables = perturbed(world, [FullFT()])
    (norm,), (spectrum,) = trainables.norms(), trainables.spectra()
    deltas = {n: p.detach() - start[n] for n, p in trainables.parameters().items()}
    total = sum(float(d.double().square().sum()) for d in deltas.values())
    assert norm["norm_delta"] == pytest.approx(total**0.5, rel=1e-6)
    for name, found in spectrum.items():
        want = decomposed(deltas[f"{name}.weight"])[0]
        assert found["delta"] == pytest.approx(want, rel=1e-6), name


def test_a_spectral_norm_where_digits_are_hard_to_keep(monkeypatch):
    """Two nearly equal largest values, a condition of 1e12, more rows than one block."""
    monkeypatch.setattr("lorasweep.methods.stacked.BLOCK", 16)
    left, right = (torch.linalg.qr(torch.randn(n, 30).double()).Q for n in (50, 40))
    values = torch.logspace(0, -12, 30, dtype=torch.float64)
    values[1] = 1 - 1e-9
    matrix = left @ values.diag() @ right.mT
    for m in (matrix, matrix.mT):
        assert float(spectral_norm(m)) == pytest.approx(1.0, rel=1e-12)
    assert float(spectral_norm(torch.zeros(3, 2))) == 0


CASES = [
    *itertools.product((SMALL, dataclasses.replace(SMALL, tied=True)), ("all", "attention"), ({},)),
    *((SMALL_MOE, "all", m) for m in ({}, {"expert_outer": "shared"})),
]


@pytest.mark.parametrize(("shape", "layers", "more"), CASES)
@pytest.mark.parametrize("scaling_by", ["rank", "sqrt_rank", "none"])
def test_peft_computes_the_logits_that_were_trained(tmp_path, shape, layers, more, scaling_by):
    torch.manual_seed(0)
    base = moe("eager") if shape is SMALL_MOE else empty_model(shape).double()
    tokens = torch.randint(20, (2, 9))
    more = {**more, "expert_alpha": 6.0} if shape is SMALL_MOE else more
    for rank in (4,) if shape is SMALL_MOE else (1, 3, 4):
        method = LoRA(rank=rank, alpha=5.0, layers=layers, scaling_by=scaling_by, **more)
        model = moe() if shape is SMALL_MOE else copy.deepcopy(base)
        trainables = pack_of([method], model, shape, perturb=0.3)
        folder, by = tmp_path / str(rank), {"rank": 2, "sqrt_rank": 2**0.5, "none": 1}
        assert not shape.n_experts or method.expert_scaling(2) == 6 / by[scaling_by]
        save_peft(folder, state_of(trainables), method, "nobody/small", "abc", shape.n_experts)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder).double()
        with torch.no_grad():
            got, want, start = (m(input_ids=tokens).logits for m in (loaded, model, base))
        assert (got - start).abs().max() > 0.1  # it does something
        assert torch.allclose(got, want, rtol=0, atol=1e-5)  # PEFT holds adapters in fp32
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["lora_alpha"] == method.scaling * rank  # a float is kept exactly
        assert (config["base_model_name_or_path"], config["revision"]) == ("nobody/small", "abc")


def test_the_command_compares_with_the_recorded_loss(compose, tmp_path, capsys):
    """Trained again on a machine that rounds differently, the final loss is off by `shift`."""
    small = ("scale=smoke", "method=lora", "method.rank=4", "lr=5e-3", "steps=2")
    asked = compose(*small, "format=json")
    act(asked, TorchTrainer())
    capsys.readouterr()
    (spec,), store = [p.spec for p in asked.points], RunStore(tmp_path / "runs")

    def save(out, shift, base=None, **settings):
        def elsewhere(pack, exec_, resume):
            for event in TorchTrainer()(pack, exec_, resume):
                for _, final in event.ended.values():
                    final["test_nll"] += shift
                    final["base_sha256"] = base or final["base_sha256"]
                yield event

        settings |= {"action": "adapter", "run": spec.id, "out": f"{tmp_path}/{out}"}
        request = dataclasses.replace(asked, **settings)
        return finished_runs.adapter(request, store, elsewhere).as_text()

    assert "difference +0.0e+00" in save("adapter", 0.0)
    assert "difference +1.0e-03" in save("adapter", 1e-3) and (tmp_path / "adapter").is_dir()
    env = store.env(spec.id)
    env["packages"]["torch"] = "1.0"
    store.write_env(spec.id, 1, env)
    with pytest.raises(TrainingError, match=r"torch 1\.0 then.*add max_difference=0\.03"):
        save("other", 0.025)
    with pytest.raises(TrainingError, match=r"another base .* than is there now \(other\)"):
        save("other", 0.0, base="other")
    assert not (tmp_path / "other").exists()
    assert "torch 1.0 then" in save("other", 0.025, max_difference=0.03)
    assert (tmp_path / "other").is_dir()

"""LoRA against PEFT, full fine-tuning against torch, in float64; LoRA's further fields; norms and
spectra against a decomposition; adapters of experts against a loop over merged weights and PEFT."""

import copy
import dataclasses
import itertools
import json
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.func import functional_call

from lorasweep.cli.actions import act
from lorasweep.config.compose import shipped_model
from lorasweep.data import splits as data
from lorasweep.data.examples import collate, eval_batches
from lorasweep.errors import ModelError, SpecError, TrainingError
from lorasweep.launch.torch_trainer import TorchTrainer, finetune
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.methods.stacked import in_peft_layout, save_peft, spectral_norm
from lorasweep.models import load as models
from lorasweep.models.forward import autocast, hold_in_bf16
from lorasweep.models.load import empty_model, find_targets
from lorasweep.store.run_store import RunStore
from lorasweep.train.objectives.nll import evaluate, nll_sums
from lorasweep.train.optim import AdamW
from lorasweep.work import again
from tests import training
from tests.training import EPS, ROUNDING, SMALL, SMALL_MOE, apart, moe, pack_of, run, state_of
from tests.world import tiny_spec

pytestmark = pytest.mark.usefixtures("norms_in_float64")


@pytest.fixture(scope="module")
def world():
    return training.small_world(lr=8e-3)


@pytest.mark.numerics
def test_stacked_adapters_equal_peft_at_every_point_of_a_run(world, other_weights):
    """Same start, loss, gradients; at each step one update within 1e-12, with decay and clipping."""
    spec, base, dataset = world
    spec = dataclasses.replace(spec, weight_decay=0.1, clip_norm=0.05)
    other, model = (copy.deepcopy(one.model) for one in (other_weights(base), base))
    trainables = pack_of([spec.method], model, spec.model)
    reference, pairs = training.beside_peft(trainables, other, spec.method)
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
    losses, norms = zip(*training.by_torch(spec, reference, dataset))
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
        found = training.Trained(finetune(pack, base, data.load(pack[0].dataset, []))).results
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
    assert final["norm_a"] > 0 and final["norm_b"] > 0 and final["nlls"][-1] < final["nll_start"]
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
        return again.adapter(request, store, elsewhere).as_text()

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


# ---------------------------------------------------------------- experts


def merged(model, method, state):
    """The base's weights with one run's adapters added, expert by expert."""
    weights = {n: p.detach() for n, p in model.named_parameters()}
    rank = method.expert_rank_of(SMALL_MOE.n_experts, SMALL_MOE.n_active_experts)
    for name in {n.rpartition(".")[0] for n in state}:
        a, b = state[f"{name}.A"], state[f"{name}.B"]
        experts, _, part = name.rpartition(".")
        if not experts.endswith("experts"):
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + method.scaling * b @ a
            continue
        width = SMALL_MOE.hidden_size if part == "down_proj" else SMALL_MOE.mlp_size
        deltas = []
        for e in range(SMALL_MOE.n_experts):  # a factor of fewer rows is shared
            own_a = a if len(a) == rank else a[e * rank : (e + 1) * rank]
            own_b = b if len(b) == width else b[e * width : (e + 1) * width]
            deltas.append(method.expert_scaling(rank) * own_b @ own_a)
        whole, delta = "down_proj" if part == "down_proj" else "gate_up_proj", torch.stack(deltas)
        if part != "down_proj":
            none = torch.zeros_like(delta)
            delta = torch.cat([delta, none] if part == "gate_proj" else [none, delta], 1)
        weights[f"{experts}.{whole}"] = weights[f"{experts}.{whole}"] + delta
    return weights


DENSE = dataclasses.replace(SMALL_MOE, n_experts=0, n_active_experts=0)
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
def test_a_pack_is_a_loop_over_merged_experts(layers, outer, other_weights):
    methods = [dataclasses.replace(m, layers=layers, expert_outer=outer) for m in READINGS]
    for method in methods:
        method.check(SMALL_MOE)
    model, reference = moe(), other_weights(moe("eager"))
    tokens = torch.randint(SMALL_MOE.vocab_size, (3 * len(methods), 7))
    with torch.no_grad():
        start = model(input_ids=tokens).logits
        assert apart(start, reference(input_ids=tokens).logits) < ROUNDING[1]
    trainables = pack_of(methods, model, SMALL_MOE, perturb=0.2)
    mixed = torch.randn(len(methods), 21, SMALL_MOE.vocab_size, dtype=torch.float64)
    logits = model(input_ids=tokens).logits.view_as(mixed)
    (logits * mixed).sum().backward()
    spectra, norms = trainables.spectra(), trainables.norms()
    base, down = dict(moe().named_parameters()), "model.layers.1.mlp.experts.down_proj"
    for k, method in enumerate(methods):
        state = {n: t.clone().requires_grad_() for n, t in state_of(trainables, k).items()}
        assert sum(p.numel() for p in state.values()) == method.n_trainable(SMALL_MOE)
        own = tokens.view(len(methods), 3, 7)[k]
        want = functional_call(reference, merged(reference, method, state), (own,)).logits
        assert apart(logits[k], want.flatten(0, 1)) < ROUNDING[1]
        (want.flatten(0, 1) * mixed[k]).sum().backward()
        ours = state_of(trainables, k, "grad")
        for name, p in state.items():
            assert float(p.grad.abs().max()) > 0, name
            assert apart(ours[name], p.grad) < ROUNDING[1], name
        # norms are of all deltas, and a stack's spectrum is that of its largest expert
        deltas = {n: (p - base[n]).detach() for n, p in merged(moe(), method, state).items()}
        largest = float(torch.linalg.matrix_norm(deltas[down], 2).max())
        total = sum(float(d.square().sum()) for d in deltas.values()) ** 0.5
        found = spectra[k][down]["delta"], norms[k]["norm_delta"]
        assert found == pytest.approx((largest, total), rel=1e-9)
    trainables.detach()
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, start)


@pytest.mark.numerics
def test_a_training_step_is_that_of_pefts_target_parameters(other_weights):
    """PEFT's one pair for gate and up may mix them; where its B is block-diagonal, and stays so, it
    is our two. Loss, gradients and one AdamW step, in float64."""
    method, model = LoRA(rank=4, layers="mlp", expert_alpha=6.0), moe()
    rank = method.expert_rank_of(SMALL_MOE.n_experts, SMALL_MOE.n_active_experts)
    alpha, stacks = method.expert_scaling(rank) * rank, ["mlp.experts.gate_up_proj"]
    config = LoraConfig(
        **{"r": rank, "lora_alpha": alpha, "target_modules": []},
        target_parameters=[*stacks, "mlp.experts.down_proj"],
        rank_pattern={stacks[0]: 2 * rank},
        alpha_pattern={stacks[0]: 2 * alpha},
    )
    reference = get_peft_model(other_weights(moe("eager")), config).double()
    trainables = pack_of([method], model, SMALL_MOE, perturb=0.2)
    theirs = {
        n.removeprefix("base_model.model.").removesuffix(".default.weight"): p
        for n, p in reference.named_parameters()
        if p.requires_grad
    }

    def state(what):
        tensors = trainables.parameters().items()
        named = {trainables.part_of(n)[0]: what(p)[0] for n, p in tensors}
        return in_peft_layout(named, SMALL_MOE.n_experts)[0]

    with torch.no_grad():
        start = state(torch.detach)
        assert start.keys() == theirs.keys()
        for name, p in theirs.items():
            p.copy_(start[name])
    tokens = torch.randint(SMALL_MOE.vocab_size, (4, 9))
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
        (LoRA(rank=3), r"rank/2 by method.expert_rank=active.*a multiple of 2 up to 32", SMALL_MOE),
        (LoRA(rank=2, expert_rank="all"), "rank/4 by .*all", SMALL_MOE),
        (LoRA(rank=4, expert_rank="some"), "Allowed: active, all, whole", SMALL_MOE),
        (LoRA(rank=4, expert_outer="none"), "Allowed: own, shared", SMALL_MOE),
        (LoRA(rank=4, expert_alpha=0.0), "expert_alpha=0.0", SMALL_MOE),
        (LoRA(rank=4, layers="attention", expert_rank="all"), "no expert is adapted", SMALL_MOE),
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
    LoRA(rank=3, layers="attention").check(SMALL_MOE)  # experts that are not adapted share no rank
    assert "expert" not in tiny_spec(method=LoRA(rank=4)).method.canonical


def test_a_set_that_matches_nothing_is_refused():
    transposed, fewer = moe(), dataclasses.replace(SMALL_MOE, n_active_experts=1)
    transposed.model.layers[1].mlp.experts.is_transposed = True
    narrow = dataclasses.replace(SMALL_MOE, mlp_size=32)
    for model, shape, words in (
        (moe(), DENSE, r"expected 6 modules named \['down_proj', .*found 0"),
        (moe(), narrow, r"gate_up_proj \[4, 64, 16\].*mlp\.experts"),
        (transposed, SMALL_MOE, r"Not of that kind: .*layers\.1\.mlp\.experts"),
    ):
        with pytest.raises(ModelError, match=words):
            find_targets(model, shape, ("mlp",))
    with pytest.raises(ModelError, match="active experts is 2, described as 1"):
        models.check_shape(moe(), fewer)


def logits_and_gradients(model, trainables, tokens):
    logits = model(input_ids=tokens).logits
    logits.float().square().sum().backward()
    return [logits.detach(), *(p.grad for p in trainables.parameters().values())]


ROWS = training.ragged(SMALL_MOE.vocab_size, 30)


@pytest.fixture
def based():
    spec = tiny_spec(precision="fp64", lr=2e-3, steps=4, batch_size=3, eps=EPS)
    return dataclasses.replace(spec, model=SMALL_MOE), models.Base(moe(), None, "random")


@pytest.mark.numerics
def test_packs_are_the_runs_alone(based, other_weights):
    """All readings in one pack, one of which ends early; states after the last update."""
    spec, base = based
    pack = [
        dataclasses.replace(spec, method=m, seed=k % 2, lr=1e-3 * (1 + k), steps=2 if k == 1 else 4)
        for k, m in enumerate(READINGS)
    ]
    training.as_alone(pack, base, ROWS, other_weights(base), micro=2)


@pytest.mark.numerics
@pytest.mark.parametrize("layers", ["all", "mlp"])
def test_full_fine_tuning_trains_the_stacks(based, layers, other_weights):
    """One step is torch's AdamW on the eager model; norms and spectra are those of each expert."""
    spec, base = based
    method = FullFT() if layers == "all" else FullFT(scope="matrices", layers=layers)
    spec = dataclasses.replace(spec, method=method, steps=1)
    wanted = "experts" if layers == "mlp" else ""
    reference = other_weights(moe("eager"))
    theirs = {n: p for n, p in reference.named_parameters() if wanted in n}
    assert sum(p.numel() for p in theirs.values()) == method.n_trainable(SMALL_MOE)
    start = {n: p.detach().clone() for n, p in theirs.items()}
    training.by_torch(spec, reference, ROWS, wanted)
    states, records = run([spec], base, ROWS)
    got = states[spec.id]["tensors"]
    assert {n.removeprefix("param/") for n in got if n.startswith("param/")} == theirs.keys()
    for name, p in theirs.items():
        assert apart(got[f"param/{name}"], p) < ROUNDING[1], name
    delta = sum(float((p.detach() - start[n]).square().sum()) for n, p in theirs.items()) ** 0.5
    assert records[spec.id][-1]["norm_delta"] == pytest.approx(delta, rel=1e-3)


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="torch before 2.10")
def test_grouped_products_in_fp32_are_those_of_the_loop_in_float64(monkeypatch):
    """torch's grouped_mm, with ranks padded to its alignment, for groups of which some are empty."""
    grouped = Mock(wraps=torch.nn.functional.grouped_mm)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", grouped)
    tokens, found = torch.randint(SMALL_MOE.vocab_size, (5, 3)), []
    for model in (moe(), moe().float()):
        trainables = pack_of(READINGS, model, SMALL_MOE, perturb=0.2)
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
    tokens, found = torch.randint(SMALL_MOE.vocab_size, (4, 8)), []
    for model in (wide, narrow):
        trainables = pack_of(READINGS[:2], model, SMALL_MOE, perturb=0.2)
        with autocast("bf16", torch.device("cpu")):
            found.append(logits_and_gradients(model, trainables, tokens))
    assert all(torch.equal(one, other) for one, other in zip(*found))
    assert all(float(g.abs().max()) > 0 for g in found[0][1:])

"""Methods of PEFT against our LoRA and against PEFT's own model in a plain loop; checkpoints; saved
adapters on the untouched base; ids; what is refused."""

import copy
import dataclasses
import json
from types import SimpleNamespace

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from lorasweep.cli.actions import act
from lorasweep.config.compose import compose_request
from lorasweep.errors import RankTooLarge, SpecError, TrainingError
from lorasweep.launch.torch_trainer import TorchTrainer, finetune
from lorasweep.launch.worker import check_world_size
from lorasweep.methods import peft as ours
from lorasweep.methods.lora import LoRA
from lorasweep.methods.registry import spec_from
from lorasweep.models.load import find_targets, weights_sha256
from lorasweep.plan.detect import Hardware, from_plain
from lorasweep.plan.needs import Layout, pack_memory
from lorasweep.plan.planner import Planner
from lorasweep.spec.execution import Cluster, Exec
from lorasweep.spec.run import validate
from lorasweep.spec.streams import stream
from lorasweep.store.checkpoint import weights_of
from lorasweep.store.exported import load_runs
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import run_names, trained_by_set
from lorasweep.train.loop import attached
from lorasweep.train.objectives.sft import SupervisedFineTuning
from lorasweep.work import again
from tests import training
from tests.training import EPS, ROUNDING, Trained, apart, pack_of, state_of
from tests.world import tiny_spec

MODULES = [
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
]
LORA = {"r": 4, "lora_alpha": 32}
SHIPPED = {
    "dora": (4, peft.LoraConfig, {**LORA, "use_dora": True}, "lora_"),
    "pissa": (4, peft.LoraConfig, {**LORA, "init_lora_weights": "pissa"}, "lora_"),
    "olora": (4, peft.LoraConfig, {**LORA, "init_lora_weights": "olora"}, "lora_"),
    "vera": (32, peft.VeraConfig, {"r": 32}, "vera_lambda"),
    "oft": (8, peft.OFTConfig, {"oft_block_size": 8}, "oft_R"),
}
"""Files of conf/method: a rank, PEFT's config as its user writes it, names of trained tensors."""
SINGLE = ("pissa", "olora")
"""PEFT refuses to decompose a base in float64."""
ROUNDING_FP32 = 2e-4


def method_of(name, *more):
    request = compose_request([f"method={name}", f"method.rank={SHIPPED[name][0]}", *more])
    return request.points[0].spec.method


def spec_of(name, **changes):
    """A short run of a shipped method, in float64 where PEFT can."""
    given = {"lr": 8e-3, "eps": EPS, "steps": 6, "precision": "fp32" if name in SINGLE else "fp64"}
    return tiny_spec(**{**given, "method": method_of(name), **changes})


@pytest.fixture(scope="module")
def worlds():
    """A base and rows by precision. All tests leave the base as it was."""
    return {p: training.with_base_and_rows(tiny_spec(precision=p))[1:] for p in ("fp32", "fp64")}


@pytest.fixture(autouse=True)
def untouched(worlds):
    def facts(model):
        flags = {n: (type(p), p.requires_grad, p.grad is None) for n, p in model.named_parameters()}
        kinds = {n: type(m) for n, m in model.named_modules()}
        return weights_sha256(model), flags, kinds, {*vars(model)}

    before = [facts(base.model) for base, _ in worlds.values()]
    yield
    assert [facts(base.model) for base, _ in worlds.values()] == before


@pytest.mark.parametrize("steps", ROUNDING)
@pytest.mark.parametrize("rank", [1, 4])
def test_lora_of_peft_equals_our_lora(worlds, monkeypatch, norms_in_float64, steps, rank):
    base, rows = worlds["fp64"]
    fields = {"config": "LoraConfig", "rank": rank, "alpha": 32}
    theirs = spec_of("dora", method=ours.PEFT(**fields), steps=steps, weight_decay=0.1)
    mine = dataclasses.replace(theirs, method=LoRA(rank=rank, alpha=32))
    other = dataclasses.replace(base, model=copy.deepcopy(base.model))
    trainables = pack_of([mine.method], other.model, mine.model, [mine.seed])
    start = state_of(trainables)
    trainables.detach()
    attach = ours.PeftAdapter.__init__

    def with_our_start(self, *args):
        attach(self, *args)
        for name, p in self.parameters().items():
            p.data.copy_(start[name.replace(".lora_", ".").replace(".default.weight", "")])

    monkeypatch.setattr(ours.PeftAdapter, "__init__", with_our_start)
    found, wanted = (Trained(finetune([s], b, rows)) for s, b in ((theirs, base), (mine, other)))
    renamed = {
        n.replace(".lora_", ".").replace(".default.weight", ""): t
        for n, t in found.states[theirs.id]["tensors"].items()
    }
    tensors = wanted.states[mine.id]["tensors"]
    assert renamed.keys() == tensors.keys()
    assert max(apart(renamed[n], t) for n, t in tensors.items()) < ROUNDING[steps]
    for key in ("train_nll", "test_nll", "nll_start"):
        a, b = found.results[theirs.id][key], wanted.results[mine.id][key]
        assert a == pytest.approx(b, rel=ROUNDING[steps])
    assert theirs.method.n_trainable(theirs.model) == mine.method.n_trainable(mine.model)
    assert theirs.method.step_flops(mine.model, 7) == mine.method.step_flops(mine.model, 7)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_method_equals_pefts_own_model_in_a_plain_loop(worlds, norms_in_float64, name):
    spec = spec_of(name)
    base, rows = worlds[spec.precision]
    _, cls, fields, trained = SHIPPED[name]
    found = Trained(finetune([spec], base, rows))
    with torch.random.fork_rng():
        torch.manual_seed(int(stream("init", spec.seed, "peft").integers(2**63)))
        config = cls(**fields, target_modules=MODULES, task_type="CAUSAL_LM")
        model = get_peft_model(copy.deepcopy(base.model), config)
    assert {trained in n for n, p in model.named_parameters() if p.requires_grad} == {True}
    losses = training.by_torch(spec, model, rows, trained)
    limit = ROUNDING_FP32 if name in SINGLE else ROUNDING[10]
    records = found.records[spec.id]
    assert [r["train_nll"] for r in records] == pytest.approx([a for a, _ in losses], rel=limit)
    assert [r["grad_norm"] for r in records] == pytest.approx([b for _, b in losses], rel=limit)
    theirs = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters()}
    weights = weights_of(found.states[spec.id])
    assert weights.keys() == {n for n, p in theirs.items() if p.requires_grad}
    assert max(apart(weights[n], theirs[n]) for n in weights) < limit
    assert sum(w.numel() for w in weights.values()) == spec.method.n_trainable(spec.model)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_run_resumes_bit_for_bit(worlds, name):
    spec = spec_of(name, precision="fp32", seed=3)
    base, rows = worlds["fp32"]
    random = torch.get_rng_state()
    whole = Trained(finetune([spec], base, rows), at=(2,))
    assert torch.equal(random, torch.get_rng_state())
    again = Trained(finetune([spec], base, rows, resume=whole.at[2]))
    for i, state in whole.states.items():
        assert state["tensors"].keys() == again.states[i]["tensors"].keys()
        assert all(
            torch.equal(t, again.states[i]["tensors"][n]) for n, t in state["tensors"].items()
        )
        assert again.results[i]["test_nll"] == whole.results[i]["test_nll"]


def written(folder, spec, base, weights):
    targets = find_targets(base.model, spec.model, spec.method.target_layers())
    ours.save(folder, base.model, targets, spec, weights, ("some/base", "abc"))
    return PeftModel.from_pretrained(copy.deepcopy(base.model), folder)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_saved_adapter_has_the_loss_of_the_run_on_the_untouched_base(worlds, tmp_path, name):
    spec = spec_of(name, precision="fp32", lr=2e-2)
    base, rows = worlds["fp32"]
    trained = Trained(finetune([spec], base, rows))
    weights, result = weights_of(trained.states[spec.id]), trained.results[spec.id]
    model = written(tmp_path / "adapter", spec, base, weights)
    objective = SupervisedFineTuning({spec.id: rows}, "fp32")
    objective.start(dataclasses.replace(base, at_start={}), [spec])
    with torch.no_grad():
        (found,) = objective.evaluate(model.get_base_model(), [spec], True)
    assert found["test_nll"] == pytest.approx(result["test_nll"], abs=1e-5)
    assert abs(result["nll_start"] - result["test_nll"]) > 0.002
    assert result["base_sha256"] == base.sha256 == weights_sha256(base.model)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] and {*config["target_modules"]} == {*MODULES}
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/base", "abc")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_model.safetensors", "adapter_config.json"}
    if name in SINGLE:
        assert config["r"] == 8 and config["init_lora_weights"] is True


def test_an_adapter_that_peft_writes_wrong_is_refused(worlds, tmp_path, monkeypatch):
    spec, (base, rows) = spec_of("pissa"), worlds["fp32"]
    weights = weights_of(Trained(finetune([spec], base, rows)).states[spec.id])
    save = PeftModel.save_pretrained

    def other(self, folder, **how):
        save(self, folder, **how)
        path = f"{folder}/adapter_model.safetensors"
        save_file({n: 1.1 * t for n, t in load_file(path).items()}, path)

    monkeypatch.setattr(PeftModel, "save_pretrained", other)
    with pytest.raises(TrainingError, match="logits that differ"):
        written(tmp_path / "adapter", spec, base, weights)


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_a_base_is_restored_after_a_failed_attach(worlds, monkeypatch, error):
    spec, (base, rows) = spec_of("pissa"), worlds["fp32"]

    def fails(*args, **kwargs):
        get_peft_model(*args, **kwargs)
        raise error("broken")

    monkeypatch.setattr(peft, "get_peft_model", fails)
    kind = SpecError if error is ValueError else RuntimeError
    with pytest.raises(kind, match="broken") as caught:
        list(finetune([spec], base, rows))
    # now, while the error holds what would put the base back when it is collected
    assert "base_layer" not in str([*base.model.state_dict()]) and caught.tb
    assert weights_sha256(base.model) == base.sha256


def test_what_peft_refuses_while_it_attaches_is_said(worlds):
    base, rows = worlds["fp64"]
    with pytest.raises(SpecError, match=r"method=pissa: PEFT cannot attach it: .*float32"):
        list(finetune([spec_of("pissa", precision="fp64")], base, rows))


def test_a_tied_base_keeps_its_embedding_and_seeds_differ(worlds):
    spec, tied = spec_of("pissa"), training.SMALL
    tied = dataclasses.replace(tied, tied=True)
    model = training.empty_model(tied)
    before = model.lm_head.weight.clone()
    tokens = torch.arange(9)[None]
    wanted = model(input_ids=tokens).logits
    trainables = pack_of([spec.method], model, tied)
    assert model.lm_head.base_layer.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert torch.allclose(model(input_ids=tokens).logits, wanted, atol=1e-5)
    trainables.detach()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, before)
    starts = []
    for seed in (0, 0, 1):
        trainables = pack_of([method_of("dora")], model, tied, [seed])
        # what PEFT leaves unchanged is not held twice
        assert model.lm_head.base_layer.weight is model.model.embed_tokens.weight
        starts.append({n: p.detach().clone() for n, p in trainables.parameters().items()})
        trainables.detach()
    same = [all(torch.equal(starts[0][n], other[n]) for n in other) for other in starts[1:]]
    assert same == [True, False]


# ---------------------------------------------------------------- ids, counts, plans


IDS = {
    "dora": "09d4ae3d38d8",
    "pissa": "4bdc9d86c822",
    "olora": "8d134508fef0",
    "vera": "0a16f7bef023",
    "oft": "c636a3c49bf2",
}
"""Of a run on tiny64 with all defaults; the same with PEFT 0.20 and 0.21."""


def test_ids_hold_and_come_from_resolved_fields(monkeypatch):
    specs = {n: compose_request([f"method={n}", "model=tiny64"]).points[0].spec for n in SHIPPED}
    assert {name: spec.id for name, spec in specs.items()} == IDS
    for spec in specs.values():
        assert spec_from(json.loads(json.dumps(spec.plain()))) == spec
        assert len({hash(spec), hash(spec_from(spec.plain()))}) == 1
    dora = specs["dora"]
    given = dataclasses.replace(dora.method, fields={"use_dora": True, "fan_in_fan_out": False})
    assert given == dora.method  # a default that is written is no other run
    other = dataclasses.replace(dora.method, fields={"use_dora": True, "use_rslora": True})
    assert dataclasses.replace(dora, method=other).id != dora.id
    off = ours.PEFT(config="LoraConfig", fields={"init_lora_weights": False})
    assert off.fields["init_lora_weights"] is False and off == ours.PEFT(**off.plain())
    of_instances = ours.PEFT(config="ShiraConfig").fields  # which have more than fields
    assert of_instances["mask_type"] == "random" and "mask_fn" not in of_instances
    smaller = dataclasses.replace(dora.method, rank=2)
    assert (smaller.rank, smaller.fields) == (2, dora.method.fields)

    def newer(default):
        @dataclasses.dataclass
        class LoraConfig(peft.LoraConfig):
            added: object = default

        ours._config.cache_clear()
        monkeypatch.setattr(peft, "LoraConfig", LoraConfig)
        return spec_from(dora.plain()).id

    assert newer(None) == newer({} or 0) == dora.id != newer(5)
    monkeypatch.undo()
    ours._config.cache_clear()


@pytest.mark.parametrize("name", SHIPPED)
def test_trained_parameters_are_counted_from_shapes(name):
    spec, r = spec_of(name), SHIPPED[name][0]
    matrices = spec.model.matrices(("attention", "mlp", "unembedding"))
    of = {
        "dora": lambda m: r * (m.d_in + m.d_out) + m.d_out,
        "vera": lambda m: r + m.d_out,
        "oft": lambda m: m.d_in * (r - 1) // 2,
    }.get(name, lambda m: r * (m.d_in + m.d_out))
    assert spec.method.n_trainable(spec.model) == sum(of(m) * m.count for m in matrices)
    rows = trained_by_set(spec.method, spec.model)
    assert [row["trained"] > 0 for row in rows] == [True, True, True, False]


def test_plans_use_one_process_and_count_a_second_copy_of_the_base():
    dora, pissa = (spec_of(n, precision="bf16") for n in ("dora", "pissa"))
    gpu = compose_request(["hardware=h100", "method=lora"]).hardware
    machine = from_plain(gpu)
    parts = [pack_memory(1, s, machine, Layout(1, 4))["frozen weights"] for s in (dora, pissa)]
    matrices = dora.model.matrices(("attention", "mlp", "unembedding"))
    assert parts[1] - parts[0] == 4 * sum(m.size for m in matrices)
    big = compose_request(["model=llama-3.1-70b", "dataset=gsm8k_hub", "precision=bf16"])
    big = big.points[0].spec
    for method, processes in ((LoRA(rank=4), False), (dora.method, True)):
        kind = Planner(machine, Exec()).kind(dataclasses.replace(big, method=method))
        assert (kind.place.layout.gpus == 1) is processes and kind.pack_size == 1
    with pytest.raises(SpecError, match=r"method=dora trains one run at a time"):
        attached([dora, dora], SimpleNamespace(model=None)).__enter__()
    with pytest.raises(SpecError, match=r"exec\.world_size=2: method=dora trains in one process"):
        check_world_size([dora], Exec(world_size=2), Cluster(), Hardware("box"))


# ---------------------------------------------------------------- the command line


REFUSED = {
    "no class": (["method=peft"], r"set method\.config .*LoHaConfig.*method=dora"),
    "unknown class": (["method=peft", "method.config=LohaConfig"], "not found.*LoHaConfig.*"),
    "prompts": (
        ["method=peft", "method.config=PrefixTuningConfig"],
        "not found.*HRAConfig.* do not adapt matrices",
    ),
    "own loop": (
        ["method=peft", "method.config=AdaLoraConfig"],
        "not found.*LoraConfig.* do not adapt matrices",
    ),
    "unknown field": (["method=dora", "+method.fields.use_doar=true"], "Did you mean 'use_dora'"),
    "size as field": (["method=dora", "+method.fields.r=8"], r"Set method\.rank"),
    "targets": (["method=dora", "+method.fields.modules_to_save=[lm_head]"], "not found"),
    "text": (["method=dora", "method.fields={use_dora: yes_}"], "expected true or false"),
    "dropout": (["method=dora", "+method.fields.lora_dropout=0.1"], "no dropout"),
    "rows": (["method=pissa", "method.fields={init_lora_weights: eva}"], "allowed are true"),
    "both": (["method=pissa", "+method.fields.use_dora=true"], "without use_dora"),
    "no alpha": (["method=vera", "method.alpha=32"], r"VeraConfig has none.*d_initial"),
    "rank 0": (["method=vera", "method.rank=0"], r"rank=0: expected .* at least 1"),
    "tokens": (["method=dora", "+method.fields.alora_invocation_tokens=[1]"], "not found"),
    "a config in a field": (["method=dora", "+method.fields.arrow_config={}"], "not found"),
    "our name": (["method=dora", "method.name=lora"], "method=lora.*another name"),
    "refused by PEFT": (["method=oft", "method.fields={r: 4}"], "PEFT refuses its fields"),
    "size that PEFT replaces": (["method=oft", "method.rank=7"], "Invalid `oft_block_size`"),
    "other matrices": (["method=peft", "method.config=GloraConfig"], "PEFT refuses it: Target mod"),
    "shared": (["method=peft", "method.config=UniLoraConfig"], "share trained tensors"),
    "experts": (["method=dora", "model=tiny64-experts"], "experts need method=lora"),
}


@pytest.mark.parametrize("given", REFUSED)
def test_what_is_not_supported_is_refused_before_the_start(given):
    words, why = REFUSED[given]
    with pytest.raises(SpecError, match=why):
        compose_request(words)


def test_a_rank_above_a_side_is_too_large():
    with pytest.raises(RankTooLarge, match=r"method\.rank=65.* from 1 to 16,"):
        validate(
            dataclasses.replace(spec_of("dora"), method=ours.PEFT(config="LoraConfig", rank=65))
        )


SWEEP = """# @package sweep
question: Which?
source: ours
how: One model.
analysis: arms
estimands:
  ratio: {measure: best_lr, of: {method: dora}, over: {method: lora}}
claims:
  same:
    {text: t, source: ours, measure: m, estimand: ratio, expected: 1, margin: [0.5, 2], primary: true,
     planning: {smoke: {sd: 0.1}}}
axes: {model: tiny64, dataset: dialect_smoke, steps: 2, seed: 0, lr: 1e-3}
arms:
  lora: {method: lora, rank: 2}
  dora: {method: dora, rank: [2, 4]}
  mine: {method: mine}
  free: {method: peft, config: LoHaConfig, fields: {init_weights: true}, rank: 2}
scales: {smoke: {}}
"""
MINE = "defaults: [peft, _self_]\nname: mine\nconfig: LoKrConfig\nfields: {decompose_both: true}\n"


def test_arms_of_a_sweep_and_files_of_the_user_name_methods(tmp_path):
    for path, text in (("sweep/which.yaml", SWEEP), ("method/mine.yaml", MINE)):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(text)
    words = ("+sweep=which", "scale=smoke")
    points = compose_request(words, str(tmp_path)).points
    found = {(p.arm, p.spec.method.name): p.spec.method for p in points}
    assert [(p.arm, p.spec.method.rank) for p in points] == [
        *(("lora", 2), ("dora", 2), ("dora", 4), ("mine", 8), ("free", 2))
    ]
    assert found["dora", "dora"].fields["use_dora"] and found["dora", "dora"].alpha == 32
    assert found["mine", "mine"].config == "LoKrConfig"
    assert found["mine", "mine"].fields["decompose_both"] is True
    assert found["free", "peft"].config == "LoHaConfig"
    names = list(run_names(points).values())
    assert names[1].startswith("dora r2 ") and not any("config" in name for name in names)
    of_dora = compose_request([*words, "dora.rank=8", "arms=dora"], str(tmp_path)).points
    assert [p.spec.method.rank for p in of_dora] == [8]
    (changed,) = compose_request(
        ["+sweep=lr_ratio", "scale=smoke", "arms=lora", "sweep.arms.lora.method=olora"]
        + ["sweep.arms.lora.lr=1e-3", "sweep.arms.lora.rank=4"]
    ).points[:1]
    assert changed.spec.method.fields["init_lora_weights"] == "olora"
    with pytest.raises(SpecError, match=r"method 'doar' not found\. Did you mean 'dora'"):
        compose_request([*words, "sweep.arms.dora.method=doar"], str(tmp_path))


@pytest.mark.slow
def test_a_command_trains_records_and_saves(compose, tmp_path, capsys):
    asked = compose("scale=smoke", "method=olora", "method.rank=4", "lr=5e-3", "steps=2")
    act(asked, TorchTrainer())
    (spec,), store = [p.spec for p in asked.points], RunStore(tmp_path / "runs")
    (row,) = load_runs(store.root).to_dict("records")
    assert (row["method"], row["rank"], row["alpha"]) == ("olora", 4, 32.0)
    assert row["packages"] == f"peft {peft.__version__}"
    assert "config=LoraConfig" in row["method_fields"] and "olora" in row["method_fields"]
    settings = {"action": "adapter", "run": spec.id, "out": f"{tmp_path}/adapter"}
    text = again.adapter(dataclasses.replace(asked, **settings), store).as_text()
    assert "difference +0.0e+00" in text and "peft.PeftModel.from_pretrained" in text
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (8, spec.model.name)
    assert "peft_type" in row["method_fields"]


@pytest.mark.slow
def test_rewards_train_an_adapter_of_peft():
    spec, base, rows = training.rewarded_world("bandit", method=method_of("dora"), steps=2)
    found = Trained(finetune([spec], base, rows))
    assert found.ends[spec.id] == "done" and found.records[spec.id][0]["grad_norm"] > 0

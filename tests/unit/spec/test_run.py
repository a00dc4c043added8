"""Identity: golden ids, canonical form, snapping, published sizes and parameter counts; checks: types
and limits at the field, what is converted, and what is said of the rest."""

import copy
import dataclasses
import json
import pickle
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasweep.errors import SpecError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.methods.registry import METHODS, spec_from
from lorasweep.spec.run import RunSpec, is_unpinned, snap_lr, validate, with_axes
from lorasweep.spec.values import ABOVE_0, BELOW_1, FrozenDict, Is, misfits, problems_of
from lorasweep.sweep.grid import geom, run_names
from tests.world import ROOT, compose_request, tiny_spec


def test_golden_ids():
    """A changed id means that finished runs stop counting as done."""
    bf16 = {"precision": "bf16", "clip_norm": 1.0, "warmup_steps": 2}
    specs = {
        "fullft": tiny_spec(method=FullFT(), lr=2e-3),
        "lora": tiny_spec(method=LoRA(rank=4), lr=5e-3),
        "lora_attention": tiny_spec(method=LoRA(rank=1, alpha=8, layers="attention"), seed=3),
        "bf16_clip": tiny_spec(method=LoRA(), **bf16),
        "small": compose_request(["scale=small", "+sweep=lr_ratio"]).points[0].spec,
    }
    golden = json.loads((ROOT / "tests/golden/run_ids.json").read_text())
    assert {name: spec.id for name, spec in specs.items()} == golden


def test_kept_results_have_the_ids_of_their_specs():
    tables = list((ROOT / "analysis" / "results").glob("*/table.parquet"))
    assert tables
    for path in tables:
        for row in pd.read_parquet(path).itertuples():
            assert spec_from(json.loads(row.spec)).id == row.run_id, path


def test_key_order_and_types_of_numbers_keep_the_id_and_other_values_do_not():
    spec = tiny_spec(method=LoRA(rank=4))
    plain = spec.plain()
    assert spec_from(dict(reversed(plain.items()))).id == spec_from(plain).id == spec.id
    assert tiny_spec(method=LoRA(alpha=32)).id == tiny_spec(method=LoRA(alpha=32.0)).id
    assert tiny_spec(method=LoRA(alpha=33)).id != tiny_spec(method=LoRA(alpha=32)).id
    assert tiny_spec(seed=1.0).id == tiny_spec(seed=1).id
    for layers, same in (("unembedding+mlp+attention", "all"), ("mlp+attention", "attention+mlp")):
        assert tiny_spec(method=LoRA(layers=layers)).id == tiny_spec(method=LoRA(layers=same)).id

    @dataclass(frozen=True)
    class Later(LoRA):
        """With a field that was added later, and its past value."""

        init: str = field(default="uniform", metadata={"added": "uniform"})

    assert tiny_spec(method=Later(rank=4)).id == spec.id
    assert tiny_spec(method=Later(rank=4, init="normal")).id != spec.id


@given(st.floats(1e-8, 10), st.floats(0.999999, 1.000001))
def test_rates_meet_after_snapping(lr, wobble):
    assert snap_lr(snap_lr(lr)) == snap_lr(lr)
    assert abs(snap_lr(lr) / lr - 1) < 0.0051
    assert set(geom(1e-4, 1e-2, 4)) <= set(geom(1e-4, 1e-2, 8))  # a grid and its refinement


def test_what_is_shown_is_what_is_trained():
    """A rate between grid points was shown as typed and trained as snapped."""
    request = compose_request(["+sweep=lr_ratio", "scale=smoke", "sweep.arms.lora.lr=[1.2345e-3]"])
    lora = [p for p in request.points if p.arm == "lora"]
    assert {p.spec.lr for p in lora} == {1.23e-3} == {tiny_spec(lr=1.2345e-3).lr}
    assert all("lr=0.00123" in name.split() for name in run_names(lora).values())


def test_a_spec_cannot_be_changed_and_a_changed_copy_has_another_id():
    """A revision that was set after hashing left the id as it was."""
    spec = tiny_spec(method=LoRA(rank=4))
    before = spec.id
    for part, name in ((spec, "lr"), (spec.model, "revision"), (spec.method, "rank")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, 1)
    with pytest.raises(TypeError, match=r"dataclasses\.replace"):
        spec.dataset.generator_params["rule_shift"] = 0.9
    assert spec.id == before
    model = dataclasses.replace(spec.model, revision="other")
    assert dataclasses.replace(spec, model=model).id != before
    for again in (copy.deepcopy(spec), pickle.loads(pickle.dumps(spec))):
        assert again == spec and again.id == spec.id
        with pytest.raises(TypeError):
            again.dataset.generator_params.clear()


def test_stored_keys_are_those_of_the_configuration():
    spec = tiny_spec(method=LoRA(random_factor="b"))
    plain = spec.plain()
    assert "knobs" in plain["dataset"] and "knobs" in plain["model"]["recipe"]
    assert plain["method"]["start"] == "b" and spec_from(plain) == spec
    overrides = ["scale=smoke", "method=lora", "method.rank=1", "method.start=b"]
    (point,) = compose_request([*overrides, "dataset.generator_params.rule_shift=0.25"]).points
    assert point.spec.method.random_factor == "b"
    assert compose_request(["run=012345678901"]).run == "012345678901"  # an id of digits alone
    assert point.spec.dataset.generator_params["rule_shift"] == 0.25


@pytest.mark.parametrize(
    ("change", "word"),
    [
        *(({"lr": lr}, "lr") for lr in (0.0, -1e-3, 1e6, float("nan"), float("inf"))),
        *(({name: value}, name) for name, value in (("steps", 0), ("batch_size", 0), ("seed", -1))),
        ({"precision": "fp8"}, "fp32"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"steps": 1.5}, r"steps=1\.5: expected a whole number"),
        ({"train_version": 99}, "train_version"),
        ({"model": "tiny64"}, "model='tiny64': expected ModelSpec"),
        ({"warmup_steps": 10**6}, "warmup_steps"),
        ({"group_size": 8}, "group_size=8: .* objective=sft"),
        ({"test_rows": False}, "test_rows"),
        ({"early_stopping": 2}, "early_stopping=2: .* validation rows"),
        *(({"method": {"rank": rank}}, "rank") for rank in (0, 65)),
        ({"method": {"alpha": 0}}, "alpha"),
        ({"method": {"scaling_by": "root"}}, r"method\.scaling_by"),
        ({"method": {"random_factor": "c"}}, r"method\.start"),
        ({"method": {"lr_b_ratio": -1}}, r"method\.lr_b_ratio"),
        ({"method": {"layers": "head"}}, "unknown layer set 'head'. Allowed: attention, mlp"),
        ({"method": {"layers": 3}}, "method.layers=3: expected text"),
        ({"method": {"rank": True}}, "method.rank=True: expected a whole number"),
        ({"method": FullFT(scope="some")}, "matrices"),
        ({"method": FullFT(layers="mlp")}, "scope"),
        ({"method": {"layers": "mlp"}, "model": {"mlp": ["w"]}}, "Experts .* give .* n_experts"),
        ({"model": {"mlp": ["w"], "n_experts": 4, "n_active_experts": 2}}, "mlp=.*'gate_proj'"),
        *(
            ({"model": {"n_experts": n, "n_active_experts": active}}, "1 to n_experts")
            for n, active in ((8, 0), (0, 2), (4, 8))
        ),
        ({"model": {"n_kv_heads": 3}}, "n_heads"),
        ({"model": {"shapes": {"q": "3"}}}, "shapes"),
        ({"model": {"recipe": None}}, "recipe"),
        ({"model": {"source": "hub", "recipe": None}}, "location"),
        ({"dataset": {"held_out_by": "row"}}, "held_out_by='row': .* source=synthetic"),
        ({"dataset": {"exact_loss": True, "location": "skills"}}, "exact_loss"),
        ({"dataset": {"render": "role_colon"}}, "render"),
        *(({"dataset": {"source": "csv", k: 9}}, f"{k}=9") for k in ("holdout", "n_retain")),
        ({"dataset": {"source": "csv", "test_revision": "x"}}, "test_revision='x'"),
        ({"dataset": {"source": "csv", "revision": "sha256:12"}}, "SPLIT=DIGITS"),
        ({"dataset": {"source": "csv", "template": "{question}"}}, "template='{question}'"),
    ],
)
def test_bad_values_are_refused_with_what_is_allowed(change, word):
    spec = tiny_spec(method=LoRA(rank=1))
    with pytest.raises(SpecError, match=word):
        parts = {
            k: dataclasses.replace(getattr(spec, k), **v) if isinstance(v, dict) else v
            for k, v in change.items()
        }
        validate(dataclasses.replace(spec, **parts))


def test_axes_are_looked_up_in_method_then_spec():
    spec = with_axes(tiny_spec(method=LoRA()), {"rank": 2, "lr": 1e-3, "batch_size": 4})
    assert (spec.method.rank, spec.lr, spec.batch_size) == (2, 1e-3, 4)
    with pytest.raises(SpecError, match=r"'rnak'.*Did you mean 'rank'"):
        with_axes(tiny_spec(method=LoRA()), {"rnak": 2})
    of_spec = {f.name for f in dataclasses.fields(RunSpec)}
    for cls in METHODS.values():
        assert not {f.name for f in dataclasses.fields(cls)} & of_spec


MODELS = {
    "llama-3.2-1b": (1_235_814_400, (491_520, 212_992, 130_304)),
    "llama-3.2-3b": (3_212_749_824, (946_176, 573_440, 131_328)),
    "llama-3.1-8b": (8_030_261_248, (1_769_472, 851_968, 132_352)),
    "llama-3.1-8b-instruct": (8_030_261_248, ()),
    "llama-3.1-70b": (70_553_706_496, (8_847_360, 4_096_000, 136_448)),
    "llama-3.3-70b-instruct": (70_553_706_496, ()),
    "qwen3-4b-instruct-2507": (4_022_468_096, (1_327_104, 737_280, 154_496)),
    "qwen3-8b": (8_190_735_360, (1_769_472, 958_464, 156_032)),
    "qwen3-8b-base": (8_190_735_360, ()),
    "qwen3-32b": (32_762_123_264, ()),
    "qwen3-30b-a3b": (30_532_122_624, (6_488_064, 835_584, 153_984)),
    **{f"qwen3-30b-a3b-{kind}": (30_532_122_624, ()) for kind in ("base", "instruct-2507")},
    "qwen3-235b-a22b-instruct-2507": (235_093_634_560, ()),
}
"""The fourteen models of the study's fit of learning rates, with the sizes that the hub shows, and the
trained parameters a unit of rank for mlp, attention and unembedding: the table of the study's team,
but for the experts, which it counts with shared factors. Theirs is its text: adapters of rank / 8."""


def model_of(name):
    return compose_request([f"model={name}", "dataset=gsm8k_hub"]).points[0].spec.model


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_its_published_size_is_pinned_and_lora_trains_the_published_number(name):
    model, rank, (count, per_rank) = model_of(name), 8, MODELS[name]
    assert model.n_params == count
    assert model.location.split("/")[1].lower() == model.name == name
    assert not is_unpinned(model) and model.problem is None
    if per_rank:
        sets = ("mlp", "attention", "unembedding")
        assert [LoRA(rank=rank, layers=s).n_trainable(model) / rank for s in sets] == [*per_rank]
        assert LoRA(rank=rank).n_trainable(model) == rank * sum(per_rank)


def test_tokens_pass_through_the_active_experts_only():
    """The 30B model is published as one with 3.3B active parameters, embedding included."""
    model = model_of("qwen3-30b-a3b")
    assert model.n_active_params + model.n_params - model.n_matmul_params == 3_353_032_704
    assert FullFT().step_flops(model, 1) == 6 * model.n_active_params
    adapters = (LoRA(rank=8).step_flops(model, 1) - 4 * model.n_active_params) / 6
    of_experts = 48 * 8 * 3 * (2048 + 768)  # 8 experts of rank 1 in each of 48 layers
    assert adapters == of_experts + 8 * (835_584 + 153_984)
    dense = tiny_spec().model
    assert dense.n_active_params == dense.n_matmul_params
    assert "n_experts" not in dense.canonical and "n_active_experts" not in dense.canonical


@dataclass(frozen=True)
class Settings:
    name: Annotated[str, Is("any name")]
    rank: Annotated[int, Is("columns", 1, 64)] = 4
    beta: Annotated[float | None, Is("", ABOVE_0, BELOW_1)] = None
    kind: Literal["", "lora", "full"] = ""
    flags: list[int] = field(default_factory=list)
    by_name: dict[str, float] = field(default_factory=dict, metadata={"key": "named"})
    other: Any = None


def test_values_are_converted_in_place_and_all_problems_are_yielded():
    values = {"name": "a", "rank": 8.0, "beta": None, "flags": (1.0,), "named": {1: 2}, "other": {}}
    assert list(problems_of(Settings, values)) == []
    assert repr(values["rank"]) == "8" and values["flags"] == [1] and values["named"] == {"1": 2.0}
    assert list(misfits(Settings("a"))) == []
    # all problems are yielded
    assert len(list(problems_of(Settings, {"rank": 0, "beta": "x", "odd": 1}))) == 4
    assert len(list(misfits(Settings("a", rank=0, kind="fll")))) == 2


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "name: missing. Expected text (any name)."),
        ({"rnak": 1}, "column 'rnak' not found. Did you mean 'rank'?"),
        ({"rank": 65}, "rank=65: expected a whole number of at least 1 and at most 64 (columns)."),
        ({"rank": None}, "rank=None: expected"),
        ({"beta": 0}, "beta=0.0: expected a number above 0 and below 1, or null."),
        ({"beta": float("nan")}, "beta=nan"),
        ({"kind": "fll"}, "kind='fll'. Allowed: lora, full, or leave it out."),
        ({"flags": ["x"]}, "flags=['x']: expected list[int]"),
        ({"named": {"a": "x"}}, "named={'a': 'x'}"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_expected(values, said):
    given = {"name": "a"} if values else {}
    (problem,) = problems_of(Settings, given | values, "column ")
    assert said in problem


def test_equal_dicts_of_a_spec_have_equal_hashes_also_with_lists():
    assert hash(FrozenDict({"a": 0, "b": [1]})) == hash(FrozenDict({"b": [1.0], "a": 0.0}))

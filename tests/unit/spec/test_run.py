"""Identity: golden ids, canonical form, snapping, published parameter counts, checks."""

import copy
import dataclasses
import json
import pickle
from dataclasses import dataclass, field
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasweep.errors import SpecError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.methods.registry import METHODS, spec_from
from lorasweep.spec.method import canonical_layers
from lorasweep.spec.run import RunSpec, snap_lr, validate, with_axes
from lorasweep.sweep.grid import geom
from lorasweep.sweep.names import run_names
from tests.world import ROOT, compose_request, tiny_spec

GOLDEN = ROOT / "tests" / "golden" / "run_ids.json"


@cache
def golden_specs():
    base = tiny_spec()
    return {
        "fullft": dataclasses.replace(base, method=FullFT(), lr=2e-3),
        "lora": dataclasses.replace(base, method=LoRA(rank=4), lr=5e-3),
        "lora_attention": dataclasses.replace(
            base, method=LoRA(rank=1, alpha=8, layers="attention"), seed=3
        ),
        "bf16_clip": dataclasses.replace(
            base, method=LoRA(), precision="bf16", clip_norm=1.0, warmup_steps=2
        ),
        "small": compose_request(["scale=small", "+sweep=lr_ratio"]).points[0].spec,
    }


def test_golden_ids():
    """A changed id means that finished runs stop counting as done."""
    assert {k: s.id for k, s in golden_specs().items()} == json.loads(GOLDEN.read_text())


def test_kept_results_have_the_ids_of_their_specs():
    """The tables in analysis/results were made by runs that today's code would name the same."""
    pd = pytest.importorskip("pandas")
    tables = list((ROOT / "analysis" / "results").glob("*/table.parquet"))
    assert tables
    for path in tables:
        table = pd.read_parquet(path)
        for rid, text in zip(table["run_id"], table["spec"]):
            assert spec_from(json.loads(text)).id == rid, path


def test_key_order_and_types_of_numbers_keep_the_id_and_other_values_do_not():
    spec = golden_specs()["lora"]
    plain = spec.plain()
    turned = dict(reversed(plain.items()))
    assert spec_from(turned).id == spec_from(plain).id == spec.id
    assert tiny_spec(method=LoRA(alpha=32)).id == tiny_spec(method=LoRA(alpha=32.0)).id
    assert tiny_spec(method=LoRA(alpha=33)).id != tiny_spec(method=LoRA(alpha=32)).id
    assert tiny_spec(seed=1.0).id == tiny_spec(seed=1).id
    assert canonical_layers("mlp+attention") == canonical_layers("attention+mlp")
    layers = LoRA(layers="unembedding+mlp+attention")
    assert tiny_spec(method=layers).id == tiny_spec(method=LoRA(layers="all")).id


def test_an_added_field_at_its_past_value_leaves_the_id_alone(monkeypatch):
    @dataclass(frozen=True)
    class Later(LoRA):
        init: str = field(default="uniform", metadata={"added": "uniform"})

    plain = LoRA(rank=4)
    assert tiny_spec(method=Later(rank=4)).id == tiny_spec(method=plain).id
    assert tiny_spec(method=Later(rank=4, init="normal")).id != tiny_spec(method=plain).id


@given(st.floats(1e-8, 10), st.floats(0.999999, 1.000001))
def test_rates_meet_after_snapping(lr, wobble):
    assert snap_lr(snap_lr(lr)) == snap_lr(lr)
    assert abs(snap_lr(lr) / lr - 1) < 0.0051
    assert set(geom(1e-4, 1e-2, 4)) <= set(geom(1e-4, 1e-2, 8))  # a grid and its refinement


def test_what_is_shown_is_what_is_trained():
    """A rate between grid points was shown as typed and trained as snapped."""
    request = compose_request(["+sweep=lr_ratio", "scale=smoke", "sweep.arms.lora.lr=[1.2345e-3]"])
    lora = [p for p in request.points if p.arm == "lora"]
    assert {p.spec.lr for p in lora} == {1.23e-3}
    assert all("lr=0.00123" in name.split() for name in run_names(lora).values())
    (single,) = compose_request(["scale=smoke", "lr=1.2345e-3"]).points
    assert single.spec.lr == tiny_spec(lr=1.2345e-3).lr == single.spec.plain()["lr"] == 1.23e-3
    assert tiny_spec(method=LoRA(layers="mlp+attention")).method.layers == "attention+mlp"


def test_a_spec_cannot_be_changed_and_a_changed_copy_has_another_id():
    """A revision that was set after hashing left the id as it was."""
    spec = tiny_spec(method=LoRA(rank=4))
    before = spec.id
    for part, name in ((spec, "lr"), (spec.model, "revision"), (spec.method, "rank")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, 1)
    with pytest.raises(TypeError, match=r"dataclasses\.replace"):
        spec.dataset.generator_params["rule_shift"] = 0.9
    with pytest.raises(AttributeError):
        spec.model.attention.append("qkv")
    with pytest.raises(AttributeError):
        spec.model.matrices(("mlp",)).clear()  # kept: it would change all counts from here on
    assert spec.id == before
    model = dataclasses.replace(spec.model, revision="other")
    dataset = dataclasses.replace(spec.dataset, generator_params={"rule_shift": 0.9})
    others = [dataclasses.replace(spec, model=model), dataclasses.replace(spec, dataset=dataset)]
    assert len({before, *(s.id for s in others)}) == 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_are_equal_and_as_frozen(copied):
    spec = tiny_spec()
    again = copied(spec)
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
    assert point.spec.dataset.generator_params["rule_shift"] == 0.25


@pytest.mark.parametrize(
    ("change", "word"),
    [
        *(({"lr": lr}, "lr") for lr in (0.0, -1e-3, 1e6, float("nan"), float("inf"))),
        *(({name: 0}, name) for name in ("steps", "batch_size")),
        ({"seed": -1}, "seed"),
        ({"precision": "fp8"}, "fp32"),
        ({"schedule": "wsd"}, "constant"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"method": LoRA(rank=0)}, "rank"),
        ({"method": LoRA(rank=65)}, "rank"),
        ({"method": LoRA(alpha=0)}, "alpha"),
        ({"method": FullFT(scope="some")}, "matrices"),
        ({"steps": 1.5}, r"steps: expected an int, got 1\.5"),
        ({"method": FullFT(layers="mlp")}, "scope"),
        ({"train_version": 99}, "train_version"),
    ],
)
def test_bad_values_are_refused_with_what_is_allowed(change, word):
    with pytest.raises(SpecError, match=word):
        validate(tiny_spec(**change))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LoRA(layers="head"), "unknown layer set 'head'. Allowed: attention, mlp"),
        (lambda: LoRA(layers=3), "method.layers: expected text, got 3"),
        (lambda: LoRA(rank="x"), "method.rank: expected an int, got 'x'"),
        (lambda: LoRA(rank=True), "method.rank: expected an int, got True"),
        (lambda: tiny_spec(model="tiny64"), "model: expected ModelSpec, got 'tiny64'"),
    ],
)
def test_values_of_another_type_are_refused_at_construction(make, words):
    with pytest.raises(SpecError, match=words):
        make()


def test_matrices_that_are_not_known_are_refused():
    spec = tiny_spec()
    model = dataclasses.replace(spec.model, mlp=["experts"])
    with pytest.raises(SpecError, match=r"Experts have these names too: give .* n_experts"):
        validate(dataclasses.replace(spec, model=model, method=LoRA(layers="mlp", rank=1)))
    assert "experts have ['gate_proj'" in str(
        dataclasses.replace(model, n_experts=4, n_active_experts=2).problem
    )


def test_axes_are_looked_up_in_method_then_spec():
    spec = with_axes(tiny_spec(method=LoRA()), {"rank": 2, "lr": 1e-3, "batch_size": 4})
    assert (spec.method.rank, spec.lr, spec.batch_size) == (2, 1e-3, 4)
    with pytest.raises(SpecError, match=r"'rnak'.*Did you mean 'rank'"):
        with_axes(tiny_spec(method=LoRA()), {"rnak": 2})


def test_no_method_field_has_the_name_of_a_spec_field():
    of_spec = {f.name for f in dataclasses.fields(RunSpec)}
    for cls in METHODS.values():
        assert not {f.name for f in dataclasses.fields(cls)} & of_spec

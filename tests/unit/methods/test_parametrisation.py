"""What the study's other questions need of the trainer: LoRA's further fields, norms, shares,
retention, facts, mapping axes."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from lorasweep.data import load as data
from lorasweep.errors import DataError, SpecError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.methods.stacked.spectral import spectral_norm
from lorasweep.models import load as models
from lorasweep.spec.run import validate
from lorasweep.sweep.grid import assignments, fields_of
from lorasweep.train.finetune import finetune
from tests.world import compose_request, tiny_spec


@pytest.fixture(scope="module")
def world():
    spec = tiny_spec(precision="fp64", method=LoRA(rank=4), lr=2e-3, steps=8, eps=1e-30)
    return spec, models.load(spec.model, ["/nonexistent"], "fp64")


def run(pack, base):
    """Train a pack; returns {run id: final measures}."""
    rows = data.load(pack[0].dataset, [], None)
    found = {}
    for event in finetune(pack, base, rows):
        found |= {i: final for i, (_, final) in event.ended.items()}
    return [found[s.id] for s in pack]


def nlls(final):
    return np.array([p["test_nll"] for p in final["curve"]])


@pytest.mark.parametrize(("p", "q"), [(2.0, 1.0), (1.0, 2.0), (4.0, 0.5), (0.25, 2.0)])
def test_twins_are_one_run_in_float64(world, p, q):
    spec, base = world
    twin = dataclasses.replace(
        spec, lr=2e-3 * p, method=LoRA(rank=4, alpha=32 / (p * q), init_scale=p, lr_b_ratio=q / p)
    )
    a, b = run([spec], base)[0], run([twin], base)[0]
    assert np.abs(nlls(a) - nlls(b)).max() <= 1e-9
    in_pack = run([spec, twin], base)  # the further fields may differ inside a pack
    assert np.abs(nlls(in_pack[0]) - nlls(in_pack[1])).max() <= 1e-9


def test_eps_decay_and_clipping_break_twins_unless_eps_follows(world):
    spec, base = world
    alike, apart = (
        LoRA(rank=4, alpha=8, init_scale=2),
        LoRA(rank=4, alpha=16, init_scale=2, lr_b_ratio=0.5),
    )
    for change, kept, method in (
        ({"eps": 1e-5}, {"eps": 5e-6}, alike),
        ({"weight_decay": 0.1}, None, alike),
        ({"clip_norm": 0.1}, None, apart),
    ):
        one = dataclasses.replace(spec, **change)
        twin = dataclasses.replace(one, lr=4e-3, method=method)
        a, b = run([one], base)[0], run([twin], base)[0]
        assert np.abs(nlls(a) - nlls(b)).max() > 1e-7, change
        if kept:
            c = run([dataclasses.replace(twin, **kept)], base)[0]
            assert np.abs(nlls(a) - nlls(c)).max() <= 1e-9


def test_rules_of_scaling_and_the_other_start(world):
    spec, base = world
    assert [
        LoRA(rank=4, alpha=32, scaling_by=s).scaling for s in ("rank", "sqrt_rank", "none")
    ] == [8, 16, 32]
    b = dataclasses.replace(spec, method=LoRA(rank=4, random_factor="b"))
    told = run([b], base)[0]
    assert told["norm_a"] > 0 and told["norm_b"] > 0 and nlls(told)[-1] < told["nll_start"]
    drawn = [
        run([dataclasses.replace(spec, method=LoRA(rank=4, init_seed=k))], base)[0]["test_nll"]
        for k in (0, 1)
    ]
    assert drawn[0] != drawn[1]
    for key, bad in (
        ("scaling_by", {"scaling_by": "root"}),
        ("start", {"random_factor": "c"}),
        ("init_scale", {"init_scale": 0}),
        ("lr_b_ratio", {"lr_b_ratio": -1}),
        ("init_seed", {"init_seed": -1}),
    ):
        with pytest.raises(SpecError, match=rf"method\.{key}"):
            validate(dataclasses.replace(spec, method=LoRA(rank=4, **bad)))


def test_further_fields_leave_old_names_alone():
    spec = tiny_spec(method=LoRA(rank=4))
    assert "init_scale" not in spec.canonical and "n_retain" not in tiny_spec().canonical
    assert spec.id != tiny_spec(method=LoRA(rank=4, init_scale=2.0)).id


def test_norms_and_shares_of_the_gradient(world):
    spec, base = world
    lora, full = run([spec], base)[0], run([dataclasses.replace(spec, method=FullFT())], base)[0]
    for told, rest in ((lora, False), (full, True)):
        share = told["curve"][0]["grad_share"]
        assert sum(share.values()) == pytest.approx(1) and ("rest" in share) == rest
        assert set(share) >= {"attention", "mlp", "unembedding"}
    norms = lora["spectra"]["lm_head"]
    assert set(norms) == {"a", "b", "delta"} and 0 < norms["delta"] <= 8 * norms["a"] * norms[
        "b"
    ] * (1 + 1e-9)
    assert set(full["spectra"]["lm_head"]) == {"delta"}
    matrix = torch.randn(40, 30, generator=torch.Generator().manual_seed(1)).double()
    assert spectral_norm(matrix) == pytest.approx(float(torch.linalg.svdvals(matrix)[0]), rel=1e-2)
    assert spectral_norm(torch.zeros(3, 2)) == 0


def test_retention_is_measured_on_the_pretraining_task(world):
    spec, base = world
    more = dataclasses.replace(spec.dataset, n_retain=16)
    told = run([dataclasses.replace(spec, dataset=more)], base)[0]
    assert (
        told["retain_start"] < told["nll_start"]
    )  # the base knows its own language better than the dialect
    assert told["retain_nll"] > told["retain_start"]
    assert "retain_nll" not in run([spec], base)[0]
    with pytest.raises(SpecError, match="n_retain"):
        validate(dataclasses.replace(spec, dataset=dataclasses.replace(more, source="jsonl")))


# ---------------------------------------------------------------- facts


def facts(**changes):
    spec = compose_request(["model=tiny64-facts", "dataset=facts"]).points[0].spec.dataset
    return dataclasses.replace(spec, **changes)


def test_facts_are_shown_equally_often_and_hold_16_bits():
    spec = facts(generator_params={"facts": 24}, n_retain=2)
    loaded = data.load(spec, [])
    rows = loaded.train(0, 0, 12)  # 96 facts: four epochs of 24
    seen = [tuple(row.tokens[k : k + 8]) for row in rows for k in range(0, 64, 8)]
    counts = {f: seen.count(f) for f in seen}
    assert len(counts) == 24 and set(counts.values()) == {4}
    assert len({f[1:4] for f in counts}) == 24  # keys are unique
    assert all(sum(r.loss) == 32 and r.loss[4] and not r.loss[3] for r in rows)
    assert {tuple(e.tokens[k : k + 8]) for e in loaded.test for k in range(0, 64, 8)} == set(counts)
    unseen = {tuple(e.tokens[k + 1 : k + 4]) for e in loaded.retain for k in range(0, 64, 8)}
    assert not unseen & {f[1:4] for f in counts}
    again = loaded.train(0, 6, 6)
    assert all((a.tokens == b.tokens).all() for a, b in zip(rows[6:], again))
    values = np.array(
        [
            f[4:]
            for f in data.load(facts(generator_params={"facts": 8000}), [])
            .train(0, 0, 1000)[0]
            .tokens.reshape(8, 8)
        ]
    )
    assert values.max() < 16


def test_fresh_rows_never_come_again_and_the_others_are_as_without_them():
    known = data.load(facts(generator_params={"facts": 24}), []).train(0, 0, 200)
    mixed = data.load(facts(generator_params={"facts": 24, "fresh": 0.25}), [])
    rows = mixed.train(0, 0, 200)
    same = [(a.tokens == b.tokens).all() for a, b in zip(known, rows)]
    assert 0.15 < 1 - np.mean(same) < 0.35
    fresh = [
        tuple(r.tokens[k + 1 : k + 8]) for r, s in zip(rows, same) if not s for k in range(0, 64, 8)
    ]
    assert len(set(fresh)) == len(fresh)
    assert all((a.tokens == b.tokens).all() for a, b in zip(rows[70:90], mixed.train(0, 70, 20)))


def test_an_untrained_values_entropy_is_16_bits():
    spec = facts(generator_params={"facts": 8192}, n_test=1024)
    values = np.concatenate([e.tokens[e.loss] for e in data.load(spec, []).test])
    share = np.bincount(values, minlength=16) / len(values)
    assert -(share * np.log(share)).sum() == pytest.approx(math.log(16), abs=2e-3)


@pytest.mark.parametrize(
    "bad",
    [
        {"generator_params": {"facts": 12}},
        {"generator_params": {"fact": 8}},
        {"generator_params": {"facts": 30000}},
        {"generator_params": {"fresh": 2}},
        {"max_length": 60},
    ],
)
def test_bad_facts_are_refused(bad):
    with pytest.raises(DataError, match="dataset 'facts'"):
        data.check_available(facts(**bad), [])


def test_few_rows_come_again_in_a_new_order():
    spec = dataclasses.replace(
        compose_request(["dataset=dialect"]).points[0].spec.dataset, n_train=8, n_test=16
    )
    loaded = data.load(spec, [])
    first, second = loaded.train(0, 0, 8), loaded.train(0, 8, 8)
    assert {e.tokens.tobytes() for e in first} == {e.tokens.tobytes() for e in second}
    assert [e.tokens.tobytes() for e in first] != [e.tokens.tobytes() for e in second]
    assert {e.tokens.tobytes() for e in loaded.train(5, 0, 8)} == {
        e.tokens.tobytes() for e in first
    }


# ---------------------------------------------------------------- axes of mappings


def test_axes_of_mappings_set_several_fields_and_are_products_themselves():
    axes = {
        "seed": [0, 1],
        "cell": [
            {"batch_size": 4, "lr": [1, 2]},
            {"batch_size": 16, "lr": 3, "knobs": {"facts": 8}},
        ],
    }
    found = assignments(axes)
    assert len(found) == 6 and {"seed": 1, "batch_size": 4, "lr": 2} in found
    assert {"seed": 0, "batch_size": 16, "lr": 3, "knobs": {"facts": 8}} in found
    assert fields_of(axes) == {"seed", "batch_size", "lr", "knobs"}


def test_knobs_on_an_axis_name_the_data_set():
    points = compose_request(["+sweep=capacity", "scale=smoke"]).points
    assert {p.spec.dataset.name for p in points} == {"facts(facts=64)"}
    assert {p.spec.dataset.generator_params["facts"] for p in points} == {64}


def test_a_field_inside_a_mapping_is_not_overwritten_in_silence():
    with pytest.raises(SpecError, match="batch_size"):
        compose_request(["+sweep=batch_size", "scale=smoke", "batch_size=8"])


@pytest.mark.parametrize(
    "scale", ["smoke", "tiny"]
)  # the others are composed part by part in test_compose
def test_the_study_is_defined_at_every_scale(scale):
    request = compose_request(["+sweep=study", f"scale={scale}"])
    assert [p.sweep_name for p in request.parts] == request.sweep.parts and all(
        p.points for p in request.parts
    )
    known = {p.id for p in next(r for r in request.parts if r.sweep_name == "rank").points}
    for name in ("short_runs", "compute"):  # their runs are those of `rank`, where scales say so
        points = next(r for r in request.parts if r.sweep_name == name).points
        mine = {
            p.id for p in points if not p.arm.endswith("_between")
        }  # rates that `short_runs` alone asks about
        assert len(mine & known) >= len(mine) / 2

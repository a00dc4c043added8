"""LoRA's further fields, and what is measured of the weights: norms, shares of the gradient, retention."""

import dataclasses

import numpy as np
import pytest

from lorasweep.data import load as data
from lorasweep.errors import SpecError
from lorasweep.launch.trainer import finetune
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.spec.run import validate
from tests.world import tiny_spec


@pytest.fixture(scope="module")
def world():
    spec = tiny_spec(precision="fp64", method=LoRA(rank=4), lr=2e-3, steps=4, eps=1e-30)
    spec = dataclasses.replace(
        spec, dataset=dataclasses.replace(spec.dataset, n_test=8, n_test_curve=8)
    )
    return spec, models.load(spec.model, ["/nonexistent"], "fp64")


def run(pack, base):
    """Train a pack; returns the final measures of each run."""
    found = {}
    for event in finetune(pack, base, data.load(pack[0].dataset, [])):
        found |= {i: final for i, (_, final) in event.ended.items()}
    return [found[s.id] for s in pack]


def nlls(final):
    return np.array([p["test_nll"] for p in final["curve"]])


def test_twins_are_one_run_in_float64(world):
    """Also inside a pack, whose members may differ in the further fields."""
    spec, base = world
    pairs = ((2.0, 1.0), (1.0, 2.0), (4.0, 0.5), (0.25, 2.0))
    twins = [
        dataclasses.replace(
            spec,
            lr=2e-3 * p,
            method=LoRA(rank=4, alpha=32 / (p * q), init_scale=p, lr_b_ratio=q / p),
        )
        for p, q in pairs
    ]
    alone = [run([member], base)[0] for member in (spec, *twins)]
    for other in (*alone[1:], *run([spec, *twins], base)):
        assert np.abs(nlls(alone[0]) - nlls(other)).max() <= 1e-9


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
    b = LoRA(rank=4, random_factor="b")
    learns = dataclasses.replace(spec, method=b, steps=8, dataset=tiny_spec().dataset)
    final = run([learns], base)[0]
    assert final["norm_a"] > 0 and final["norm_b"] > 0
    assert nlls(final)[-1] < final["nll_start"]
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
    for final, rest in ((lora, False), (full, True)):
        share = final["curve"][0]["grad_share"]
        assert sum(share.values()) == pytest.approx(1) and ("rest" in share) == rest
        assert set(share) >= {"attention", "mlp", "unembedding"}
    norms = lora["spectra"]["lm_head"]
    assert set(norms) == {"a", "b", "delta"} and 0 < norms["delta"] <= 8 * norms["a"] * norms[
        "b"
    ] * (1 + 1e-9)
    assert set(full["spectra"]["lm_head"]) == {"delta"}


def test_retention_is_measured_on_the_pretraining_task(world):
    spec, base = world
    more = dataclasses.replace(spec.dataset, n_retain=16)
    final = run([dataclasses.replace(spec, dataset=more)], base)[0]
    # the base knows its own language better than the dialect
    assert final["retain_start"] < final["nll_start"]
    assert final["retain_nll"] > final["retain_start"]
    assert "retain_nll" not in run([spec], base)[0]
    with pytest.raises(SpecError, match="n_retain"):
        validate(dataclasses.replace(spec, dataset=dataclasses.replace(more, source="jsonl")))

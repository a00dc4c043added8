"""The shipped sweep files: their runs at every scale, and the questions that kept answers asked."""

import dataclasses
import hashlib
import json

import pytest
import yaml

from lorasweep.config.compose import composer
from lorasweep.errors import NotAtScale, SpecError
from lorasweep.sweep.grid import assignments, fields_of
from lorasweep.sweep.request import question
from tests.world import ROOT, compose_request

SCALES = sorted(p.stem for p in (ROOT / "conf" / "scale").glob("*.yaml"))
SWEEPS = sorted(p.stem for p in (ROOT / "sweeps").glob("*.yaml") if p.stem != "study")
GOLDEN = json.loads((ROOT / "tests/golden/sweep_ids.json").read_text())
KEPT = ROOT / "analysis" / "results"
EXPLORATORY = ("layers-small", "lr_ratio-small")
"""Kept answers from before the claims of today were stated."""


@pytest.mark.parametrize("scale", SCALES)
def test_every_sweep_has_the_recorded_runs_and_questions(scale):
    """A changed id means that finished runs stop counting as done."""
    found, points = {}, {}
    with composer() as compose:
        for sweep in SWEEPS:
            try:
                request = compose([f"+sweep={sweep}", f"scale={scale}"])
            except NotAtScale as error:
                assert "Its file has: smoke" in str(error)
                continue
            points[sweep] = request.points
            runs = sorted((p.arm, p.id) for p in request.points)
            assert len({p.id for p in request.points}) == len(runs)
            found[f"{sweep}-{scale}"] = {
                "runs": len(runs),
                "sha256": hashlib.sha256(json.dumps(runs).encode()).hexdigest()[:16],
                "replicate": dataclasses.asdict(request.sweep.replicate),
            }
            compare_with_kept(question(request), KEPT / f"{sweep}-{scale}" / "question.json")
        if scale == "smoke":
            known = {p.id for p in points["rank"]}
            for sweep in ("short_runs", "compute"):
                mine = {p.id for p in points[sweep] if not p.arm.endswith("_more")}
                assert len(mine & known) >= len(mine) / 2
        if scale.startswith("tiny"):
            compare_shared(points, compose(["+sweep=regime", "scale=tiny"]).points)
    assert found == {k: v for k, v in GOLDEN.items() if k.rpartition("-")[2] == scale}


def compare_shared(points, regime):
    """A run is known by its spec alone, so what `regime` has trained is not trained again."""
    known = {p.id for p in regime}
    for sweep, arms in (("rank", "fullft lora common"), ("short_runs", "fullft lora fullft_more")):
        mine = {p.id for p in points[sweep] if p.arm in arms.split() and p.spec.seed == 100}
        assert mine <= known and len(mine) >= 10


def compare_with_kept(today, path):
    """Claims, margins, rounds and added runs are those of the kept answer, if there is one.

    Keys that were added to claims later are not compared.
    """
    if not path.exists() or path.parent.name in EXPLORATORY:
        return
    kept = json.loads(path.read_text())
    assert kept["claims"].keys() == today["claims"].keys()
    for name, claim in kept["claims"].items():
        now = today["claims"][name]
        later = {"sd", "underpowered"} - claim.keys()
        assert claim == {k: now[k] for k in claim if k not in later}, name
    for key in ("question", "source", "how", "rounds", "analysis"):
        assert kept[key] == today[key], key
    assert kept.get("withdrawn", "") == today["withdrawn"]
    assert kept.get("added_after", []) == today["added_after"]


def test_axes_of_mappings_set_several_fields_and_are_products_themselves():
    several = {"batch_size": 16, "lr": 3, "generator_params": {"facts": 8}}
    axes = {"seed": [0, 1], "cell": [{"batch_size": 4, "lr": [1, 2]}, several]}
    found = assignments(axes)
    assert len(found) == 6 and {"seed": 1, "batch_size": 4, "lr": 2} in found
    assert {"seed": 0, **several} in found
    assert fields_of(axes) == {"seed", "batch_size", "lr", "generator_params"}
    with pytest.raises(SpecError, match="batch_size"):  # set inside such a mapping
        compose_request(["+sweep=batch_size", "scale=smoke", "batch_size=8"])
    points = compose_request(["+sweep=capacity", "scale=smoke"]).points
    assert {p.spec.dataset.name for p in points} == {"facts(facts=64)"}
    assert {p.spec.dataset.generator_params["facts"] for p in points} == {64}


def test_the_study_consists_of_all_sweeps():
    parts = yaml.safe_load((ROOT / "sweeps" / "study.yaml").read_text())["parts"]
    assert sorted(parts) == SWEEPS

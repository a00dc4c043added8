"""The shipped sweep files: their runs at every scale, and the questions that kept answers asked."""

import dataclasses
import hashlib
import json
import re

import pytest
import yaml

from lorasweep.errors import NotAtScale
from lorasweep.sweep.request import question
from tests.world import ROOT, cli, compose_request

SCALES = sorted(p.stem for p in (ROOT / "conf" / "scale").glob("*.yaml"))
SWEEPS = sorted(p.stem for p in (ROOT / "sweeps").glob("*.yaml") if p.stem != "study")
GOLDEN = json.loads((ROOT / "tests/golden/sweep_ids.json").read_text())
KEPT = ROOT / "analysis" / "results"
EXPLORATORY = ("layers-small", "lr_ratio-small")
"""Kept answers from before the claims of today were stated."""


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_sweep_has_the_recorded_runs_and_questions_at_every_scale(sweep):
    """A changed id means that finished runs stop counting as done."""
    found = {}
    for scale in SCALES:
        try:
            request = compose_request([f"+sweep={sweep}", f"scale={scale}"])
        except NotAtScale as error:
            assert "Its file has: smoke" in str(error)
            continue
        runs = sorted((p.arm, p.id) for p in request.points)
        assert len({p.id for p in request.points}) == len(runs)
        found[f"{sweep}-{scale}"] = {
            "runs": len(runs),
            "sha256": hashlib.sha256(json.dumps(runs).encode()).hexdigest()[:16],
            "replicate": dataclasses.asdict(request.sweep.replicate),
        }
        compare_with_kept(question(request), KEPT / f"{sweep}-{scale}" / "question.json")
    assert found == {k: v for k, v in GOLDEN.items() if k.rpartition("-")[0] == sweep}


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


def test_the_command_names_the_scales_of_a_sweep(tmp_path):
    done = cli("+sweep=large_batches", "scale=paper", "action=plan", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "Its file has: smoke, tiny" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_shipped_sweep_says_that_runs_were_added_and_judges_as_if_they_were_planned():
    """In words, beside `rounds: 1`."""
    words = re.compile(r"added\b.*\b(after|when)\b.*\b(look|seen|decided)", re.IGNORECASE)
    assert words.search("# 1e-3 was added after a look")
    for path in (ROOT / "sweeps").glob("*.yaml"):
        text = path.read_text()
        if words.search(text):
            assert int(yaml.safe_load(text).get("rounds", 1)) >= 2, path.name


def test_the_study_consists_of_sweeps_that_share_runs():
    request = compose_request(["+sweep=study", "scale=smoke"])
    assert request.title == "study-smoke"
    parts = {part.sweep_name: part.points for part in request.parts}
    assert list(parts) == request.sweep.parts and all(parts.values())
    known = {p.id for p in parts["rank"]}
    for name in ("short_runs", "compute"):
        mine = {p.id for p in parts[name] if not p.arm.endswith("_more")}
        assert len(mine & known) >= len(mine) / 2


@pytest.mark.parametrize("scale", ["tiny", "tiny_beyond"])
def test_sweeps_share_the_runs_of_a_condition_of_regime(scale):
    """A run is known by its spec alone, so what `regime` has trained is not trained again."""
    known = {p.id for p in compose_request(["+sweep=regime", "scale=tiny"]).points}
    for sweep, arms in (("rank", "fullft lora common"), ("short_runs", "fullft lora fullft_more")):
        asked = compose_request([f"+sweep={sweep}", f"scale={scale}"]).points
        mine = {p.id for p in asked if p.arm in arms.split() and p.spec.seed == 100}
        assert mine <= known and len(mine) >= 10

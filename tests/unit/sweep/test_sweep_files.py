"""The shipped sweep files: runs at every scale, kept questions, what `action=layers` lists."""

import dataclasses
import hashlib
import json

import pytest
import yaml

from analysis.questions.registry import OLDER_NAMES
from lorasweep.cli.actions import act
from lorasweep.config.compose import composer, shipped_model
from lorasweep.errors import NotAtScale, SpecError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.sweep.grid import assignments, fields_of
from lorasweep.sweep.names import REST, trained_by_set
from lorasweep.sweep.request import question
from tests.world import ROOT, compose_request

SCALES = sorted(p.stem for p in (ROOT / "conf" / "scale").glob("*.yaml"))
SWEEPS = sorted(p.stem for p in (ROOT / "sweeps").glob("*.yaml") if p.stem != "study")
GOLDEN = json.loads((ROOT / "tests/golden/sweep_ids.json").read_text())
KEPT = ROOT / "analysis" / "results"


@pytest.mark.parametrize("scale", SCALES)
def test_every_sweep_has_the_recorded_runs_and_questions(scale):
    """So what one sweep shares with another, or has trained, is not trained again."""
    found = {}
    with composer() as compose:
        for sweep in SWEEPS:
            try:
                request = compose([f"+sweep={sweep}", f"scale={scale}"])
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
            compare_with_kept(question(request), KEPT / f"{sweep}-{scale}", scale)
    assert found == {k: v for k, v in GOLDEN.items() if k.rpartition("-")[2] == scale}
    parts = yaml.safe_load((ROOT / "sweeps" / "study.yaml").read_text())["parts"]
    assert sorted([*parts, "tune"]) == SWEEPS  # the study consists of all sweeps but the search


def compare_with_kept(today, folder, scale):
    """Claims, margins, rounds and added runs are those kept, but for keys that came later.

    A claim that is about no run of the kept answer may have changed or been added since. Two answers
    are from before the claims of today were stated.
    """
    path = folder / "question.json"
    if not path.exists() or folder.name in ("layers-small", "lr_ratio-small"):
        return
    kept = json.loads(path.read_text())
    verdicts = json.loads((folder / "results.json").read_text())["verdicts"]
    judged = {v["claim"] for v in verdicts if [g["code"] for g in v["gates"]] != ["NO_CELL"]}
    for name in today["claims"].keys() - kept["claims"].keys():
        assert scale not in today["claims"][name]["planning"], name
    for name in judged & kept["claims"].keys():
        later = {"planning": {}, "underpowered": False}
        assert {**kept["claims"][name], **later} == {**today["claims"][name], **later}, name
    assert today["analysis"] == OLDER_NAMES.get(kept["analysis"], kept["analysis"])
    wanted = {"withdrawn": kept.get("withdrawn", ""), "added_after": kept.get("added_after", [])}
    wanted |= {key: kept[key] for key in ("question", "source", "how", "rounds")}
    assert {key: today[key] for key in wanted} == wanted


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


METHODS = (LoRA(rank=8), LoRA(rank=8, layers="attention"), FullFT())
METHODS += (FullFT(scope="matrices", layers="attention+mlp"),)


@pytest.mark.parametrize("name", ["tiny64", "tiny64-experts", "llama-3.2-1b", "qwen3-30b-a3b-base"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{m.layers}")
def test_counts_add_up(name, method):
    model = shipped_model(name)
    found = {f["layer_set"]: f for f in trained_by_set(method, model)}
    assert sum(f["trained"] for f in found.values()) == method.n_trainable(model)
    assert sum(f["weights"] for f in found.values()) == model.n_params
    assert ("router" in found) == bool(model.n_experts)
    whole = method.target_layers() == ()
    for layer_set, f in found.items():
        expected = whole or layer_set in method.target_layers()
        nothing = layer_set == REST and not f["weights"]
        assert bool(f["trained"]) == (expected and not nothing)


def test_the_command_lists_every_kind_of_run_of_a_sweep(compose, capsys):
    asked = ("+sweep=experts", "scale=paper", "action=layers")
    assert act(compose(*asked)) == 0
    out = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any(x.startswith("lora on qwen3-30b-a3b-base (alpha=32.0, expert_alpha=32") for x in out)
    assert "router 48 2048x128 - 0 12,582,912" in out
    assert act(compose(*asked, "format=json")) == 0
    kinds = json.loads(capsys.readouterr().out)["kinds"]
    shared = next(k for k in kinds if k["method"].get("expert_outer") == "shared")
    mlp = next(f for f in shared["layer_sets"] if f["layer_set"] == "mlp")
    assert mlp["trained"] == 128 * 14_450_688 and mlp["ranks"] == [128]

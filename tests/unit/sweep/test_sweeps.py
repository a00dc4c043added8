"""What the command line means, what a sweep must state, what requests are called; the shipped sweep
files: runs at every scale, kept questions, what `action=layers` lists."""

import dataclasses
import hashlib
import json

import pytest
import yaml

from analysis.questions.registry import OLDER_NAMES
from lorasweep.cli.actions import act
from lorasweep.cli.answer import check_claims
from lorasweep.config.compose import composer, shipped_model
from lorasweep.errors import NotAtScale, SpecError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.store import looks
from lorasweep.sweep.grid import REST, assignments, fields_of, run_names, trained_by_set
from lorasweep.sweep.question import Claim, Planning, check_directions, made
from lorasweep.sweep.request import from_plain, question
from tests.world import ROOT, compose_request

ASKED = ("+sweep=lr_ratio", "scale=smoke")


def test_a_request_comes_back_from_its_file(compose, monkeypatch, tmp_path):
    asked = compose("+sweep=lr_ratio", "scale=tiny", "cluster=slurm", "cluster.gpus=2")
    again = from_plain(json.loads(json.dumps(asked.plain())))
    assert again.points == asked.points and again.title == "lr_ratio-tiny"
    assert (again.exec, again.cluster, again.sweep) == (asked.exec, asked.cluster, asked.sweep)
    monkeypatch.chdir(tmp_path)  # a folder that is typed wins over the environment
    monkeypatch.setenv("LORASWEEP_RUNS", "/elsewhere")
    for typed, folder in (((), "/elsewhere"), (("exec.runs_dir=runs",), f"{tmp_path}/runs")):
        assert compose_request([*ASKED, *typed]).exec.runs_dir == folder


def test_a_grid_is_changed_from_the_command_line_and_names_say_what_differs(compose):
    assert set(run_names(compose(*ASKED).points).values()) >= {"fullft lr=0.002", "lora lr=0.005"}
    lora = ("sweep.arms.lora.rank=[2,4]", "sweep.arms.lora.lr=[1e-3,1.0001e-3,5e-3]")  # 2, snapped
    points = compose(*ASKED, "~sweep.arms.fullft", *lora, "+sweep.axes.batch_size=[4,8]").points
    names = set(run_names(points).values())
    assert "r2 batch_size=4 lr=0.005" in {n.removeprefix("lora ") for n in names}
    assert len(names) == len(points) == 8
    points = compose(*ASKED, "sweep.arms.lora.lr=${geom:1e-4,1e-3,2}").points
    assert sorted(p.spec.lr for p in points if p.arm == "lora") == [1e-4, 3.16e-4, 1e-3]


def test_a_command_line_that_changes_the_runs_changes_title_and_looks(compose, tmp_path):
    plain, seeds = compose(*ASKED), "sweep.replicate.seeds=[5]"
    assert plain.title == "lr_ratio-smoke" and question(plain)["changes"] == []
    for change in ("steps=500", "sweep.axes.model=[tiny128]", "~sweep.arms.fullft", seeds):
        other = compose(*ASKED, change)
        assert other.title.startswith("lr_ratio-smoke-") and question(other)["changes"] == [change]
        assert looks.path_of(tmp_path, other.title) != looks.path_of(tmp_path, plain.title)
        assert from_plain(other.plain()).title == other.title  # as the follow-up job reads it
    decay = "weight_decay=0.1"
    both = {compose(*ASKED, *order).title for order in ((seeds, decay), (decay, seeds))}
    assert len(both) == 1 and other.title not in both  # two changes, whatever their order


def test_options_that_change_no_run_keep_the_title_and_those_that_are_replaced_are_refused(compose):
    options = ["exec.pack_size=1", "format=json", "cluster.time_min=5", "sweep.rounds=2"]
    margin = ["sweep.claims.ratio.margin=[2,50]"]  # the looks keep the first: see store.looks
    twice = ("sweep.arms.lora.lr=${no}", "sweep.arms.lora.lr=1e-3")  # the later value wins
    found = compose(*ASKED, "++dataset.n_test=32", *twice)
    assert {p.spec.dataset.n_test for p in found.points} == {32}
    for changes in (options, ["weight_decay=0"], margin):
        assert compose(*ASKED, *changes).title == "lr_ratio-smoke"
    assert question(compose(*ASKED, *margin))["changes"] == margin
    for given, hint in (
        ("+sweep.axes.lr=[1e-3,2e-3]", r"Write sweep\.arms\.fullft\.lr=.* or sweep\.arms\.lora"),
        ("+sweep.scales.smoke.axes.seed=5", "has no effect: a scale is chosen whole"),
    ):
        with pytest.raises(SpecError, match=hint):
            compose(*ASKED, given)


@pytest.mark.full
def test_a_study_with_changed_parts_has_a_title_of_its_own(compose):
    fewer = compose("+sweep=study", "scale=smoke", "sweep.parts=[lr_ratio,rank]")
    changed = compose("+sweep=study", "scale=smoke", "sweep.parts=[lr_ratio]", "steps=40")
    assert {p.changed for p in fewer.parts} == {""}
    assert len({"study-smoke", fewer.title, changed.title}) == 3
    assert {p.title for p in fewer.parts} == {"lr_ratio-smoke", "rank-smoke"}
    assert changed.parts[0].title == compose(*ASKED, "steps=40").title


VALID = {
    "question": "?",
    "claims": {"c": {"margin": [5, 20], "estimand": "lr_ratio", "expected": 10}},
    "arms": {"a": {"method": "lora", "lr": [1e-3, 2e-3]}},
    "analysis": "lr_ratio",
}
WRONG = {"prefix": 0, "n_short": 2, "seeds": -1, "fine": 1.0, "epochs": -1, "min_steps": 0}
RUNS = {"what": "learning rate 2e-3", "why": "four were left"}


def claim(**values):
    return {"claims": {"c": {"margin": [0, 1], "expected": 0.5, **values}}}


def added(stated, rounds=2):
    return {"arms": {"a": {"method": "lora", "added_after": stated}}, "rounds": rounds}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *(({key: type(VALID[key])()}, f"{key}: missing") for key in ("question", "claims", "arms")),
        ({"arms": {"a": {"lr": 1e-3}}}, "arm 'a': has no method"),
        ({"axes": {"seed": []}}, "axis 'seed' is empty"),
        ({"rounds": 6}, "rounds=6: expected"),
        ({"parts": ["rank"]}, "cannot have arms"),
        ({"replicate": {"arms": ["b"]}}, "replicate.arms: arm 'b' not found"),
        (claim(margin=[2, 1]), "low < high"),
        (claim(margin=[]), "margin="),
        (claim(source="x"), "source='x'. Allowed: study, popular, ours"),
        (claim(except_models=["tiny46"]), "'c': model 'tiny46'.* mean 'tiny64'"),
        (claim(exploratory={"tiny": ""}), "claim 'c': exploratory"),
        (claim(planning={"tiny": {"sd": -0.1}}), r"planning\.tiny\.sd=-0.1"),
        (claim(underpowered="tiny"), "underpowered=tiny. Expected true or"),
        (added(RUNS, rounds=1), "arm 'a': .* rounds=1"),
        *((added(x), "Expected {what: ..., why: ...}") for x in ("2e-3", {**RUNS, "why": ""})),
        *(
            ({"search": {name: value}}, f"search.*{name}=.*expected")
            for name, value in WRONG.items()
        ),
        ({"search": {"max_steps": 8, "min_steps": 9}}, "search.*max_steps=.*expected"),
    ],
)
def test_a_sweep_that_is_not_complete_is_refused(change, words):
    made("x", {**VALID, **added(RUNS)}, ["tiny64"])
    with pytest.raises(SpecError, match=f"sweep 'x'.*{words}"):
        made("x", {**VALID, **change}, ["tiny64"])


def test_a_claim_that_contradicts_the_metrics_direction_is_refused():
    for better, objective in (("lower", "sft"), ("higher", "policy_gradient"), ("", "sft")):
        check_directions("x", made("x", {**VALID, **claim(better=better)}), [objective])
    with pytest.raises(SpecError, match=r"claim 'c': better=higher.*lower is better"):
        check_directions("x", made("x", {**VALID, **claim(better="higher")}), ["sft"])
    left_out = claim(estimand="rho_top_rank", margin=[5, 20], except_models=["tiny64"])
    with pytest.raises(SpecError, match=r"analysis 'rank' cannot leave out bases"):
        check_claims(made("x", {**VALID, "analysis": "rank", **left_out}))


def test_a_scale_that_extends_another_takes_its_block_and_arms_follow_those_they_refer_to(compose):
    tiny, beyond = (compose("+sweep=lr_ratio", f"scale={s}") for s in ("tiny", "tiny_beyond"))
    params = [r.points[0].spec.dataset.generator_params for r in (tiny, beyond)]
    assert [p["shift_rank"] for p in params] == [2, 8] and params[1]["rule_shift"] == 0.25
    assert beyond.sweep.replicate == tiny.sweep.replicate and beyond.scale == "tiny_beyond"
    points = compose("+sweep=rank", "scale=smoke", "sweep.arms.lora.rank=[2,4]").points
    assert {p.spec.method.rank for p in points if p.arm == "redraw"} == {2, 4}
    stated = Claim(planning={"all": Planning(0.1), "tiny": Planning(0.2, 3)})
    assert [stated.planned_at(s) for s in ("tiny", "small")] == [Planning(0.2, 3), Planning(0.1)]


@pytest.mark.parametrize("group", ["model", "dataset"])
def test_every_model_and_data_set_is_described_in_full(compose, group):
    one = ("method=lora", "method.rank=1", "method.layers=attention")  # experts share a rank
    for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
        (point,) = compose(f"{group}={path.stem}", *one).points
        assert getattr(point.spec, group).name == path.stem and point.spec.model.n_params > 0


SWEEPS = sorted(p.stem for p in (ROOT / "sweeps").glob("*.yaml") if p.stem != "study")
GOLDEN = json.loads((ROOT / "tests/golden/sweep_ids.json").read_text())


@pytest.mark.parametrize("scale", sorted(p.stem for p in (ROOT / "conf/scale").glob("*.yaml")))
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
            compare_with_kept(question(request), f"{sweep}-{scale}", scale)
    assert found == {k: v for k, v in GOLDEN.items() if k.rpartition("-")[2] == scale}
    parts = yaml.safe_load((ROOT / "sweeps" / "study.yaml").read_text())["parts"]
    assert sorted([*parts, "tune"]) == SWEEPS  # the study consists of all sweeps but the search


def compare_with_kept(today, name, scale):
    """Claims, margins, rounds and added runs are those kept, but for keys that came later.

    A claim that is about no run of the kept answer may have changed or been added since. Two answers
    are from before the claims of today were stated.
    """
    folder = ROOT / "analysis/results" / name
    if not folder.exists() or name in ("layers-small", "lr_ratio-small"):
        return
    kept = json.loads((folder / "question.json").read_text())
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


METHODS = (FullFT(), FullFT(scope="matrices", layers="attention+mlp"))
METHODS += (LoRA(rank=8), LoRA(rank=8, layers="attention"))


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

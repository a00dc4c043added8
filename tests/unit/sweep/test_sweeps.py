"""What the command line means, what a sweep must state, what requests are called; the shipped sweep
files: runs at every scale, kept questions, what `action=matrices` lists; the search of learning rates on
planted losses: what it asks for, and when it ends."""

import dataclasses
import hashlib
import itertools
import json
import math
import shutil

import pytest
import yaml

from analysis.inference import decide
from lorasweep.cli.actions import act
from lorasweep.config import compose as compose_module
from lorasweep.config.compose import shipped_model
from lorasweep.errors import SpecError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.spec.trainer import TrainerSpec
from lorasweep.store import looks
from lorasweep.sweep import search as of_sweep
from lorasweep.sweep.grid import REST, Point, assignments, fields_of, run_names, trained_by_set
from lorasweep.sweep.question import Claim, Planning, Search, check_directions, made
from lorasweep.sweep.request import from_plain, question
from lorasweep.sweep.search import LOWEST, check_search, full_runs, next_lrs, search
from lorasweep.work.answer import check_claims
from tests.planted import is_full
from tests.world import ROOT, SCALES, SWEEPS, compose_request, shipped, tiny_spec

OPTIONS = ("scale", "model", "dataset", "method")
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


def test_names_are_looked_up_with_the_values_that_hydra_composes():
    groups = {g: sorted(p.stem for p in (ROOT / "conf" / g).glob("*.yaml")) for g in OPTIONS}
    groups["method"] += sorted(compose_module.METHODS)
    with compose_module.composer() as composer:
        for k in range(max(map(len, groups.values()))):
            names = {g: options[k % len(options)] for g, options in groups.items()}
            cfg = composer.composed([f"{g}={name}" for g, name in names.items()])
            for group in OPTIONS[1:]:
                name = names[group]
                assert compose_module._read(group, name) == compose_module._plain(cfg[group]), name


def test_two_names_on_an_axis_mean_what_each_alone_means(monkeypatch, tmp_path):
    """A folder with a shipped name, files beside it, and a user's files that read the scale."""
    monkeypatch.chdir(tmp_path)
    rows = "".join(f'{{"prompt": "q{i}", "completion": "a{i}"}}\n' for i in range(300))
    for folder in (tmp_path / "gsm8k", tmp_path / "rows"):
        folder.mkdir()
        (folder / "train.jsonl").write_text(rows)
    (tmp_path / "rows.yaml").write_text((ROOT / "conf/dataset/facts.yaml").read_text())
    files = {
        "dataset/fewer": "defaults: [dialect, _self_]\nname: fewer\nn_train: ${steps}\n",
        "model/as_asked": "defaults: [tiny64, _self_]\nname: as_asked\nweights_dtype: ${precision}\n",
        "method/wide": "defaults: [lora, _self_]\nalpha: ${batch_size}\n",
    }
    for name, text in files.items():
        path = tmp_path / f"mine/{name}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    asked = ("+sweep=lr_ratio", "scale=small", "model=tiny64", "steps=30")

    def specs(*typed):
        return {p.spec.id: p.spec for p in compose_request([*asked, *typed], "mine").points}

    for key, name in (
        ("dataset", "./gsm8k"),
        ("dataset", str(tmp_path / "rows")),
        ("dataset", "fewer"),
        ("model", "as_asked"),
    ):
        other = "tiny128" if key == "model" else "dialect"
        alone, both = specs(f"{key}={name}"), specs(f"{key}={name},{other}")
        assert alone.keys() == both.keys() - specs(f"{key}={other}").keys(), name
    wide = specs("sweep.arms.lora.method=wide").values()
    assert {s.method.alpha for s in wide if not is_full(s)} == {8}
    for wrong in ("./dialect", "../dataset/dialect_smoke"):
        with pytest.raises(SpecError, match="not found"):
            specs(f"dataset=dialect_smoke,{wrong}")
    path = tmp_path / "mine/method/fullft.yaml"
    path.write_text("scope: matrices\n")
    with pytest.raises(SpecError, match=r"would be ignored\. Rename it"):
        specs()


def test_a_shipped_file_of_another_form_is_left_to_hydra(monkeypatch, tmp_path):
    folder = tmp_path / "dataset"
    shutil.copytree(ROOT / "conf/dataset", folder)
    monkeypatch.setattr(compose_module, "conf_dir", lambda: tmp_path)
    for text in ("defaults: [dialect]", "defaults: [dialct, _self_]", "[1]", "defaults: null"):
        (folder / "mine.yaml").write_text(f"{text}\n")
        assert compose_module._read("dataset", "mine") == {}
    (folder / "mine.yaml").write_text("defaults: [dialect, _self_]\nname: mine\n")
    assert compose_module._read("dataset", "mine")["name"] == "mine"


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
    inside = "+sweep.axes.dataset.n_train=5"  # of a list of two names
    with pytest.raises(SpecError, match=r"^'\+sweep\.axes\.dataset\.n_train=5': "):
        compose(*ASKED, "dataset=dialect,dialect_smoke", inside)


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
        (claim(cost="d"), "claim 'c': cost=d. Expected a claim's name"),
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


GOLDEN = json.loads((ROOT / "tests/golden/sweep_ids.json").read_text())


@pytest.mark.parametrize("scale", SCALES)
def test_every_sweep_has_the_recorded_runs_and_questions(scale):
    """So what one sweep shares with another, or has trained, is not trained again."""
    found = {}
    for sweep, request in shipped(scale).items():
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
        assert (today["claims"][name]["planning"].get(scale) or {}).get("sd") is None, name
    for name in judged & kept["claims"].keys():
        advice = dict.fromkeys(("if_supported", "if_refuted", "if_open", "cost"), "")
        later = {"planning": {}, "underpowered": False, **advice}
        assert {**kept["claims"][name], **later} == {**today["claims"][name], **later}, name
    assert today["analysis"] == kept["analysis"]
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
    asked = ("+sweep=experts", "scale=paper", "action=matrices")
    assert act(compose(*asked)) == 0
    out = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any(x.startswith("lora on qwen3-30b-a3b-base (alpha=32.0, expert_alpha=32") for x in out)
    assert "router 48 2048x128 - 0 12,582,912" in out
    assert act(compose(*asked, "format=json")) == 0
    kinds = json.loads(capsys.readouterr().out)["kinds"]
    shared = next(k for k in kinds if k["method"].get("expert_outer") == "shared")
    mlp = next(f for f in shared["layer_sets"] if f["layer_set"] == "mlp")
    assert mlp["trained"] == 128 * 14_450_688 and mlp["ranks"] == [128]


HOW, ONE_SEED = Search(), Search(seeds=0)


def start(arm="lora", lr=1e-3, steps=64, **changes):
    return Point(arm, tiny_spec(lr=lr, steps=steps, seed=0, **changes))


def lora(rank, **changes):
    return start(method=LoRA(rank=rank), **changes)


def valley(best, cliff=math.inf):
    return lambda lr: math.inf if lr > cliff * best else 1 + 0.03 * math.log(lr / best) ** 2


def run(
    starts,
    world,
    how=HOW,
    may_begin=lambda known, new: True,
    look=lambda _: (False, {}),
    law=lambda of, known, lr: None,
):
    """Train what a search asks for until it asks for no more; every step starts from results alone."""
    losses, batches = {}, []
    while True:
        points = search(starts, how, losses.get, may_begin, look, law)
        new = [p for p in points if p.id not in losses]
        if not new:
            return points, batches
        assert [p.id for p in points[: len(losses)]] == list(losses)  # it only ever adds runs
        batches.append(new)
        losses |= {p.id: world(p) for p in new}


@pytest.mark.parametrize("best, cliff", [(1e-3, 64), (3e-2, 64), (2e-5, 64), (1e-3, 1.5), (0.2, 2)])
def test_the_range_is_found_from_any_start_and_never_ends_at_an_edge(best, cliff):
    loss = valley(best, cliff)
    points, batches = run([start()], lambda p: loss(p.spec.lr), ONE_SEED)
    full = {p.spec.lr: loss(p.spec.lr) for p in points if p.spec.steps == 64}
    lrs = sorted(full)
    at = lrs.index(min(lrs, key=full.__getitem__))
    assert 0 < at < len(lrs) - 1 and sum(map(math.isfinite, full.values())) >= HOW.n_full
    for k in (at - 1, at + 1):
        assert max(lrs[at] / lrs[k], lrs[k] / lrs[at]) <= 1.1 * HOW.fine
    assert full[lrs[at]] - 1 < 0.03 * math.log(2) ** 2 / 4 + 1e-9  # at most sqrt(2) off
    assert full_runs(points, 64) <= (7 if cliff > 2 else 8)
    assert {p.spec.steps for p in batches[0]} == {8} and len(batches[0]) == HOW.n_short


def test_a_short_run_is_the_beginning_of_a_long_one_counts_once_and_may_have_another_optimum():
    points, _ = run([start()], lambda p: valley(1e-3)(p.spec.lr), ONE_SEED)
    short, full = ([p for p in points if of_sweep.is_short(p, points) == k] for k in (True, False))
    begun = {p.spec.lr for p in short} & {p.spec.lr for p in full}
    assert len(begun) == HOW.n_lrs
    assert full_runs(points, 64) == len(full) + (len(short) - len(begun)) / 8
    best = {64: 1e-3, 8: 1.6e-2}
    points, _ = run([start()], lambda p: valley(best[p.spec.steps])(p.spec.lr), ONE_SEED)
    full = [valley(1e-3)(p.spec.lr) for p in points if p.spec.steps == 64]
    assert min(full) < 1 + 0.03 * math.log(2) ** 2


def test_what_the_analysis_asks_for_is_trained_with_all_seeds_and_a_decision_ends_the_search():
    def look(points):
        seeds = {p.spec.seed for p in points}
        if len(seeds) == 1 and not any(p.spec.lr == 7e-4 for p in points):
            return (False, {points[-1].id: [7e-4, 1.02e-3, 1e3, 1e-9]})
        return (len(seeds) >= 4, {points[-1].id: [1.2e-3]} if len(seeds) == 3 else {})

    points, batches = run([start()], lambda p: valley(1e-3)(p.spec.lr), look=look)
    full = [p for p in points if p.spec.steps == 64]
    asked = [(p.spec.lr, p.spec.seed) for p in full if p.spec.lr in (7e-4, 1.2e-3)]
    assert set(asked) >= {(7e-4, 0), (1.2e-3, 0), (1.2e-3, 1), (1.2e-3, 2)}
    assert not any(p.spec.lr in (1.02e-3, 1e3, 1e-9) for p in full)  # tried nearby, out of range
    assert {p.spec.seed for p in full} == {0, 1, 2, 3} and len(batches[-1]) == HOW.n_lrs


def test_all_arms_get_fresh_seeds_at_their_best_rates_up_to_the_limit():
    starts = [start("lora"), start("other", lr=1e-4, weight_decay=0.1)]
    best = {"lora": 4e-3, "other": 3e-5}
    points, _ = run(starts, lambda p: valley(best[p.arm])(p.spec.lr))
    for arm, seed in itertools.product(best, range(1, HOW.seeds + 1)):
        lrs = sorted(p.spec.lr for p in points if p.arm == arm and p.spec.seed == seed)
        assert len(lrs) == HOW.n_lrs and lrs[0] < best[arm] < lrs[-1]
    assert max(p.spec.seed for p in points) == HOW.seeds


def test_a_search_ends_before_runs_that_the_budget_does_not_allow():
    allowed = {"may_begin": lambda known, new: full_runs([*known, *new], 64) <= 6}
    points, _ = run([start()], lambda p: valley(1e-3)(p.spec.lr), **allowed)
    assert 4 < full_runs(points, 64) <= 6


@pytest.mark.parametrize("world", [lambda lr: math.inf, lambda lr: 1 + lr])
def test_an_arm_that_does_not_train_has_one_full_run_and_another_goes_on(world):
    starts = [start("broken", weight_decay=0.1), start("lora")]

    def loss(p):
        return world(p.spec.lr) if p.arm == "broken" else valley(1e-3)(p.spec.lr)

    alone, _ = run(starts[:1], loss)
    both, _ = run(starts, loss)
    for points in (alone, both):
        mine = [p for p in points if p.arm == "broken"]
        (full,) = [p for p in mine if p.spec.steps == 64]
        assert full.spec.lr == min(p.spec.lr for p in mine) < HOW.wide * LOWEST
    assert {p.spec.seed for p in both} == set(range(HOW.seeds + 1))
    lrs, full = next_lrs(1e-3, {LOWEST * 5: 1.0, LOWEST * 20: 2.0}, {}, HOW)
    assert lrs == [pytest.approx(LOWEST * 1.25)] and not full


def three_arms(best, law=None, world=None):
    """Full fine-tuning, rank 8 and rank 2 (which no law covers), with the searches' full losses."""
    starts = [start("full", method=FullFT()), lora(8), lora(2), lora(16)]

    def name(spec):
        return getattr(spec.method, "rank", 0)

    def by_law(of, known, lr):
        assert name(known) == 8
        return None if name(of) == 2 else lr * best[name(of)] / best[8] * (law or 1)

    world = world or (lambda p: valley(best[name(p.spec)])(p.spec.lr))
    points, batches = run(starts, world, ONE_SEED, law=by_law)
    full = {
        r: sorted(p.spec.lr for p in points if name(p.spec) == r and p.spec.steps == 64)
        for r in best
    }
    short = {name(p.spec) for p in points if p.spec.steps < 64}
    return full, short, batches, name


def test_arms_that_the_law_covers_get_three_rates_around_it_after_the_first_arm():
    best = {0: 1e-4, 8: 2e-3, 2: 4e-3, 16: 2.2e-3}
    full, short, batches, name = three_arms(best)
    assert short == {8, 2} and min(map(len, (full[8], full[2]))) >= 5
    for r in (0, 16):
        assert full[r] == pytest.approx([best[r] / 2, best[r], best[r] * 2], rel=0.05)
    first = next(k for k, new in enumerate(batches) if any(name(p.spec) in (0, 16) for p in new))
    assert not any(name(p.spec) == 8 for new in batches[first:] for p in new)  # it was known
    spacing = [b / a for lrs in full.values() for a, b in itertools.pairwise(lrs)]
    assert max(spacing) <= 4 + 1e-9


def test_a_law_that_is_wrong_widens_the_arm_until_the_best_is_inside():
    best = {0: 1e-4, 8: 2e-3, 2: 4e-3, 16: 2.2e-3}
    for wrong in (1 / 5, 7):
        full, short, _, _ = three_arms(best, law=wrong)
        for r in (0, 16):
            assert full[r][0] < best[r] < full[r][-1] and short == {8, 2}
            assert all(b / a <= 2.1 for a, b in itertools.pairwise(full[r]))


def test_without_a_first_arm_that_trains_all_arms_are_searched_without_the_law():
    best = {0: 1e-4, 8: 2e-3, 2: 4e-3, 16: 2.2e-3}

    def world(p):
        rank = getattr(p.spec.method, "rank", 0)
        return math.inf if rank == 8 else valley(best[rank])(p.spec.lr)

    full, short, _, _ = three_arms(best, world=world)
    assert short == {0, 8, 2, 16} and len(full[8]) == 1
    assert all(full[r][0] < best[r] < full[r][-1] for r in (0, 2, 16))
    best |= {8: 60.0}  # beyond HIGHEST
    full, _, _, _ = three_arms(best)
    assert all(full[r][0] < best[r] < full[r][-1] for r in (0, 2, 16))
    best |= {8: 2e-3}
    diverging = lambda p: valley(best[getattr(p.spec.method, "rank", 0)], 1.5)(p.spec.lr)  # noqa: E731
    full, _, _, _ = three_arms(best, world=diverging)
    assert all(sum(lr < 1.5 * best[r] for lr in full[r]) >= 3 for r in (0, 16))


def test_an_arm_that_the_law_covers_and_that_does_not_train_ends_in_few_full_runs():
    best = {0: 1e-4, 8: 2e-3, 2: 4e-3, 16: 2.2e-3}

    def hurt(p):
        return 1 + p.spec.lr if is_full(p.spec) else valley(best[p.spec.method.rank])(p.spec.lr)

    full, short, _, _ = three_arms(best, world=hurt)
    assert len(full[0]) <= 7 and full[0][0] < HOW.wide * LOWEST and short == {0, 8, 2}


def test_an_arm_that_the_law_began_gets_no_short_runs_when_the_first_arm_leaves_the_laws_scope():
    def look(points):  # the first arm's best rate rises
        return False, {points[0].id: [2.6e-3]} if {p.spec.seed for p in points} == {0} else {}

    cliff = {"lora": valley(2.6e-3, 1.2), "full": valley(1e-4)}
    points, _ = run(
        [start("full", method=FullFT()), lora(8)],
        lambda p: cliff[p.arm](p.spec.lr),
        look=look,
        law=lambda of, known, lr: 1e-4 if lr < 2.5e-3 else None,
    )
    assert any(p.spec.lr == 2.6e-3 for p in points)
    assert {p.spec.steps for p in points if p.arm == "full"} == {64}


def test_an_arm_that_another_search_has_finished_is_not_trained_again_by_the_law():
    best, world = {8: 2e-3, 16: 2.2e-3}, lambda p: valley(best[p.spec.method.rank])(p.spec.lr)
    before, _ = run([lora(8)], world, ONE_SEED)
    losses = {p.id: world(p) for p in before}
    while new := [
        p
        for p in search(
            *([lora(16), lora(8)], ONE_SEED, losses.get, lambda known, new: True),
            *(lambda _: (False, {}), lambda of, known, lr: lr * 1.1),
        )
        if p.id not in losses
    ]:
        losses |= {p.id: world(p) for p in new}
        assert {p.spec.method.rank for p in new} == {16}


def test_the_vertex_is_that_of_the_parabola_and_never_beyond_the_neighbours():
    at = of_sweep.vertex({lr: valley(1.3e-3)(lr) for lr in (5e-4, 1e-3, 4e-3)})
    assert at == pytest.approx(1.3e-3)
    assert of_sweep.vertex({1e-3: 2.0, 2e-3: 1.0, 4e-3: math.inf}) == 2e-3
    flat = of_sweep.vertex({1e-3: 1.0, 2e-3: 1.0, 4e-3: 1.0, 5e-4: 1.0001})
    assert flat == pytest.approx(math.sqrt(2) * 1e-3)


def test_a_search_is_about_one_model_and_file_at_a_constant_rate_and_arms_differ_in_rank():
    """Arms that differ in more would be one for the analysis: one's answer would be the other's."""
    check_search([lora(2), lora(4)])
    other = dataclasses.replace(tiny_spec().dataset, name="mine")
    for runs, words in (
        ([lora(2), lora(4, dataset=other)], "one model and one data set.*mine together"),
        ([lora(2, schedule="linear")], "schedule=linear.*beginnings of longer ones"),
        ([lora(2), lora(4, batch_size=2)], r"batch_size=\d+, 2 together\. Give batch_size one"),
        ([lora(2), lora(2, lr=0.1)], r"lora \(lr=0.001\) and lora \(lr=0.1\) .* alone"),
    ):
        with pytest.raises(SpecError, match=words):
            check_search(runs)


def test_a_search_with_narrow_steps_ends():
    """Full runs want a higher rate than short ones, and short rates near it were tried in full."""
    losses = {True: valley(4e-3), False: valley(1e-3)}
    world, how = lambda p: losses[p.spec.steps == 64](p.spec.lr), Search(wide=1.4, fine=2)
    points, _ = run([lora(2)], world, how, look=lambda _: (True, {}))
    assert len({p.id for p in points}) == len(points) < 200


def test_a_search_by_a_foreign_trainer_makes_runs_of_full_length_only_and_finds_the_best():
    """Its first updates are not ours to measure: the wide range is searched in full, then refined."""
    trainer = TrainerSpec("other", ("x", "{lr}", "{seed}", "{out}"))
    starts = [lora(2, trainer=trainer), start("fullft", method=FullFT(), trainer=trainer)]
    world, how = lambda p: valley(3e-3)(p.spec.lr), Search(prefix=1)
    points, _ = run(
        starts, world, how, look=lambda known: (len({p.spec.seed for p in known}) > 2, {})
    )
    assert {p.spec.steps for p in points} == {64}
    for arm in ("lora", "fullft"):
        tried = {p.spec.lr: valley(3e-3)(p.spec.lr) for p in points if p.arm == arm}
        best = min(tried, key=tried.__getitem__)
        assert 0.5 < best / 3e-3 < 2 and min(tried) < best < max(tried)
        near = [lr for lr in tried if lr != best and max(lr / best, best / lr) < 1.1 * how.fine]
        assert len(near) == 2  # refined in full, beyond the wide range


@pytest.mark.parametrize("steps, prefix", [(8, 8), (1, 8), (100, 1)])
def test_a_run_too_short_to_have_a_beginning_is_refused(steps, prefix):
    """No run would count as short, and the search would ask for the same ones for ever."""
    with pytest.raises(SpecError, match=f"steps={steps}"):
        run([start(steps=steps)], lambda _: 1.0, Search(prefix=prefix))
    assert of_sweep.MIN_SEEDS == decide.MIN_SEEDS  # the search looks when the analysis judges

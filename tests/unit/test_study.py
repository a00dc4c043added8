"""Every question of the study on planted runs, through sweep file, grid, store, second stage,
table, analysis and report: planted truths come back, and a flipped truth flips the verdict."""

import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest

from analysis.measures import layer_sets
from analysis.measures.at_best import weights
from analysis.questions import capacity, compute, rank
from analysis.questions.qualify import qualify, verdict
from analysis.report import study, study_page
from analysis.runs.prefixes import at_step
from lorasweep.cli.actions import act
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.store.run_store import load_runs
from lorasweep.train.loop import eval_steps
from tests.world import compose_request

START, GAIN, CURVATURE, NOISE = 3.4, 0.14, 0.06, 4e-4
FULL, LORA = 1.6e-3, 3.2e-3  # planted best rates: on the grids of scale smoke


class World:
    """Losses fall by GAIN a doubling of the updates; an arm with rho is at update s where full
    fine-tuning is at s * rho."""

    def __init__(self, rho=lambda spec: 0.5, best=None, more=None):
        self.rho, self.best, self.more = (
            rho,
            best or (lambda spec, step: FULL if spec.method.name == "fullft" else LORA),
            more,
        )

    def loss(self, spec, step):
        rho = 1.0 if spec.method.name == "fullft" and spec.method.scope == "all" else self.rho(spec)
        off = math.log(spec.lr / self.best(spec, step))
        rng = np.random.default_rng([int(spec.id, 16), step])
        shared = np.random.default_rng([spec.seed, step]).normal(
            0, 3 * NOISE
        )  # one seed sees the same batches in every arm
        return (
            START
            - GAIN * math.log2(1 + step * rho)
            + CURVATURE * off**2
            + shared
            + rng.normal(0, NOISE)
        )

    def curve(self, spec):
        return [{"step": 0, "test_nll": START}] + [
            {"step": s, "test_nll": self.loss(spec, s)} for s in eval_steps(spec.steps)
        ]


@pytest.fixture
def ask(compose, capsys, fake_trainer):
    def run(sweep, world, *overrides):
        seeds = [
            "sweep.at.smoke.fresh_seeds=[1,2,3]",
            "scale=smoke",
            "exec.pack_size=1",
            "format=json",
        ]
        request = compose(f"+sweep={sweep}", *seeds, *overrides)
        more = world.more or (lambda spec: {})
        trainer = fake_trainer(
            lambda s: world.loss(s, s.steps), start=START, curve=world.curve, more=more
        )
        assert act(request, trainer) == 0
        out = json.loads(capsys.readouterr().out)
        return out, {v["claim"]: v for v in out["verdicts"]}

    return run


FULL_LR, LORA_LR = "'${around:1.6e-3,7,2}'".strip("'"), "'${around:3.2e-3,7,2}'".strip("'")
GRIDS = (f"sweep.at.smoke.lr_fullft={FULL_LR}", f"sweep.at.smoke.lr_lora={LORA_LR}")


@pytest.mark.parametrize(("top", "outcome"), [(1.0, "SUPPORTED"), (0.5, "REFUTED")])
def test_rank_departures_and_parity(ask, top, outcome):
    rho = {1: 0.1, 4: 0.3, 8: top}
    out, found = ask(
        "rank",
        World(lambda s: rho[s.method.rank]),
        *GRIDS,
        "sweep.at.smoke.ranks=[1,4,8]",
        "sweep.at.smoke.steps=384",
        "sweep.at.smoke.lr_common.any=3.2e-3",
    )
    assert found["parity"]["outcome"] == outcome, found["parity"]["why"]
    assert found["parity"]["estimate"]["value"] == pytest.approx(top, rel=0.05)
    assert (
        found["start_popular"]["outcome"] == "REFUTED"
    )  # rank 1 is apart from the first update on
    left = out["departures"]
    assert max(left["1"]) <= min(left["4"])
    assert all(v is None for v in left["8"]) == (top == 1.0)


def test_what_a_run_is_at_a_best_rate_that_was_not_tried_is_interpolated(ask):
    between = {
        "fullft": 2.1e-3,
        "lora": 4.4e-3,
    }  # the tried rates are a factor 2 apart: 1.6e-3, 3.2e-3, 6.4e-3
    world = World(
        lambda s: {1: 0.2, 4: 0.8}[s.method.rank], best=lambda spec, step: between[spec.method.name]
    )
    _, found = ask(
        "rank", world, *GRIDS, "sweep.at.smoke.steps=384", "sweep.at.smoke.lr_common.any=3.2e-3"
    )
    assert found["parity"]["estimate"]["value"] == pytest.approx(0.8, rel=0.03)


def test_ranks_that_all_leave_at_once_have_no_order(ask):
    _, found = ask(
        "rank",
        World(lambda s: 0.05 * s.method.rank),
        *GRIDS,
        "sweep.at.smoke.steps=384",
        "sweep.at.smoke.lr_common.any=3.2e-3",
    )
    assert (
        found["order"]["outcome"] == "UNDECIDED"
        and "order is not resolved" in found["order"]["why"]
    )


@pytest.mark.parametrize("scale", ["smoke", "tiny", "tiny_128", "small", "paper"])
def test_attention_and_mlp_have_equal_parameters_at_every_scale(compose, scale):
    points = [p for p in compose("+sweep=layers", f"scale={scale}").points if p.arm == "lora"]
    size = {p.spec.method.layers: p.spec.method.n_trainable(p.spec.model) for p in points}
    assert abs(math.log(size["attention"] / size["mlp"])) < math.log(
        1 + layer_sets.PARAMETERS_AGREE
    )


def test_weights_are_lagranges_and_keep_away_from_a_cliff():
    tried = [math.log(r) for r in (1e-3, 2e-3, 4e-3, 8e-3)]
    at = math.log(2.8e-3)
    for heights in ({x: -x for x in tried}, {x: x for x in tried}):
        found = weights(tried, at, heights)
        assert len(found) == 3 and sum(found.values()) == pytest.approx(1)
        assert sum(w * (x - 1) ** 2 for x, w in found.items()) == pytest.approx(
            (at - 1) ** 2
        )  # exact for parabolas
    assert min(found) == tried[0]  # the loss falls towards lower rates, so the third one lies there
    assert weights(tried, math.log(0.5e-3), heights) == {tried[0]: 1.0}
    assert weights(tried, tried[1], heights) == {tried[1]: 1.0}
    assert set(weights([tried[0], tried[1]], math.log(1.5e-3), heights)) == {tried[0], tried[1]}


def test_departure_of_a_known_curve():
    full = [
        (2.0**k, 3.0 - 0.2 * k) for k in range(9)
    ]  # gains 1.6 nats in all: a lack of 0.08 counts
    lora = [(s, v + (0.16 if s >= 64 else 0.0)) for s, v in full]
    assert rank.departure(lora, full, 3.0) == pytest.approx(
        math.exp(math.log(32) + 0.5 * math.log(2))
    )
    assert rank.departure(full, full, 3.0) == math.inf
    assert rank.departure([(s, v + 0.2) for s, v in full], full, 3.0) == 1.0


@pytest.mark.parametrize(("power", "outcome"), [(-0.15, "SUPPORTED"), (0.0, "REFUTED")])
def test_batch_penalty(ask, power, outcome):
    cells = ",".join(
        f"{{batch_size:{b},steps:{1536 // b},lr:[4e-4,8e-4,1.6e-3,3.2e-3,6.4e-3]}}"
        for b in (4, 16, 64)
    )
    lora = cells.replace("4e-4,8e-4,1.6e-3,3.2e-3,6.4e-3", "8e-4,1.6e-3,3.2e-3,6.4e-3,1.28e-2")
    _out, found = ask(
        "batch_size",
        World(lambda s: 0.9 * (s.batch_size / 4) ** power),
        f"sweep.at.smoke.fullft=[{cells}]",
        f"sweep.at.smoke.lora=[{lora}]",
        "sweep.at.smoke.ranks=[1,4]",
    )
    assert found["penalty"]["outcome"] == outcome
    assert found["penalty"]["estimate"]["value"] == pytest.approx(power * math.log(2), abs=0.02)
    assert found["any_rank"]["estimate"]["value"] == pytest.approx(0, abs=0.03)
    assert found["below_32"]["estimate"]["value"] == pytest.approx(0.9 * 4**power, rel=0.05)


@pytest.mark.parametrize(("attention", "outcome"), [(0.4, "SUPPORTED"), (0.85, "REFUTED")])
def test_layer_sets(ask, attention, outcome):
    rho = {"attention": attention, "mlp": 0.8, "attention+mlp": 0.82}
    lr = {
        "fullft": "[4e-4,8e-4,1.6e-3,3.2e-3,6.4e-3]",
        "lora": "[8e-4,1.6e-3,3.2e-3,6.4e-3,1.28e-2]",
    }
    task = {
        k: f"sweep.at.smoke.{k}=[{{model:tiny64,dataset:dialect,lr:{v}}}]" for k, v in lr.items()
    }
    world = World(lambda s: rho.get(s.method.layers, 0.9))
    _out, found = ask("layers", world, *task.values(), "sweep.at.smoke.steps=96")
    assert found["attention_worse"]["outcome"] == outcome
    assert found["attention_worse"]["estimate"]["value"] == pytest.approx(attention / 0.8, rel=0.05)
    assert found["mlp_is_enough"]["outcome"] == "SUPPORTED"


@pytest.mark.parametrize(("factor", "outcome"), [(2.0, "SUPPORTED"), (0.5, "REFUTED")])
def test_short_runs_and_norms(ask, factor, outcome):
    def best(spec, step):
        return FULL if spec.method.name == "fullft" else LORA * (factor if step <= 24 else 1.0)

    def more(spec):
        norms = (
            {"delta": 2.0} if spec.method.name == "fullft" else {"a": 0.5, "b": 1.0, "delta": 3.0}
        )
        return {"spectra": {"model.layers.0.q_proj": norms, "lm_head": norms}}

    _out, found = ask(
        "short_runs",
        World(best=best, more=more),
        *GRIDS,
        "sweep.at.smoke.ranks=[4,8]",
        "sweep.at.smoke.steps=384",
        "sweep.second.n_lrs=5",
        "sweep.at.smoke.all_seeds=[0,1,2,3]",
    )
    assert found["short_over_long"]["outcome"] == outcome
    assert found["short_over_long"]["estimate"]["value"] == pytest.approx(factor, rel=0.15)
    assert found["b_grows"]["estimate"]["value"] == pytest.approx(2.0)
    assert found["same_movement"]["estimate"]["value"] == pytest.approx(1.5)


@pytest.mark.parametrize(("power", "outcome"), [(0.0, "SUPPORTED"), (1.0, "REFUTED")])
def test_the_law_of_the_ratio(ask, power, outcome):
    def best(spec, step):
        if spec.method.name == "fullft":
            return 1.6e-3
        return 1.6e-3 * 4 * (32 / spec.method.alpha) * (spec.model.hidden_size / 64) ** power

    lora = ",".join(
        f"{{model:[tiny64-3m,tiny64,tiny64-s1,tiny128-3m,tiny128-4m,tiny256-3m],alpha:{a},lr:[{','.join(f'{6.4e-3 * 32 / a * 2.0**k:.3g}' for k in range(-3, 4))}]}}"
        for a in (8, 32, 128)
    )
    more = {"retain_start": 2.0, "retain_nll": 2.1}
    out, found = ask(
        "lr_scale",
        World(best=best, more=lambda s: more),
        f"sweep.at.smoke.lora=[{lora}]",
        "sweep.at.smoke.fullft=[{model:[tiny64-3m,tiny64,tiny64-s1,tiny128-3m,tiny128-4m,tiny256-3m],lr:[2e-4,4e-4,8e-4,1.6e-3,3.2e-3,6.4e-3,1.28e-2]}]",
    )
    assert found["hidden"]["outcome"] == outcome
    assert found["hidden"]["estimate"]["value"] == pytest.approx(power, abs=0.15)
    assert found["alpha"]["outcome"] == "SUPPORTED"
    assert "smollm2-135m-instruct on gsm8k (small)" in out["outside"]  # a marker, from what is kept


@pytest.mark.parametrize(("bits", "outcome"), [(2.0, "SUPPORTED"), (0.5, "REFUTED")])
def test_capacity(ask, bits, outcome):
    class Facts(World):
        def loss(self, spec, step):
            facts = spec.dataset.generator_params["facts"]
            stored = 16 * facts if spec.method.name == "fullft" else min(16 * facts, bits * 1648)
            noise = np.random.default_rng(int(spec.id, 16)).normal(0, 1e-3)
            off = 0.05 * math.log(spec.lr / (3e-3 if spec.method.name == "fullft" else 1e-2)) ** 2
            return math.log(16) - stored / facts / 4 * math.log(2) + off + noise

    _out, found = ask(
        "capacity",
        Facts(more=lambda s: {"retain_nll": 3.0, "retain_start": math.log(16)}),
        "sweep.at.smoke.loads=[{knobs:{facts:512},steps:[200,400],lr:[5e-3,1e-2,2e-2]}]",
    )
    assert found["two_bits"]["outcome"] == outcome
    assert found["two_bits"]["estimate"]["value"] == pytest.approx(bits, rel=0.05)
    assert found["no_leak"]["outcome"] == "SUPPORTED"


def test_effective_parameters_count_each_matrix_once():
    spec = (
        compose_request(["model=tiny64", "method=lora", "method.rank=1", "method.layers=attention"])
        .points[0]
        .spec
    )

    assert capacity.effective(spec.plain()) == 4 * (127 + 79 + 79 + 127) == 1648
    assert capacity.bits(0.0, 10) == pytest.approx(160) and capacity.bits(math.log(16), 10) == 0


def test_recipes(ask):
    def best(spec, step):
        return FULL if spec.method.name == "fullft" else LORA

    world = World(
        lambda s: 1.0 if s.method.rank == 8 else 0.6,
        best,
        more=lambda s: {
            "retain_nll": 2.5 if s.method.name == "fullft" else 2.2,
            "retain_start": 2.0,
        },
    )
    _out, found = ask(
        "recipes",
        world,
        *GRIDS,
        "sweep.at.smoke.rank=8",
        "sweep.at.smoke.few_ranks=[1,8]",
        "sweep.at.smoke.alpha_2r=16",
        "sweep.at.smoke.steps=96",
        f"sweep.at.smoke.lr_few={LORA_LR}",
        f"sweep.at.smoke.lr_few_fullft={FULL_LR}",
    )
    gain = GAIN * math.log2(97)
    assert found["alpha_twice_rank"]["outcome"] == "SUPPORTED"  # the same loss
    lost = CURVATURE * math.log(2e-4 / LORA) ** 2 / gain
    assert found["default_rate"]["outcome"] == "REFUTED"
    assert found["default_rate"]["estimate"]["value"] == pytest.approx(lost, rel=0.05)
    assert found["retention"]["estimate"]["value"] == pytest.approx(0.4)
    assert found["small_data_rank"]["outcome"] == "REFUTED"


@pytest.mark.parametrize(("rho", "outcome"), [(1.0, "SUPPORTED"), (0.5, "REFUTED")])
def test_compute(ask, rho, outcome):
    seconds = {"fullft": 0.10, "lora": 0.07}

    def more(spec):
        noise = np.random.default_rng(int(spec.id, 16)).uniform(1.0, 1.02)
        return {"step_s": seconds[spec.method.name] * noise}

    _out, found = ask(
        "compute",
        World(lambda s: rho, more=more),
        *GRIDS,
        "sweep.at.smoke.ranks=[1]",
        "sweep.at.smoke.steps=384",
    )
    assert found["seconds_a_step"]["outcome"] == "SUPPORTED"
    assert found["seconds_to_loss"]["estimate"]["value"] == pytest.approx(0.7 / rho, rel=0.1)
    assert found["flops_to_loss"]["outcome"] == outcome


def test_lora_has_the_best_rate_of_short_runs_as_well_where_both_count_to_one_loss(ask):
    """At a rate that is best for whole runs, LoRA would need three quarters as many updates again."""

    def best(spec, step):
        whole = FULL if spec.method.name == "fullft" else LORA
        return whole * (4.0 if spec.method.name == "lora" and step <= 96 else 1.0)

    _out, found = ask(
        "compute",
        World(lambda s: 1.0, best),
        *GRIDS,
        "sweep.at.smoke.ranks=[1]",
        "sweep.at.smoke.steps=384",
        "sweep.second.n_lrs=7",
    )
    steps = found["flops_to_loss"]["estimate"]["value"] / found["flops_a_step"]["estimate"]["value"]
    assert steps == pytest.approx(1.0, rel=0.08)


@pytest.mark.parametrize(("rho", "length"), [(0.5, 128), (0.28, 256), (0.2, 384)])
def test_the_length_at_which_lora_gets_to_the_loss(ask, rho, length):
    """Full fine-tuning's loss after 64 of 384 updates; the last evaluation before the end is at
    256."""
    out, found = ask(
        "compute",
        World(lambda s: rho),
        *GRIDS,
        "sweep.at.smoke.ranks=[1]",
        "sweep.at.smoke.steps=384",
    )
    assert out["lengths"] == {"1": length}
    steps = found["flops_to_loss"]["estimate"]["value"] / found["flops_a_step"]["estimate"]["value"]
    assert steps == pytest.approx(1 / rho if length < 384 else 256 / 51, rel=0.08)


def test_forgetting_is_compared_where_both_have_learned_as_much(ask):
    """Full fine-tuning forgets with its rate; where it has learned what LoRA learns, it has
    forgotten half of what LoRA has."""

    def more(spec):
        lost = 0.2 if spec.method.name == "lora" else 0.2 * math.sqrt(spec.lr / FULL)
        return {"retain_nll": 2.0 + lost, "retain_start": 2.0}

    rho = 2.0 ** -(
        CURVATURE * math.log(4) ** 2 / GAIN
    )  # a loss that full fine-tuning has at a quarter of its best rate
    _out, found = ask(
        "recipes",
        World(lambda s: rho, more=more),
        *GRIDS,
        "sweep.at.smoke.rank=8",
        "sweep.at.smoke.few_ranks=[1,8]",
        "sweep.at.smoke.alpha_2r=16",
        "sweep.at.smoke.steps=96",
        "sweep.at.smoke.all_seeds=[0,1,2,3]",
    )
    assert found["retention"]["estimate"]["value"] == pytest.approx(1.0, rel=0.1)
    assert found["retention_equal"]["estimate"]["value"] == pytest.approx(2.0, rel=0.1)
    assert found["retention_equal"]["outcome"] == "REFUTED"


def test_times_of_a_busy_machine_decide_nothing(ask):
    def more(spec):
        return {"step_s": 0.1 * np.random.default_rng(int(spec.id, 16)).uniform(1.0, 4.0)}

    _, found = ask(
        "compute",
        World(lambda s: 1.0, more=more),
        *GRIDS,
        "sweep.at.smoke.ranks=[1]",
        "sweep.at.smoke.steps=384",
    )
    assert (
        found["seconds_a_step"]["outcome"] == "UNDECIDED"
        and "quiet machine" in found["seconds_a_step"]["needed"]
    )
    assert found["flops_to_loss"]["outcome"] == "SUPPORTED"  # operations do not hang on the machine


def test_operations_are_those_of_the_methods():
    model = compose_request(["model=smollm2-135m-instruct", "method=lora"]).points[0].spec

    for r in (1, 16):
        method = LoRA(rank=r)
        plain = model.plain()
        told = compute.flops_ratio(plain, method.n_trainable(model.model))
        assert told == pytest.approx(
            method.step_flops(model.model, 100) / FullFT().step_flops(model.model, 100)
        )


def test_prefixes_and_qualification(ask, tmp_path):
    _out, _ = ask("rank", World(lambda s: 0.7), *GRIDS, "sweep.at.smoke.steps=96")
    table = load_runs(tmp_path / "runs")
    short = at_step(table, 32)
    assert (short["steps"] == 32).all() and len(short) == len(table)
    first = json.loads(table.iloc[0]["result"])["curve"]
    assert short.iloc[0]["test_nll"] == next(p["test_nll"] for p in first if p["step"] == 32)
    told = qualify(table[table["init_seed"].fillna(0) == 0])
    assert verdict(told) == {"tiny64 on dialect_smoke, batch 4, steps 96": True}
    assert {c.ok for c in told if c.name == "to be learned"} == {None}  # the fake tells no floor
    flat = World(lambda s: 0.7)
    flat.curve = lambda spec: [{"step": s, "test_nll": 2.0} for s in (0, *eval_steps(spec.steps))]
    solved = table.assign(
        result=[
            json.dumps(
                {**json.loads(t), "curve": flat.curve(compose_request(["steps=96"]).points[0].spec)}
            )
            for t in table["result"]
        ]
    )
    assert not any(verdict(qualify(solved[solved["init_seed"].fillna(0) == 0])).values())


def test_runs_are_cut_where_their_task_is_over(ask, tmp_path):
    """The planted loss falls by GAIN a doubling: at step s the best run has lost GAIN log2(1 + s)
    of what there was."""
    from analysis.runs.prefixes import while_unsolved

    ask("rank", World(lambda s: 0.7), *GRIDS, "sweep.at.smoke.steps=96")
    whole = pd.read_parquet(tmp_path / "reports/rank-smoke/table.parquet")
    plain = whole[(whole["method"] == "fullft") | (whole["init_seed"].fillna(0) == 0)]
    assert while_unsolved(plain)[1] == ""  # the fake tells no floor
    learned = GAIN * math.log2(1 + 40)  # so that a fifth is left near step 40
    part, said = while_unsolved(plain.assign(floor_nats=START - learned / 0.8))
    assert set(part["steps"]) == {32} and said.startswith("Cut at 32 of 96 updates")
    assert (
        while_unsolved(plain.assign(floor_nats=0.0))[1] == ""
        and while_unsolved(plain.assign(floor_nats=3.39))[1] == ""
    )


def test_the_studys_table_corrects_primary_claims_and_names_what_is_needed(ask, tmp_path):
    ask("rank", World(lambda s: 0.7), *GRIDS, "sweep.at.smoke.steps=96")
    parts = study.parts_of([tmp_path / "reports"])
    rows = study.rows_of(parts)
    assert rows[0] == list(study.HEAD) and {r[0].split(":")[0] for r in rows[1:]} == {"rank"}
    told = json.loads((tmp_path / "reports/rank-smoke/results.json").read_text())
    for v in told["verdicts"]:  # a flipped result flips the page
        v["outcome"], v["p"] = "SUPPORTED", 0.04
    (tmp_path / "reports/rank-smoke/results.json").write_text(json.dumps(told))
    flipped = study_page.page(study.parts_of([tmp_path / "reports"]))
    assert "**SUPPORTED**" in flipped and "What was not tested" in flipped  # of the kept answers
    assert "What was not tested" not in study_page.page(
        study.parts_of([tmp_path / "reports"]), "../"
    )
    n = sum(v["primary"] for v in told["verdicts"])
    assert n == 2 and "after Holm" not in flipped.split("|")[0]
    outcomes = [
        v.outcome for p in study.parts_of([tmp_path / "reports"]) for v in p.verdicts if v.primary
    ]
    assert outcomes == ["UNDECIDED", "UNDECIDED"]  # p 0.04 twice does not survive 0.05 / 2


def test_claims_are_sorted_by_what_became_of_them_over_their_scales(ask, tmp_path):
    ask("rank", World(lambda s: 0.7), *GRIDS, "sweep.at.smoke.steps=96")
    folder = tmp_path / "reports/rank-smoke"
    told, question = (
        json.loads((folder / name).read_text()) for name in ("results.json", "question.json")
    )
    other = tmp_path / "reports/rank-tiny_s1"
    other.mkdir()
    (other / "question.json").write_text(json.dumps(question))
    assert told["verdicts"][1]["claim"] == "parity"
    for scale, outcome in (("smoke", "REFUTED"), ("tiny_s1", "UNDECIDED")):
        told["scale"] = scale
        for v in told["verdicts"]:
            v["outcome"], v["p"] = (outcome if v["claim"] == "parity" else "SUPPORTED"), 1e-9
        (tmp_path / f"reports/rank-{scale}/results.json").write_text(json.dumps(told))
    (other / "table.csv").write_bytes((folder / "table.csv").read_bytes())
    asked = study_page.claims(study.parts_of([tmp_path / "reports"]))
    fates = study_page.by_fate(asked)
    mixed = "Refuted in one answer, undecided in another"
    assert {name: len(mine) for name, mine in fates.items()} == {
        "Supported on every base that was asked": 3,
        mixed: 1,
    }
    head, _, row = study_page.glance(fates[mixed], study_page.bases(asked))
    assert head == "| claim | counts as yes | tiny64 |" and "as fast as full fine-tuning" in row
    assert (
        "**REFUTED** (`smoke`)" in row
        and "**UNDECIDED** (`tiny_s1`)" in row
        and "*rho of the highest rank*" in row
    )


@pytest.mark.parametrize(
    "outcomes", [c for n in (1, 2, 3) for c in itertools.combinations(study_page.OUTCOMES, n)]
)
def test_every_claim_has_exactly_one_fate(outcomes):
    assert [is_so(set(outcomes)) for _, is_so in study_page.FATES].count(True) == 1


def test_words_are_no_part_of_what_is_hashed_and_every_claim_has_some(compose, tmp_path):
    from analysis.report.report import question_hash
    from lorasweep.sweep.request import question

    for name in study.ORDER:
        asked = question(compose(f"+sweep={name}", "scale=smoke"))
        assert asked["how"] and all(c["says"] and c["measure"] for c in asked["claims"].values()), (
            name
        )
        first = next(iter(asked["claims"]))
        other = {
            **asked,
            "claims": {
                **asked["claims"],
                first: {
                    **asked["claims"][first],
                    "says": "other words",
                    "measure": "metres",
                    "beside": "the point",
                },
            },
        }
        assert question_hash(other) == question_hash(asked)
        other["claims"][first]["margin"] = [0.0, 1e9]
        assert question_hash(other) != question_hash(asked)

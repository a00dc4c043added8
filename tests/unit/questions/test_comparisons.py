"""Arms against each other on planted runs: learning rates, speeds, settings and costs come back, and
each verdict can be reached."""

import dataclasses
import json
import math
import re
from functools import partial

import numpy as np
import pandas as pd
import pytest

from analysis.measures import speed
from analysis.optimum.fit import linex
from analysis.questions import capacity, invariance, lengths
from analysis.questions.registry import analyse, question_named
from analysis.runs.table import TableError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from tests import planted
from tests.planted import FULL, GAIN, LORA, World, arms, around, ask, check, is_full, runs, smoke

pytestmark = pytest.mark.slow  # fits dozens of curves


def near(value, off):
    return pytest.approx(value, abs=off)


about = pytest.approx  # a share of the value


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """No test here is about the bootstrap's interval of the step at which ranks part."""
    monkeypatch.setattr(speed, "RESAMPLES", 200)


BOTH = dict.fromkeys(("ratio", "order"), "REFUTED")


@pytest.mark.parametrize(
    ("ratio", "cliff", "expected"),
    [
        *((1, math.inf, BOTH), (3, math.inf, BOTH | {"ten_times": "REFUTED"}), (6, math.inf, {})),
        (10, math.inf, dict.fromkeys(("ratio", "order", "ten_times"), "SUPPORTED")),
        (20, 3.0, {"ratio": "REFUTED"}),  # a cliff beyond the valley leaves the optimum
    ],
)
def test_planted_ratio_comes_back(ratio, cliff, expected):
    """The ratio, and what 10 times full fine-tuning's optimal LR costs LoRA."""
    valley, lora = planted.Valley(ratio, cliff=cliff), planted.FULL_BEST * ratio
    specs = arms(smoke(), (4, 8, 16), 1.2e-3, lora, seeds=range(5), steps=8)
    out, found = ask("lr_ratio", valley, specs)
    estimate = found["ratio"]["estimate"]
    assert estimate["low"] <= ratio <= estimate["high"]
    assert abs(math.log(estimate["value"] / ratio)) < math.log(1.15)
    assert all(c["low"] < c["best_lr"] < c["high"] for c in out["curves"])
    check(found, **expected)
    if "ten_times" in expected:
        lost = 0.16 * float(linex(np.array(math.log(10 / ratio)), valley.steep))
        estimate = found["ten_times"]["estimate"]
        assert estimate["low"] <= 100 * lost / (planted.START - 2.0) <= estimate["high"]


SPEED = {"measure": "speed", "of": {"rank": "top"}, "over": "full"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"measure": "sped"}, r"estimands.a: unknown measure 'sped'. Use one of: speed, "),
        ({"over": "fullft"}, r"estimands.a.over: unknown arm 'fullft'. Use one of: full, control"),
        ({"of": {"layer": "mlp"}}, r"estimands.a.of: unknown setting 'layer'"),
        ({"measure": "cost_at"}, r"estimands.a.times: None. Write a number, or law: \[g, k\]"),
        ({"times": {"law": 0.9}}, r"estimands.a.times: {'law': 0.9}"),
        ({"measure": "cost_at", "times": 0}, r"estimands.a.times: 0. Write .* all above 0"),
        ({"measure": "cost_at", "times": -10}, r"estimands.a.times: -10. Write"),
        ({"of": {"min_rank": 4}}, r"estimands.a.of: .* Only `of` with best_lr or lr_drift"),
        ({"measure": "best_lr", "over": {"min_rank": 4}}, r"estimands.a.over: .* Name one"),
        ({"of": "full"}, r"estimands.a: of and over are both 'full'. Name two arms"),
        ({"measure": ["speed"]}, r"estimands.a: unknown measure \['speed'\]"),
        ({"of": 5}, r"estimands.a.of: unknown arm 5. Use one of: full"),
        ({"optional": "no"}, r"estimands.a.optional: 'no'. Write true or false"),
        ({"pool": ["b"]}, r"estimands.a: unknown estimand 'b'. Use one of: a"),
        ({"marge": 1}, r"estimands.a: unknown key 'marge'"),
        ({"every_task": "b", "worst": "max"}, r"estimands.a: unknown"),
        (None, r"lr_ratio measures lr_ratio, .* not 'rho'"),  # a claim about an unknown estimand
    ],
)
def test_a_declaration_that_cannot_be_read_is_refused(changes, named):
    with pytest.raises(TableError, match=named):
        if changes:
            question_named("mine", {"a": {**SPEED, **changes}}, {})
        asked = planted.kept_question("lr_ratio", {"ratio": {"estimand": "rho", "margin": [0, 1]}})
        analyse(planted.planted_table(World(), arms(planted.base(), (4,), n=1, seeds=[0])), asked)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ("speed", r"estimands.b: 'speed'. Write measure, of and over"),
        (None, r"estimands.b: None. Write measure, of and over"),
        ({"every_task": "a"}, r"estimands.b.worst: None. Write max or min"),
        ({"every_task": "a", "worst": "most"}, r"estimands.b.worst: 'most'. Write max or min"),
        ({"every_task": "b", "worst": "max"}, r"estimands.b: unknown estimand 'b'. Use one of: a"),
    ],
)
def test_one_that_is_no_comparison_is_refused_without_a_traceback(said, named):
    with pytest.raises(TableError, match=named):
        question_named("mine", {"a": SPEED, "b": said}, {})


def test_a_comparison_of_ones_own_is_a_few_lines_of_a_sweeps_file():
    """Rank 4 against rank 8, over which no shipped question asks; both are those of a variant."""
    said = {"estimands": {"low": {**SPEED, "of": {"rank": 4}, "over": {"rank": 8}}}}
    claim = {"low": {"estimand": "low", "expected": 0.5, "margin": [0.4, 0.6]}}
    world, specs = World(lambda s: s.method.rank / 8), arms(smoke(), (4, 8), steps=64)
    table = planted.planted_table(world, specs)
    (v,) = analyse(table, {"analysis": "mine", "claims": claim, **said}).verdicts
    assert v.outcome == "SUPPORTED" and v.estimate.value == pytest.approx(0.5, rel=0.05)


def law_of_the_ratio(power):
    def best(spec, step):
        widths = (spec.model.hidden_size / 64) ** power
        return 1.6e-3 if is_full(spec) else 6.4e-3 * 32 / spec.method.alpha * widths

    specs = {}
    for model in ("tiny64-3m", "tiny64", "tiny64-s1", "tiny128-3m", "tiny128-4m", "tiny256-3m"):
        for alpha in (8.0, 32.0, 128.0):
            lora = {"lora": 6.4e-3 * 32 / alpha, "alpha": alpha, "seeds": range(3)}
            specs |= {s.id: s for s in arms(smoke(model), (4,), 1.6e-3, steps=16, **lora)}
    world = World(best=best, more=lambda s: {"retain_start": 2.0, "retain_nll": 2.1})
    return "lr_scale", world, specs.values()


def short_runs(factor):
    def best(spec, step):
        return FULL if is_full(spec) else LORA * (factor if step <= 24 else 1.0)

    def more(spec):
        norms = {"delta": 2.0} if is_full(spec) else {"a": 0.5, "b": 1.0, "delta": 3.0}
        return {"spectra": {"model.layers.0.q_proj": norms, "lm_head": norms}}

    return "short_runs", World(best=best, more=more), arms(smoke(), (4, 8), steps=384)


def of_rank(rho, *best):
    return World(lambda s: rho[s.method.rank], *best)


def rising(slope):
    return World(lambda s: 0.5 * s.method.rank ** (slope / math.log(2)))


BETWEEN = of_rank({1: 0.2, 4: 0.8}, lambda spec, step: 2.1e-3 if is_full(spec) else 4.4e-3)
"""Optima between tried LRs: 1.6e-3, 3.2e-3, 6.4e-3."""
LOWER = World(best=lambda s, t: FULL if is_full(s) else LORA / (1 + (planted.rank_of(s) == 1)))
GROWS = planted.lost(lambda s, step: 0.02 * math.log2(step) * (planted.rank_of(s) == 1))


def ranks(world, *of, **params):
    return "rank", world, planted.rank_runs(*of, **params)


def in_regime(world):
    return ranks(world, rule_shift=0.25, new_exceptions=0.0)


def small_batches(of_full, of_lora):
    """1,024 examples: batch 4 after 256 updates is the best, batch 64 after 16 the best above 32.
    `of_full` and `of_lora` are added at batches up to 32."""
    world = planted.lost(lambda s, t: (of_full if is_full(s) else of_lora) * (s.batch_size <= 32))
    return "batch_size", world, planted.batches((4,), {4: 256, 16: 64, 64: 16, 128: 8})


BEST_BATCH = GAIN * math.log2(257 / 17)


def layer_sets(attention):
    speeds = {"attention": attention, "mlp": 0.8, "attention+mlp": 0.82}
    return planted.layers(lambda s: speeds)


def attention_worse(attention, outcome):
    lost = math.log2((1 + 64 * 0.8) / (1 + 64 * attention))  # in doublings of the updates
    gap = near((lost - 0.05 * math.log2(1 + 64)) * GAIN, 0.03 * GAIN)
    found = {"attention_worse": (outcome, about(attention / 0.8, 0.05))}
    found |= dict.fromkeys(("mlp_is_enough", "mlp_loses_nothing"), "SUPPORTED")
    return found | {"attention_loses": (outcome, gap)}


def test_two_arms_are_also_compared_by_their_own_updates_to_one_loss():
    """All adapters slow down as t^-0.3: where attention's speed is 0.4 of the MLP's, the MLP is at
    attention's last loss (update 64) after a share of 0.4^(1 / 0.7) of the updates."""
    sweep, world, specs = layer_sets(0.32)
    world.falls = lambda t: t**-0.3 if t else 1.0
    out, found = ask(sweep, world, specs)
    speed = found["attention_worse"]["estimate"]["value"]
    name = ", counted directly"
    direct = {r["quantity"]: r["estimate"] for r in out["rows"] if name in r["quantity"]}
    assert speed == pytest.approx(0.4, rel=0.1)
    of_attention = direct[f"attention_over_mlp{name}"]
    assert of_attention["value"] == pytest.approx(0.4 ** (1 / 0.7), rel=0.1)
    assert of_attention["high"] < speed
    assert direct.keys() == {f"{of}{name}" for of in ("attention_over_mlp", "mlp_over_both")}


LENGTH, RANK = 96, 8


def forgets(rho, of_full):
    """LoRA forgets 0.2 nats, and full fine-tuning `of_full(spec)`."""

    def more(spec):
        return {"retain_nll": 2 + (of_full(spec) if is_full(spec) else 0.2), "retain_start": 2.0}

    common = {"steps": LENGTH}
    found = arms(smoke(), (RANK,), **common)
    found += runs(smoke(), LoRA(rank=RANK, alpha=2.0 * RANK), around(LORA), **common)
    for of in ("attention", "attention+mlp"):
        found += runs(smoke(), LoRA(rank=RANK, layers=of), around(2e-4), **common)
    original = LoRA(rank=RANK, alpha=1.0 * RANK, layers="attention")
    found += runs(smoke(), original, around(2e-4), schedule="linear", **common)
    few = planted.base(dataset="dialect_few")
    found += [s for r in (1, RANK) for s in runs(few, LoRA(rank=r), around(LORA), **common)]
    return "recipes", World(rho, more=more), found


DEFAULT_COST = planted.CURVATURE * math.log(2e-4 / LORA) ** 2 / (GAIN * math.log2(LENGTH + 1))
EQUAL = 2.0 ** -(planted.CURVATURE * math.log(4) ** 2 / GAIN)
"""rho at which LoRA learns what full fine-tuning does at a quarter of its optimal LR."""
B_BEHIND = 0.03
POWERS = {"rank": 0.0, "sqrt_rank": -0.5, "none": -1.0}
"""Of the rank, by the rule that scales an adapter: so the optimum changes."""
TWIN = {"alpha": 8.0, "init_scale": 2.0, "lr_b_ratio": 1.0}
"""The twin of alpha 32, init 1 and one LR by p = q = 2: both LRs are doubled."""


class Rules(World):
    """Under alpha / rank the optimum is free of the rank; B random is behind; twins agree."""

    def __init__(self, broken):
        def optimum(spec, step):
            return LORA * spec.method.rank ** POWERS[spec.method.scaling_by]

        super().__init__(lambda spec: 0.8, best=optimum)
        self.broken = broken

    def loss(self, spec, step):
        if spec.precision == "fp64":
            off = self.broken if spec.eps == 1e-8 and spec.method.init_scale != 1 else 1e-15
            return 3.0 - 0.1 * math.log2(1 + step) + off * spec.method.init_scale
        return super().loss(spec, step) + B_BEHIND * (spec.method.random_factor == "b")


def twin_runs():
    found = []
    for eps in (1e-30, 1e-8):
        common = {"precision": "fp64", "eps": eps, "steps": 16}
        found += runs(smoke(), LoRA(rank=4), [1e-3], [0], **common)
        found += runs(smoke(), LoRA(rank=4, **TWIN), [2e-3], [0], **common)
    return found


def rules(broken):
    specs = twin_runs()
    for rule, power in POWERS.items():
        for rank in (1, 4, 16):
            method = LoRA(rank=rank, scaling_by=rule)
            specs += runs(smoke(), method, around(LORA * rank**power), steps=64)
    specs += runs(smoke(), LoRA(rank=4, random_factor="b"), around(LORA), steps=64)
    return "invariance", Rules(broken), specs


def facts(bits):
    return planted.facts(lambda updates: bits)


def case(make, *args, **expected):
    return pytest.param(partial(make, *args), expected, id=make.__name__)


YES, NO = "SUPPORTED", "REFUTED"
TWINS = {"twins": YES, "rank_free": YES, "rank_free_root": near(-math.log(2) / 2, 0.05)}
NORMS = {"b_grows": pytest.approx(2.0), "same_movement": pytest.approx(1.5)}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        case(law_of_the_ratio, 0.0, hidden=(YES, near(0, 0.15)), alpha=YES),
        case(law_of_the_ratio, 1.0, hidden=(NO, near(1, 0.15)), alpha=YES),
        case(short_runs, 2.0, short_over_long=(YES, about(2, 0.15)), **NORMS),
        case(short_runs, 0.5, short_over_long=(NO, about(0.5, 0.15))),
        case(ranks, BETWEEN, (1, 4), 384, parity=near(0.8, 0.024)),
        case(ranks, rising(0.2), faster=(YES, near(0.2, 0.03)), alike="NO_CELL"),
        case(in_regime, rising(0.2), alike=(NO, near(0.2, 0.03)), faster="NO_CELL"),
        # A line over ln(1 + updates) is nearly one over ln(updates); ranks of one speed stay equal.
        case(in_regime, LOWER, rank_1_lower=near(2, 0.2), straight=near(1.1, 0.1)),
        case(ranks, GROWS, grows=(YES, near(0.02, 1e-3))),
        case(small_batches, 0.0, 0.0, small_best=(YES, near(BEST_BATCH, 5e-3))),
        case(small_batches, 0.0, 0.8, small_best=(NO, near(BEST_BATCH - 0.8, 5e-3))),
        case(small_batches, 0.8, 0.8, small_best=(NO, near(BEST_BATCH - 0.8, 5e-3))),
        case(layer_sets, 0.4, **attention_worse(0.4, YES)),
        case(layer_sets, 0.85, **attention_worse(0.85, NO)),
        # alpha_twice_rank: the same loss
        case(
            forgets,
            *(lambda s: 1.0 if s.method.rank == RANK else 0.6, lambda s: 0.5),
            **{"alpha_twice_rank": YES, "small_data_rank": NO, "retention": pytest.approx(0.4)},
            default_rate=(NO, about(DEFAULT_COST, 0.05)),
        ),
        # Full fine-tuning forgets more at a higher LR; where it has learned what LoRA learns, at a
        # quarter of its optimal LR, it has forgotten half of what LoRA has.
        case(
            forgets,
            *(lambda s: EQUAL, lambda s: 0.2 * math.sqrt(s.lr / FULL)),
            retention=about(1.0, 0.1),
            retention_equal=(NO, about(2.0, 0.1)),
        ),
        case(rules, 1e-3, **TWINS, breakers=YES, start_b=(NO, near(B_BEHIND, 1e-3))),
        case(rules, 1e-9, breakers=NO),
        case(facts, 2.0, two_bits=(YES, about(2, 0.05)), no_leak=YES),
        case(facts, 0.5, two_bits=(NO, about(0.5, 0.05))),
    ],
)
def test_what_is_planted_comes_back(make, expected):
    check(ask(*make())[1], **expected)


@pytest.mark.parametrize(("top", "outcome"), [(1.0, "SUPPORTED"), (0.5, "REFUTED")])
def test_parity_and_the_steps_from_which_ranks_are_behind(top, outcome):
    out, found = ask("rank", of_rank({1: 0.1, 4: 0.3, 8: top}), planted.rank_runs(steps=384))
    check(found, parity=(outcome, pytest.approx(top, rel=0.05)))
    check(found, start_popular="REFUTED")  # rank 1 is apart at once
    table = re.findall(r"\| (\d+) \| ([^|]+) \| [^|]+\|$", out["page"], re.MULTILINE)
    left = {
        r: [math.inf if ">" in v else float(v.strip("< ")) for v in s.split(",")] for r, s in table
    }
    assert max(left["1"]) <= min(left["4"])
    assert all(map(math.isinf, left["8"])) == (top == 1.0)


@pytest.mark.parametrize(("b", "outcome"), [(-0.1, "SUPPORTED"), (0.0, "REFUTED")])
def test_batch_penalty(b, outcome):
    """rho of 0.9 at batch 4, changing by exp(b) per doubling; half of it is lost in 64 updates."""
    world = World(
        lambda s: 0.9 * math.exp(b * math.log2(s.batch_size / 4)), falls=lambda t: t ** (-1 / 6)
    )
    out, found = ask("batch_size", world, planted.batches((1, 4)))
    check(found, penalty=(outcome, near(b, 0.02)), any_rank=("SUPPORTED", near(0, 0.03)))
    # at equal examples, a doubling of the batch halves the updates
    mine = [r for r in out["rows"] if r["quantity"] == "batch_effect_at_equal_examples"]
    at_examples = {r["rank"]: r["estimate"]["value"] for r in mine}
    assert at_examples == {r: near(b + math.log(2) / 6, 0.04) for r in (1, 4)}
    # 0.9 and falling: more than 5% of the gain
    check(found, below_32="REFUTED", below_256="no curve of batch 256")
    where = found["penalty"]["where"]
    assert "batches of 4 to 64 after 8 to 128 updates" in where["at"] and where["rank"] == 4


@pytest.mark.parametrize(
    ("doubling", "outcome"), [(-0.02, "SUPPORTED"), (0.02, "REFUTED"), (0.0, "UNDECIDED")]
)
def test_whether_the_gap_at_batch_32_shrinks(doubling, outcome):
    """The gap changes by `doubling` nats at each doubling of the updates, here from 32 to 128."""
    world = planted.lost(lambda s, t: (0.2 + doubling * math.log2(t / 32)) * (not is_full(s)))
    found_runs = planted.batches((4,), {32: 128, 512: 8})
    _, found = ask("large_batches", world, found_runs)
    check(found, shrinks=(outcome, near(2 * doubling, 3e-3)))
    assert found["shrinks"]["where"]["at"] == "rank 4, update 32 to 128"


def test_twins_are_compared_up_to_where_one_of_them_diverged_and_none_without_a_loss():
    proofs = planted.planted_table(Rules(1e-3), twin_runs())
    whole, result = invariance.Twins(proofs), json.loads(proofs.at[0, "result"])
    for last in (8, 0):  # the last step at which the first run was evaluated
        result["curve"] = [point for point in result["curve"] if point["step"] <= last]
        proofs.at[0, "result"] = json.dumps(result)
        fewer = invariance.Twins(proofs)
        assert (len(fewer.held) == len(whole.held)) == (last > 0)
        assert fewer.broken == whole.broken or not last


@pytest.mark.parametrize(("key", "value"), [("batch_size", 2), ("schedule", "cosine"), ("rank", 8)])
def test_twins_agree_in_all_settings_that_are_not_theirs(key, value):
    proofs = planted.planted_table(Rules(1e-3), twin_runs())
    whole, other = invariance.Twins(proofs), proofs.assign(**{key: value})
    other["run_id"] = other["run_id"] + "b"
    assert (
        len(invariance.Twins(pd.concat([proofs, other], ignore_index=True)).held)
        == 2 * len(whole.held)
        > 0
    )


READINGS = {
    "active": LoRA(rank=8, layers="mlp"),
    "all": LoRA(rank=8, layers="mlp", expert_rank="all"),
    "divided_alpha": LoRA(rank=8, layers="mlp", expert_alpha=16.0),
}


def test_variants_of_lora_are_compared_by_name():
    """`all` lies a tenth of the gain behind; a divided alpha has twice the optimal LR."""

    def optimum(spec, step):
        return FULL if is_full(spec) else LORA * (1 + (spec.method == READINGS["divided_alpha"]))

    gain = GAIN * math.log2(65)
    world = planted.lost(lambda s, t: 0.1 * gain * (s.method == READINGS["all"]), best=optimum)
    spec, one = smoke("tiny64-experts"), {"steps": 64}
    specs = arms(spec, (), **one)
    specs += [s for method in READINGS.values() for s in runs(spec, method, around(LORA), **one)]
    out, found = ask("experts", world, specs)
    check(found, all_experts=("REFUTED", near(0.05 * gain, 0.005 * gain)))
    two = pytest.approx(2, rel=0.15)
    check(found, same_scale=("REFUTED", two), ratio=("REFUTED", two), whole="no curve of whole")
    assert "| divided alpha |" in out["page"]
    twice = runs(spec, dataclasses.replace(READINGS["all"], rank=16), [LORA], **one)
    with pytest.raises(TableError, match=r"lora r8 \(experts: all\), and lora r16 .*: only one"):
        ask("experts", world, [*specs, *twice])


def test_parameters_and_operations_are_those_of_the_methods_and_bits_need_one_rank():
    """Effective parameters: r (m + n) - r^2 of the four attention matrices, each counted once."""
    spec = dataclasses.replace(planted.base(), method=LoRA(rank=1, layers="attention"))
    assert capacity.effective(spec.plain()) == 4 * (127 + 79 + 79 + 127)
    assert capacity.bits(0.0, 10) == pytest.approx(160) and capacity.bits(math.log(16), 10) == 0
    spec = planted.base("smollm2-135m-instruct")
    for method in (LoRA(rank=1), LoRA(rank=16)):
        found = lengths.flops_ratio(spec.plain(), method.n_trainable(spec.model))
        lora, full = (m.step_flops(spec.model, 100) for m in (method, FullFT()))
        assert found == pytest.approx(lora / full)
    sweep, world, specs = facts(2.0)
    other = runs(specs[0], LoRA(rank=4, layers="attention"), [1e-2], steps=400)
    with pytest.raises(TableError, match=r"lora r1, and lora r4 .*: only one"):
        ask(sweep, world, [*specs, *other])


@pytest.mark.parametrize(
    ("rho", "shift", "updates", "length", "expected"),
    [
        (1.0, 1.0, 1.0, 96, {"flops_to_loss": "SUPPORTED"}),
        (0.5, 1.0, 2.0, 192, {"flops_to_loss": "REFUTED"}),  # reached just after update 128
        (0.2, 1.0, 256 / 51, 384, {}),  # the last evaluation before the end: 256
        # At the optimum of whole runs, LoRA would need three quarters more updates.
        (1.0, 4.0, 1.0, 96, {}),
    ],
)
def test_compute(rho, shift, updates, length, expected):
    """LoRA reaches full fine-tuning's loss after 64 of 384 updates; up to 96, its optimum is shifted.

    An update of full fine-tuning takes 0.1 s and one of LoRA 0.07 s, or up to 2% longer."""

    def best(spec, step):
        return FULL if is_full(spec) else LORA * (shift if step <= 96 else 1.0)

    def seconds(spec):
        noise = np.random.default_rng(int(spec.id, 16)).uniform(1.0, 1.02)
        return {"step_s": (0.1 if is_full(spec) else 0.07) * noise}

    world = World(lambda s: rho, best, seconds)
    out, found = ask("compute", world, arms(smoke(), (1,), steps=384))
    assert re.search(rf"\| 1 \| .* \| {length} \| ", out["page"])
    to_loss, per_step = (found[k]["estimate"]["value"] for k in ("flops_to_loss", "flops_a_step"))
    assert to_loss / per_step == pytest.approx(updates, rel=0.08)
    took = pytest.approx(0.7 * updates, rel=0.1)
    check(found, seconds_a_step="SUPPORTED", seconds_to_loss=took, **expected)


@pytest.mark.parametrize("name", ["batch_size-tiny", "compute-tiny", "layers-small"])
def test_the_order_of_a_tables_rows_changes_no_number(name):
    table, asked = planted.kept_answer(planted.answer.KEPT / name)
    other = table.sample(frac=1, random_state=1).reset_index(drop=True)
    verdicts = (analyse(t, asked).verdicts for t in (table, other))
    for a, b in zip(*verdicts, strict=True):
        one, two = a.estimate.plain(), b.estimate.plain()
        assert (a.claim, a.outcome, one.keys()) == (b.claim, b.outcome, two.keys())
        ends = [[e[k] for k in ("value", "low", "high")] for e in (one, two)]
        assert ends[0] == pytest.approx(ends[1], rel=1e-9)

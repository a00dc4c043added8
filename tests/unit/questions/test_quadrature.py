"""The law of learning rates, and the question that asks it: estimands, rule, and power."""

import dataclasses
import json
import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest

from analysis.inference.decide import LOOK_LEVELS, judge
from analysis.measures import laws
from analysis.measures.next_runs import suggest
from analysis.questions import quadrature
from analysis.questions.quadrature import COUNTED, FROZEN, AllCells, Cell
from analysis.questions.registry import analyse
from analysis.report import report
from analysis.runs.table import read
from lorasweep.config.compose import compose_request
from lorasweep.sweep.request import question
from tests.planted import World, is_full, planted_table
from tests.world import ROOT

FULL = {64: 4e-4, 128: 5e-4, 256: 4e-4, 576: 9.9e-5}


def test_the_law_its_limits_and_its_inverses():
    assert (laws.G, laws.K) == (0.86, 4.2) and laws.LINEAR == (1.0, 3.4, 0.55)  # frozen
    for hidden, alpha, steps, full in (
        (64, 4, 256, 3e-4),
        (576, 64, 30, 1e-4),
        (128, 1024, 32, 7e-4),
    ):
        ratio = laws.ratio(hidden, alpha, steps, full)
        z = laws.movement(hidden, ratio * full, steps)
        assert ratio == pytest.approx(laws.limit(hidden, alpha) / math.hypot(1, z))
        q = laws.movement(hidden, full, steps)  # the formula as published
        square = (math.sqrt(1 + 4 * (q * laws.limit(hidden, alpha)) ** 2) - 1) / (2 * q * q)
        assert ratio == pytest.approx(math.sqrt(square), rel=1e-6)
        assert laws.full_lr(hidden, alpha, steps, ratio * full) == pytest.approx(full)
        other = laws.ratio(hidden, 16, steps, full) * full
        assert laws.carried(hidden, alpha, 16, steps, ratio * full) == pytest.approx(other)
    for alpha, power in ((1e-9, -0.5), (1e9, -1)):
        low, high = (laws.ratio(128, a, 512, 4.5e-4) for a in (alpha, 2 * alpha))
        assert math.log2(high / low) == pytest.approx(power, abs=1e-3)
    # no difference of nearly equal numbers at any alpha, and any shape of rates
    assert laws.ratio(64, 1e9, 256, np.full(3, 3e-4)) == pytest.approx([laws.limit(64, 1e9)] * 3)
    linear = laws.ratio(64, 4, 256, 3e-4, laws.LINEAR_LAW)
    start, moved = math.sqrt(3) * 64 / 4, 3.4 * 64 * 3e-4 * 2**0.55
    assert linear * (1 + moved * linear) == pytest.approx(start)
    assert laws.ratio(1, 1, 1, 1.0, "power law") == pytest.approx(math.exp(2.020298114))


class ByLaw(World):
    """Optima by a law; LoRA loses `lost` nats at z below 0.1."""

    def __init__(self, law=laws.LAW, off=1.0, frozen=1.0, lost=0.0):
        super().__init__(rho=lambda spec: 1.0, best=self.optimum)
        self.law, self.off, self.frozen, self.lost = law, off, frozen, lost

    def optimum(self, spec, step):
        hidden, m = spec.model.hidden_size, spec.method
        full = FULL[hidden] * math.sqrt(256 / spec.steps)
        if is_full(spec):
            return full
        if m.lr_b_ratio > 1:
            return full * laws.limit(hidden, m.alpha) / m.lr_b_ratio * self.off * self.frozen
        return full * laws.ratio(hidden, m.alpha, spec.steps, full, self.law) * self.off

    def loss(self, spec, step):
        z = laws.movement(spec.model.hidden_size, self.optimum(spec, step), spec.steps)
        still = not is_full(spec) and spec.method.lr_b_ratio == 1 and z < quadrature.STILL
        return super().loss(spec, step) + self.lost * still


def runs_of(world, scale="tiny", keep=lambda spec: True):
    """The sweep's runs with three seeds each, their grids moved near the planted optima."""
    curves = defaultdict(list)
    for p in compose_request(["+sweep=quadrature", f"scale={scale}"]).points:
        s = p.spec
        if keep(s):
            at = (s.model.name, s.dataset.name, s.steps, s.batch_size, repr(s.method))
            curves[at].append(s)
    for specs in curves.values():
        middle = math.exp(np.mean([math.log(s.lr) for s in specs]))
        for s in specs:
            lr = s.lr / middle * 1.2 * world.optimum(s, s.steps)
            yield from (dataclasses.replace(s, lr=lr, seed=seed) for seed in (140, 141, 142))


def answer(world, scale="tiny", keep=lambda spec: True, kept=None):
    """Results of the sweep on planted runs, verdicts by claim, and the table."""
    asked = question(compose_request(["+sweep=quadrature", f"scale={scale}"]))
    table = planted_table(world, runs_of(world, scale, keep))
    found = analyse(table, asked, kept)
    results = json.loads(json.dumps(report.results_of(found, asked, table), allow_nan=False))
    results["page"] = page = report.render(found, asked, table)
    assert ("New conditions" in page) == bool(results["rows"])
    assert "](../" not in page  # it may lie in any folder
    return results, {v["claim"]: v for v in results["verdicts"]}, table


def test_planted_runs_of_both_scales_give_back_the_law(tmp_path):
    _, alone, small = answer(ByLaw(), "small")
    assert alone["predicts"]["gates"][0]["code"] == "FEW_CONDITIONS"
    (tmp_path / "quadrature-small").mkdir()
    small.to_parquet(tmp_path / "quadrature-small" / "table.parquet")
    (tmp_path / "quadrature-tiny").mkdir()
    answer(ByLaw(lost=0.05))[2].to_parquet(tmp_path / "quadrature-tiny/table.parquet")
    results, found, _ = answer(ByLaw(lost=0.05), kept=tmp_path)
    by_law = [r for r in results["rows"] if r["quantity"].startswith("measured_over_law")]
    assert len(by_law) == COUNTED + FROZEN
    assert {k: v["outcome"] for k, v in found.items()} == dict.fromkeys(found, "SUPPORTED")
    assert "Yes: on 11 bases (all new" in results["page"]  # of both scales
    value = {k: v["estimate"]["value"] for k, v in found.items()}
    assert value["predicts"] < 0.05 and value["form"] == pytest.approx(1, abs=0.2)
    assert value["frozen"] == pytest.approx(-math.log(1.2), abs=0.04)
    assert value["carried"] < 0.2 and value["moving"] < 0.2
    assert value["still"] == pytest.approx(5 / 1.12, abs=0.5)  # of a gain of 1.12 nats
    by = {(r["quantity"], r.get("arm")): r["estimate"]["value"] for r in results["rows"]}
    assert by["rms_error", "linear law"] > 2 * value["predicts"]
    costs = [by["carried_cost", k] for k in (laws.LAW, "1/sqrt(alpha)", "1/alpha", "kept")]
    assert costs == sorted(costs)
    assert by["cost_from_full", laws.LAW] < 0.2 < 5 < by["cost_from_full", "10 times"]
    frozen = [r["estimate"]["value"] for r in by_law if r["quantity"].endswith("A frozen")]
    assert frozen == pytest.approx([1.0] * FROZEN, rel=0.05)
    # the smaller scale's answer leaves the verdict to the other
    mine, elsewhere, _ = answer(ByLaw(), "small", kept=tmp_path)
    assert mine["rows"] == []
    assert {v["gates"][0]["code"] for v in elsewhere.values()} == {"ELSEWHERE"}


def test_what_is_not_so_is_not_supported():
    _, found, _ = answer(ByLaw(laws.LINEAR_LAW, off=1.3, frozen=1.5))
    assert found["predicts"]["estimate"]["value"] > 0.2
    assert found["form"]["estimate"]["value"] == pytest.approx(0, abs=0.2)
    assert found["frozen"]["estimate"]["low"] > 0
    assert found["still"]["estimate"]["value"] == pytest.approx(0, abs=0.3)
    gates = {g["code"] for v in found.values() for g in v["gates"]}
    assert gates == {"FEW_CONDITIONS"}  # those of SmolLM2 are missing


def test_a_grid_with_its_optimum_at_an_edge_is_extended_although_no_condition_is_known():
    world = ByLaw()
    specs = list(runs_of(world, "small"))
    world.best = lambda spec, step: 12e-4 if is_full(spec) else world.optimum(spec, step)
    asked = question(compose_request(["+sweep=quadrature", "scale=small"]))
    assert suggest(analyse(planted_table(ByLaw(), specs), asked)) == []  # only bases decide more
    table = planted_table(world, specs)
    found = analyse(table, asked)
    codes = {v.gates[0].code.name for v in found.verdicts}
    assert codes == {"FLAGGED"} and not found.rows
    assert "missing arm" not in report.render(found, asked, table)
    wanted = suggest(found)
    assert {s.curve.name for s in wanted} == {"fullft"} and len(wanted) == 2


def planted_cells(
    rng, law=laws.LAW, base_sd=0.04, unit_sd=0.03, cell_sd=0.05, noise=0.055, off=0.0
):
    """Conditions like the sweep's with a known law and errors of ln(ratio), and those with A frozen."""
    alphas = (0.125, 4, 32, 256, 1024)
    units = [(f"64-{k}", 64, 256, alphas, True) for k in range(6)]
    units += [(f"128-{k % 3}", 128, 256, alphas, True) for k in range(4)]
    units += [("256", 256, 256, alphas, False), ("576", 576, 30, (2, 64), False)]
    units += [("64-0", 64, t, (4, 256), False) for t in (32, 512, 1024)]
    units += [("128-0", 128, 32, (4, 256), False)]
    of_base, cells = {u[0]: rng.normal(0, base_sd) for u in units}, []

    def optimum(log):
        return SimpleNamespace(best_lr=SimpleNamespace(value=math.exp(log)))

    for k, (name, hidden, steps, tried, frozen) in enumerate(units):
        full = math.log(FULL[hidden]) + rng.normal(0, 0.2)
        seen, own = optimum(full + rng.normal(0, noise)), of_base[name] + rng.normal(0, unit_sd)
        for alpha, b in [*((a, 1.0) for a in tried), *[(4, 1e4)] * frozen]:
            limit = laws.limit(hidden, alpha)
            ratio = laws.ratio(hidden, alpha, steps, math.exp(full), law) if b == 1 else limit
            lora = (
                full + math.log(ratio / b) + own + off + rng.normal(0, math.hypot(cell_sd, noise))
            )
            cells.append(Cell(name, f"{name} {k}", hidden, alpha, steps, b, seen, optimum(lora)))
    free, frozen = ([c for c in cells if (c.b_ratio > 1) == f] for f in (False, True))
    return AllCells("all", None, [], free, frozen, [])


SWEEP = compose_request(["+sweep=quadrature", "scale=smoke"]).sweep


@pytest.mark.parametrize(
    ("truth", "least"),
    [
        ({}, {"predicts": 0.45, "form": 0.65, "frozen": 0.8}),
        ({"law": laws.LINEAR_LAW}, {"predicts": -0.35, "form": -0.0}),
        ({"base_sd": 0.15, "off": 0.05}, {"predicts": -0.1}),
        ({"off": 0.2}, {"predicts": -0.0, "frozen": -0.1}),
    ],
)
def test_what_the_rule_decides(truth, least):
    """At least this share of simulated sweeps is SUPPORTED; at most, if it is negative or -0."""
    rng, of = np.random.default_rng(0), {e.name: e for e in quadrature.QUESTION.estimands}
    won = dict.fromkeys(least, 0)
    for _ in range(20):
        c = planted_cells(rng, **truth)
        for name in least:
            claim = SWEEP.claims[name]
            asked = {"margin": claim.margin, "expected": claim.expected}
            e = of[claim.estimand]
            v = judge(name, asked, "", e.measure(c), [], 0, e.log, LOOK_LEVELS[SWEEP.rounds])
            won[name] += v.outcome == "SUPPORTED"
    for name, share in least.items():
        assert won[name] / 20 >= share if math.copysign(1, share) > 0 else won[name] / 20 <= -share


def test_intervals_leave_out_one_base_with_all_of_its_conditions():
    cells = planted_cells(np.random.default_rng(1)).cells
    e = quadrature.over_bases(cells, quadrature.rms, log=True)
    bases = {c.base for c in cells}
    whole = math.log(quadrature.rms(cells))
    each = [math.log(quadrature.rms([c for c in cells if c.base != b])) for b in bases]
    values = [len(bases) * whole - (len(bases) - 1) * v for v in each]
    assert math.log(e.value) == pytest.approx(np.mean(values), abs=1e-3)
    assert e.spread.of == "bases" and e.n == len(bases)
    one = quadrature.over_bases([c for c in cells if c.base == "256"], quadrature.form)
    assert one.value is None and one.draws is None  # one base, and no condition at rest


def test_the_interval_of_an_rms_error_holds_the_truth_as_often_as_it_says():
    """Also where bases differ more than conditions: Student's with all degrees of freedom held 90%."""
    rng, truth = np.random.default_rng(2), {"base_sd": 0.15, "off": 0.05}
    many = [planted_cells(rng, **truth).cells for _ in range(250)]
    true = np.mean([quadrature.rms(cells) ** 2 for cells in many]) ** 0.5
    found = (quadrature.over_bases(cells, quadrature.rms, log=True) for cells in many)
    ends = [np.quantile(e.draws, [0.0145, 0.9855]) for e in found]
    assert np.mean([low <= true <= high for low, high in ends]) >= 0.955


def test_constants_are_fitted_to_the_other_bases():
    """An error that all bases share is fitted; one base that alone is off by a factor is not."""
    exact = {"base_sd": 0, "unit_sd": 0, "cell_sd": 0, "noise": 0}
    of = planted_cells(np.random.default_rng(3), **exact, off=0.3).cells
    assert quadrature.rms(of) == pytest.approx(0.3)
    assert quadrature.refitted(of, laws.LAW) < 0.03
    assert quadrature.refitted(of, laws.LINEAR_LAW) > 0.06
    assert quadrature.refitted(of[:5], laws.LAW) is None  # one base


def test_kept_runs_of_the_other_scale_join_the_shipped_grid_alone():
    kept = ROOT / "analysis/results"
    asked = json.loads((kept / "quadrature-tiny/question.json").read_text())
    table = read(kept / "quadrature-tiny/table.parquet")
    mine = table[(table["model"] == "tiny128") & (table["dataset"] == table["dataset"].iloc[0])]
    mine = mine.assign(model="mine", dataset="rows")
    for scale in ("tiny", "small"):
        found = analyse(mine, {**asked, "scale": scale}, kept)
        assert {r.base for r in found.rows} == {"mine"}
        assert all("conditions" in v.why for v in found.verdicts)  # too few of them


def test_the_scope_of_a_table():
    key = {"method": "lora", "rank": 8, "alpha": 16, "layers": "attention+mlp"}
    assert laws.outside(key) == laws.outside({**key, "schedule": "constant", "start": None}) == ""
    assert laws.outside({"method": "fullft", "rank": math.nan, "layers": "attention+mlp"}) == ""
    assert laws.alpha_of(key) == 16 and laws.alpha_of({**key, "scaling_by": "none"}) == 128
    others = ({"schedule": "linear"}, {"rank": 2}, {"layers": "mlp"}, {"start": "b"})
    others += ({"objective": "rl_is"}, {"expert_rank": "active"}, {"method": "dora"})
    for other in others:
        assert laws.outside({**key, **other})


def test_noise_is_the_variance_of_the_difference():
    draws = np.tile([-0.1, 0.1], 50)
    full = SimpleNamespace(
        best_lr=SimpleNamespace(log_draws=np.full(100, math.log(5e-4)), value=5e-4)
    )
    lr = math.exp(math.log(5e-4) + math.log(laws.ratio(128, 8, 512, 5e-4)))
    lora = SimpleNamespace(best_lr=SimpleNamespace(log_draws=math.log(lr) + draws, value=lr * 1.2))
    cell = Cell("a", "a", 128, 8, 512, 1.0, full, lora)
    assert cell.noise(laws.LAW) == pytest.approx(0.01)
    assert quadrature.rms([cell]) == pytest.approx(math.log(1.2))
    assert quadrature.rms([cell], noise=False) == pytest.approx(
        math.sqrt(math.log(1.2) ** 2 - 0.01)
    )

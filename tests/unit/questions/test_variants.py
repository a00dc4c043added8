"""The question `variants`: verdicts of planted methods, reversals, and their rate by chance."""

import dataclasses
import json
import math
import re

import numpy as np
import pandas as pd
import pytest

from analysis.measures import laws
from analysis.measures.at_best import AtBest
from analysis.questions import variants
from analysis.questions.registry import analyse
from analysis.report import report
from analysis.runs.table import TableError
from lorasweep.config.compose import compose_request
from lorasweep.sweep.grid import second_stage
from lorasweep.sweep.request import question
from tests.planted import GAIN, World, check, is_full, planted_table

ONE = GAIN * math.log2(257) / 100
"""One percent of the gain, in nats."""


def name_of(spec):
    if is_full(spec):
        return "full"
    return "plus" if getattr(spec.method, "lr_b_ratio", 1) > 1 else spec.method.name


class Methods(World):
    """`behind`: method -> percent of the gain that it loses; optima `lower` than LoRA's."""

    lower = {"lora": 1.0, "dora": 1.0, "pissa": 5.0, "plus": 9.0}

    def __init__(self, **behind):
        super().__init__(rho=lambda spec: 1.0, best=self.optimum)
        self.behind = behind

    def optimum(self, spec, step):
        rules = spec.dataset.generator_params["rule_shift"] > 0
        name, lora = name_of(spec), 1.25e-3 if rules else 2.5e-3
        return (3.2e-4 if rules else 9.3e-4) if name == "full" else lora / self.lower[name]

    def loss(self, spec, step):
        return super().loss(spec, step) + ONE * self.behind.get(name_of(spec), 0.0)


REQUEST = compose_request(["+sweep=variants", "scale=tiny"])


def specs_of(world, keep=lambda spec: True):
    """The runs of both stages of the sweep."""
    more = second_stage(REQUEST.points, REQUEST.sweep.replicate, _loss(world))
    return [p.spec for p in (*REQUEST.points, *more) if keep(p.spec)]


def one_seed(spec):
    """Whether a run is not one of LoRA+ at a shared learning rate with a fresh seed."""
    return spec.seed == 160 or name_of(spec) != "plus" or spec.lr < 3e-4


def answer(world, keep=lambda spec: True):
    """Results of both stages of the sweep on planted runs, and verdicts by claim."""
    table = planted_table(world, specs_of(world, keep))
    asked = question(REQUEST)
    found = analyse(table, asked)
    results = json.loads(json.dumps(report.results_of(found, asked, table), allow_nan=False))
    results["page"] = report.render(found, asked, table)
    return results, {v["claim"]: v for v in results["verdicts"]}


def _loss(world):
    by_id = {p.id: p.spec for p in REQUEST.points}
    return lambda run: v if math.isfinite(v := world.nll(by_id[run])) else None


def shared(results, pair):
    """A pair's differences at the shared learning rates."""
    mine = [r for r in results["rows"] if r["arm"] == pair and ", at" in r["quantity"]]
    return [r["estimate"] for r in mine]


def test_methods_that_are_equal_when_tuned_are_equal_and_not_reversed():
    results, found = answer(Methods())
    check(found, dora="SUPPORTED", pissa="SUPPORTED", plus="SUPPORTED", reversed="REFUTED")
    assert found["dora"]["estimate"]["value"] == pytest.approx(0, abs=0.05)
    apart = [e["value"] for e in shared(results, "LoRA+ - LoRA")]
    # at a quarter of LoRA's best rate LoRA is two doublings off, and LoRA+ one
    off = [math.log(v) for v in (3e-4 / 1.25e-3, 6.5e-4 / 2.5e-3, 9 * 3e-4 / 1.25e-3, 9 * 0.26)]
    at_quarter = 0.06 * (np.square(off[2:]).mean() - np.square(off[:2]).mean()) / ONE
    assert apart[0] == pytest.approx(at_quarter, abs=0.1) and apart[0] < -3 < 10 < apart[1]
    # the law stands beside LoRA+'s ratio, which counts B's rate
    expected = laws.ratio(128, 32, 256, 3.2e-4, b_ratio=16)
    row = next(
        line
        for line in results["page"].splitlines()
        if "LoRA+ |" in line and "of the rules" in line
    )
    said = [float(v.split()[0]) for v in row.split(" | ")[3:5]]
    assert said[0] == pytest.approx(16 * 1.25e-3 / 9 / 3.2e-4, rel=0.05)
    assert said[1] == pytest.approx(expected, rel=0.05)


def test_a_shared_rate_that_puts_two_methods_in_the_other_order_counts():
    results, found = answer(Methods(pissa=-3.0, plus=2.0))
    check(found, dora="SUPPORTED", pissa="REFUTED", plus="REFUTED", reversed="SUPPORTED")
    order = dict(re.findall(r"\| (\S+ - \S+) \|.*\| ([a-z ]+) \|$", results["page"], re.MULTILINE))
    assert order["PiSSA - LoRA"] == order["LoRA+ - LoRA"] == "reversed"
    # PiSSA is better than LoRA+ wherever they are compared, and DoRA is LoRA
    assert order["LoRA+ - PiSSA"] == order["DoRA - LoRA"] == "not reversed"
    n = found["reversed"]["estimate"]["value"]
    assert n == list(order.values()).count("reversed") == 4  # with DoRA, too


def test_what_is_missing_or_not_shared_gets_no_verdict():
    _, found = answer(Methods(), lambda s: name_of(s) != "dora" or s.method.rank == 4)
    check(found, dora="MISSING", reversed="MISSING")
    only_rules = {"rule_shift": 0.25}.items()
    _, found = answer(Methods(), lambda s: only_rules <= s.dataset.generator_params.items())
    check(found, plus="FEW_CONDITIONS")
    table = planted_table(Methods(), specs_of(Methods()))
    rules = table[table["dataset"].str.contains("rule_shift=0.25")]
    more = rules.dropna(subset=["rank"])  # four cells, but of one data set
    more = more.assign(rank=2 * more["rank"], run_id=more["run_id"] + "x")
    found = analyse(pd.concat([rules, more]), question(REQUEST)).verdicts
    assert all("only 2 of 4 (two data sets at two ranks) conditions" in v.why for v in found)
    edge = Methods()
    edge.lower = {**Methods.lower, "pissa": 100.0}
    _, found = answer(edge)
    check(found, pissa="FLAGGED", dora="SUPPORTED", reversed="FLAGGED")
    assert "PiSSA, " in found["pissa"]["why"] and "rank 4: at_edge" in found["pissa"]["why"]
    runs = planted_table(Methods(), [p.spec for p in REQUEST.points])
    for part, kind in (
        (runs["method"] == "dora", "dora r4"),
        (runs["method"] == "fullft", "fullft"),
    ):
        twice = pd.concat([runs, runs[part].assign(weight_decay=0.1)])
        with pytest.raises(TableError, match=f"{kind}, weight_decay 0, and {kind}, weight_decay"):
            analyse(twice, question(REQUEST))
    for key, other in (("model", "tiny64"), ("steps", 64), ("batch_size", 4)):
        with pytest.raises(TableError, match=f"{key}=.*{other}: only one can be judged"):
            analyse(pd.concat([runs, runs.assign(**{key: other})]), question(REQUEST))
    _, found = answer(Methods(), one_seed)
    check(found, reversed="NOT_SHARED", dora="SUPPORTED")


def test_a_users_method_of_any_name_is_not_taken_for_ours():
    assert variants.method_of({"method": "plus"}) == variants.method_of({"method": "olora"}) == ""
    assert variants.method_of({"method": "lora", "lr_b_ratio": 16.0}) == "plus"


def test_a_diverged_run_counts_with_the_loss_before_training():
    world, nll = Methods(), Methods().nll
    world.nll = lambda s: math.nan if name_of(s) == "pissa" and s.lr > 1e-3 else nll(s)
    results, found = answer(world)
    worse = shared(results, "PiSSA - LoRA")[1]
    assert worse["value"] == pytest.approx(100, abs=2) and worse["low"] > 95
    check(found, dora="SUPPORTED")


def planted_looks(rng, tuned, shared, sd=0.3, error=0.1, looks=(5, 10), draws=20):
    """Orders at two looks of methods with these true losses, in %; `error`: of a best LR, in all seeds."""
    own, half = rng.normal(0, 1, max(looks)), math.sqrt(0.5)

    def differences(truth, error):
        by_name = {}
        for name, loss in zip(variants.METHODS, truth):
            noise = rng.normal(0, sd * half, len(own)) + rng.normal(0, error * half)
            by_seed, moved = own + loss + noise, rng.normal(0, error * half, draws if error else 0)
            seen = (dict(enumerate(by_seed + m)) for m in (0, *moved))
            by_name[name] = AtBest(next(seen), tuple(seen))
        return {(a, b): by_name[a].minus(by_name[b]) for a, b in variants.PAIRS}

    each = [differences(tuned, error), *(differences(s, 0.0) for s in shared)]
    for n in looks:
        first = lambda v, n=n: {s: v[s] for s in range(n)}  # noqa: E731
        yield variants.orders(*({pair: d.each(first) for pair, d in of.items()} for of in each))


FAR = ([0, 3, 6, 9], [0, -3, -6, -9])
"""Shared learning rates that decide every pair, one each way."""


@pytest.mark.parametrize(
    ("tuned", "shared", "looks", "least", "most"),
    [
        ([0, 0, 0, 0], FAR, (5, 10), 0.0, 0.1),  # any decided pair is wrong: 4% of many
        (FAR[0], ([0, 0, 0, 0],) * 2, (5, 10), 0.0, 0.1),
        ([0, 0, -1, 0.5], ([8, 8, -1, -2], [0, 0, 6, 9]), (5,), 0.9, 1.0),
    ],
)
def test_reversals_by_chance_and_by_truth(tuned, shared, looks, least, most):
    rng, n, won = np.random.default_rng(0), 30, 0
    for _ in range(n):
        found = planted_looks(rng, tuned, shared, looks=looks)
        won += any(o.said == "reversed" for of in found for o in of.values())
    assert least <= won / n <= most


def test_the_law_of_a_learning_rate_of_b():
    hidden, alpha, steps, full = 128, 32, 256, 9.3e-4
    r = laws.ratio(hidden, alpha, steps, full, b_ratio=16)
    z = laws.movement(hidden, r * full / 16, steps)  # of A's rate
    assert r == pytest.approx(laws.limit(hidden, alpha) / math.hypot(1, z))
    frozen = laws.ratio(hidden, alpha, steps, full, b_ratio=1e6)
    assert frozen == pytest.approx(laws.limit(hidden, alpha))
    assert laws.ratio(hidden, alpha, steps, full, b_ratio=1) == laws.ratio(
        hidden, alpha, steps, full
    )


def test_every_method_has_a_name():
    specs = {p.arm.removeprefix("shared_"): p.spec for p in REQUEST.points}
    table = planted_table(Methods(), specs.values())
    named = dict(zip(specs, map(variants.method_of, table.to_dict("records"))))
    assert named == {"full": "", **{m: m for m in variants.METHODS}}
    other = dataclasses.replace(specs["lora"].method, lr_b_ratio=0.5)
    assert variants.method_of({"method": "lora", "lr_b_ratio": other.lr_b_ratio}) == "lora"

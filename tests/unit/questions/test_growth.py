"""Comparisons by `where`, and differences, on planted runs: what was planted comes back."""

import dataclasses
import functools
import math

import numpy as np
import pytest

from analysis.inference.rows import pick, rows_of
from analysis.questions import registry
from analysis.questions.cells import minus
from analysis.questions.estimands import question_of
from analysis.runs.table import TableError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from tests import planted
from tests.planted import FULL, LORA, World, around, ask, check, is_full, planted_table, runs, smoke

BOTH = ("constant", "cosine")
SAME = {("constant", 8): -0.01, ("constant", 64): 0.03, ("cosine", 8): 0.0, ("cosine", 64): 0.04}
LESS = {**SAME, ("cosine", 64): 0.01}


class Behind(World):
    """LoRA lies a share of full fine-tuning's gain behind it: `of` (schedule, updates)."""

    def __init__(self, of):
        super().__init__(lambda spec: 1.0)
        self.of = of

    def loss(self, spec, step):
        whole = planted.START - super().loss(dataclasses.replace(spec, lr=self.best(spec, 0)), step)
        share = 0 if is_full(spec) else self.of[spec.schedule, spec.steps]
        return super().loss(spec, step) + share * whole


class Noisy(Behind):
    """Each run has an error of its own."""

    def loss(self, spec, step):
        own = np.random.default_rng(int(spec.id, 16)).normal(0, 2e-3)
        return super().loss(spec, step) + own


def specs(schedules=BOTH, seeds=range(6), rank=4, lengths=(8, 64)):
    cells = [(s, n) for s in schedules for n in lengths]
    arms = ((FullFT(), FULL), (LoRA(rank=rank), LORA))
    more = [functools.partial(runs, smoke(), schedule=s, steps=n) for s, n in cells]
    return [spec for run in more for m, lr in arms for spec in run(m, around(lr, 5), seeds)]


def test_growth_by_schedule_is_measured_in_percent_of_the_gain():
    out, found = ask("growth", Behind(SAME), specs())
    check(found, same="SUPPORTED", grows="SUPPORTED", grows_constant="SUPPORTED")
    assert found["same"]["estimate"]["value"] == pytest.approx(0, abs=0.3)
    assert found["grows"]["estimate"]["value"] == pytest.approx(4, abs=0.3)
    check(found, none_at_end="SUPPORTED")
    assert "| lora r4, cosine | 64 |" in out["page"]
    assert out["figures"][-1][0] == "regret.png" or "regret.png" in out["page"]


def test_growth_is_measured_from_length_to_length_so_that_a_lost_lead_is_told_from_later_losses():
    lead = {(s, n): v for s in BOTH for n, v in ((8, -0.05), (16, 0.0), (64, 0.01))}
    out, _ = ask("growth", Behind(lead), specs(lengths=(8, 16, 64)))
    every = rows_of(out, {"claims": {}})
    found = {(r.arm, r.updates, r.at): r.estimate for r in pick(every, "regret_growth_percent")}
    wanted = {(16, "since 8 updates"): 5, (64, "since 16 updates"): 1}
    assert {k: pytest.approx(e.value, abs=0.3) for k, e in found.items()} == {
        (f"lora r4, {s}", *k): v for s in BOTH for k, v in wanted.items()
    }
    last = next(k for k in out["page"].splitlines() if k.startswith("| lora r4, cosine | 16 |"))
    assert "growth since fewer updates" in out["page"] and last.split(" | ")[-1][0] in "45"


def test_a_smaller_growth_under_a_decaying_rate_refutes_that_it_is_the_same():
    _, found = ask("growth", Behind(LESS), specs())
    check(found, same="REFUTED", grows="SUPPORTED")
    assert found["same"]["estimate"]["value"] == pytest.approx(-3, abs=0.3)


def test_without_one_schedule_or_with_two_ranks_there_is_no_answer():
    _, found = ask("growth", Behind(SAME), specs(("constant",)))
    check(found, same=("UNDECIDED", "MISSING"))
    longest = ("lora", "cosine", 64)
    left = [s for s in specs() if (s.method.name, s.schedule, s.steps) != longest]
    _, found = ask("growth", Behind(SAME), left)  # not judged at shorter lengths than the others
    check(found, same=("UNDECIDED", "MISSING"), none_at_end=("UNDECIDED", "MISSING"))
    higher = [s for s in specs(rank=8) if not is_full(s)]
    one_arm = "lora r[48].*, and lora r[48].*: only one of them can be compared"
    with pytest.raises(TableError, match=one_arm):
        ask("growth", Behind(SAME), [*specs(), *higher])
    short = [s for s in specs() if is_full(s) or s.steps < 64]
    with pytest.raises(TableError, match=one_arm):  # short runs of one rank, long ones of another
        ask("growth", Behind(SAME), [*short, *(s for s in higher if s.steps == 64)])


def test_short_runs_may_have_more_seeds_than_long_ones():
    many = [s for s in specs(seeds=range(12)) if s.steps == 8 or s.seed < 5]
    _, found = ask("growth", Behind(SAME), many)
    _, few = ask("growth", Behind(SAME), [s for s in many if s.seed < 5])
    check(found, same="SUPPORTED")
    widths = [v["same"]["estimate"]["high"] - v["same"]["estimate"]["low"] for v in (found, few)]
    assert widths[0] < widths[1]


def test_a_curve_gates_the_claims_that_rest_on_it_and_is_named_with_schedule_and_updates():
    few = [s for s in specs() if not (s.schedule == "constant" and s.steps == 8 and s.seed > 1)]
    _, found = ask("growth", Behind(SAME), few)
    check(found, same="UNDECIDED", grows_constant="UNDECIDED", grows="SUPPORTED")
    check(found, none_at_end="SUPPORTED")
    assert found["same"]["gates"][0]["place"].startswith("constant, 8 updates: ")


def measured(world, of, names, runs=None):
    """The estimates of a sweep's own estimands."""
    question = question_of(of, {})
    (c,) = question.conditions(planted_table(world, specs() if runs is None else runs))
    found = {e.name: e for e in question.estimands}
    return [found[n].measure(c) for n in names], c, found


def cell(schedule, steps="most", **more):
    where = {"schedule": schedule, "steps": steps}
    return {"measure": "percent", "of": "lora", "over": "full", "where": where, **more}


GROWTH = registry.shipped("growth")["estimands"]


def test_the_optima_of_two_schedules_err_independently():
    _, c, found = measured(Noisy(SAME), GROWTH, ())

    def spread(name):
        return float(np.std([np.mean([*d.values()]) for d in found[name].by_seed(c).draws]))

    parts = [spread(name) for name in ("gap_decaying", "constant_long")]
    assert min(parts) > 0
    assert spread("apart_long") == pytest.approx(math.hypot(*parts), rel=0.2)


def test_a_difference_by_seed_takes_out_what_seeds_share_and_an_independent_one_does_not():
    class Shared(Behind):
        def loss(self, spec, step):  # a seed in which LoRA is behind is so under both schedules
            off = 0 if is_full(spec) else np.random.default_rng(spec.seed).normal(0, 1e-2)
            return super().loss(spec, step) + off

    of = {"a": cell("cosine"), "b": cell("constant")}
    of |= {
        "paired": {"difference": ["a", "b"], "by_seed": True},
        "apart": {"difference": ["a", "b"]},
    }
    (paired, apart), *_ = measured(Shared(SAME), of, ("paired", "apart"))
    assert paired.value == pytest.approx(1, abs=0.3) and apart.value == pytest.approx(1, abs=3)
    assert apart.high - apart.low > 5 * (paired.high - paired.low)


def test_a_difference_of_ratios_is_their_ratio():
    class Moved(World):
        """Under a cosine LoRA's best rate is twice, and full fine-tuning's 1.6 times as high."""

        def __init__(self):
            factor = {True: 1.6, False: 2.0}
            super().__init__(
                best=lambda s, step: (
                    (FULL if is_full(s) else LORA)
                    * (factor[is_full(s)] if s.schedule == "cosine" else 1)
                )
            )

    ratio = {"measure": "best_lr", "of": "lora", "over": "full"}
    of = {s: {**ratio, "where": {"schedule": s, "steps": 64}} for s in BOTH}
    of["over"] = {"difference": ["cosine", "constant"]}
    (over,), c, found = measured(Moved(), of, ("over",))
    assert over.value == pytest.approx(1.25, rel=0.05) and found["over"].log
    assert found["over"].final and over.low < 1.25 < over.high
    assert c.where(found["over"].used(c), found["over"].at(c)).rank == 4


def test_sides_of_a_difference_must_be_two_cells_of_one_arm():
    twice = {"a": cell("cosine", 64), "b": cell("cosine", "most"), "d": {"difference": ["a", "b"]}}
    (none,), c, found = measured(Behind(SAME), twice, ("d",))
    assert none is None and found["d"].absent(c) == "runs that differ in schedule or steps"
    two = {**cell("cosine"), "of": {"rank": 4}}, {**cell("cosine"), "of": {"rank": 8}}
    shared = {"a": two[0], "b": two[1], "d": {"difference": ["a", "b"]}}
    both = [*specs(), *(s for s in specs(rank=8) if not is_full(s))]
    with pytest.raises(TableError, match=r"estimands\.d: both sides use one curve"):
        measured(Behind(SAME), shared, ("d",), both)
    shared["d"]["by_seed"] = True
    (paired,), *_ = measured(Behind(SAME), shared, ("d",), both)
    assert paired.value == pytest.approx(0, abs=0.3)
    top = {"rank": "top"}  # of short runs 4, of long ones 8: not one arm
    apart = {k: {**cell("cosine", k), "of": top} for k in ("fewest", "most")}
    apart["d"] = {"difference": ["most", "fewest"]}
    longer = [s for s in both if is_full(s) or s.method.rank == (4 if s.steps == 8 else 8)]
    with pytest.raises(TableError, match=r"lora r[48].*, and lora r[48]"):
        measured(Behind(SAME), apart, ("d",), longer)


def test_the_four_sides_of_a_difference_of_differences_err_independently():
    names = {"a": ("cosine", 64), "b": ("constant", 64), "c": ("cosine", 8), "d": ("constant", 8)}
    of = {name: cell(*at) for name, at in names.items()}
    of |= {"long": {"difference": ["a", "b"]}, "short": {"difference": ["c", "d"]}}
    of["apart"] = {"difference": ["long", "short"]}
    (apart, *each), *_ = measured(Noisy(SAME), of, ("apart", *names))
    wanted = math.hypot(*(float(np.std(e.draws)) for e in each))
    assert float(np.std(apart.draws)) == pytest.approx(wanted, rel=0.03)


def test_a_bound_gives_no_difference():
    (a, b), *_ = measured(Behind(SAME), GROWTH, ("constant_long", "constant_short"))
    assert minus(a, b).has_interval()
    assert minus(a, dataclasses.replace(b, flags=("at_least",))).value is None
    assert minus(dataclasses.replace(a, draws=None), b).value is None


def test_the_noisier_side_tells_how_many_seeds_are_needed():
    many = [s for s in specs(seeds=range(12)) if s.steps == 8 or s.seed < 5]
    _, c, found = measured(Noisy(SAME), GROWTH, (), many)
    noisy = {
        n: float(np.std(found[n].measure(c).draws)) for n in ("constant_long", "constant_short")
    }
    assert found["growth_constant"].seeds(c) == found[max(noisy, key=noisy.get)].seeds(c)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"a": {**cell("cosine"), "where": {"rank": 4}}},
            "a.where: unknown setting 'rank'. Use one",
        ),
        ({"a": {**cell("cosine"), "where": {}}}, "a.where: {}. Write a value of each setting"),
        ({"a": cell(["cosine"])}, "a.where.schedule: ['cosine']. Write one name"),
        ({"a": cell("most")}, "a.where.schedule: 'most'. Write one name"),
        ({"a": cell("cosine", "last")}, "a.where.steps: 'last'. Write a number, fewest or most"),
        ({"a": cell("cosine", 0)}, "a.where.steps: 0. Write a number"),
        ({"a": cell("cosine", True)}, "a.where.steps: True. Write a number"),
        ({"a": cell("cosine", rates=True)}, "a: unknown key 'rates'"),
        ({"a": cell("cosine", optional=True)}, "a: unknown key 'optional'"),
        ({"a": cell("cosine", says="LoRA lost")}, "a.says: 'LoRA lost'. Write {n}"),
        ({"a": cell("cosine", says="{n} at {rank}")}, "a.says: '{n} at {rank}'. Write {n}"),
        ({"a": cell("cosine", says="{n}, {n:.2f}")}, "a.says: '{n}, {n:.2f}'. Write {n}"),
        ({"a": cell("cosine", says="{n} of {")}, "a.says: '{n} of {'. Write {n}"),
        ({"a": cell("cosine", says=5)}, "a.says: 5. Write {n}"),
        (
            {"a": {k: v for k, v in cell("cosine").items() if k != "where"}},
            "a.where: None. Write a",
        ),
        ({"a": {**cell("cosine"), "where": {"steps": 8}}}, "`where` names steps; schedule, steps"),
        ({"e": {"every_task": "a", "worst": "max"}}, "e: unknown key 'every_task'"),
        ({"d": {"difference": ["a"]}}, "d.difference: ['a']. Write the names of two"),
        ({"d": {"difference": ["a", "a"]}}, "d.difference: ['a', 'a']. Write the names of two"),
        ({"d": {"difference": ["a", "d"]}}, "d.difference: 'd'. Name two of those above"),
        (
            {"d": {"difference": ["a", "b"], "where": {}}},
            "d: unknown key 'where'. Use one of: diff",
        ),
        (
            {"b": {**cell("constant"), "measure": "best_lr"}, "d": {"difference": ["a", "b"]}},
            "d.difference: of percent and best_lr. Name two",
        ),
        (
            {k: {**cell(s), "measure": "best_lr"} for k, s in (("a", "cosine"), ("b", "constant"))}
            | {"d": {"difference": ["a", "b"], "by_seed": True}},
            "d.by_seed: a side has no values by seed. Those with measure: percent do.",
        ),
        (
            {"d": {"difference": ["a", "b"], "by_seed": "no"}},
            "d.by_seed: 'no'. Write true or false",
        ),
        (
            {"a": cell("cosine", log=True), "d": {"difference": ["a", "b"]}},
            "d.difference: one side says log, and one not",
        ),
        (
            {"a": {**cell("cosine"), "of": "best"}},
            "a.of: unknown arm 'best'. Use one of: full, control, lora",
        ),
    ],
)
def test_what_a_declared_comparison_may_not_say(change, says):
    of = {"a": cell("cosine"), "b": cell("constant"), **change}
    with pytest.raises(TableError) as error:
        registry.question_named("", of)
    assert says in str(error.value)


def test_runs_with_rewards_have_no_cells():
    table = planted_table(Behind(SAME), specs()).assign(objective="policy_gradient")
    with pytest.raises(TableError, match="`where` is for losses, and these runs have rewards"):
        question_of({"a": cell("cosine")}, {}).conditions(table)


def test_a_cell_is_named_in_its_gates_and_its_answer():
    out, found = ask("growth", Behind(SAME), specs())
    assert found["none_at_end"]["where"]["at"] == "rank 4, cosine, 64 updates"
    assert found["grows"]["where"]["at"] == "rank 4, 8 to 64 updates"
    says = "with a cosine LoRA falls back by 0.0% ["
    assert "more of what full fine-tuning gains than at a constant learning rate" in out["page"]
    assert says.split(" by ")[0] in out["page"]

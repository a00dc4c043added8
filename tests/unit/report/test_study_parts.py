"""What the page of all answers is made of, on planted answers: settings, averages over bases, units of
margins, regret over rank, rates, the ledger and the findings."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from analysis.inference.decide import look_level
from analysis.inference.estimate import AT_LEAST, Estimate, Verdict, fixed, number
from analysis.inference.gates import Gate, GateCode
from analysis.measures.regret import COUNTS
from analysis.report import plots_study
from analysis.report.study import by_rank, details, findings, forest, ledger, page, rates, wording
from analysis.report.study.answers import NO_CELL, Part, rows_of
from analysis.report.study.pooled import pooled
from analysis.report.study.setting import Setting, setting_of

ROOT = Path(__file__).resolve().parents[3]
RULES, LISTS = {"rule_shift": 0.25, "new_exceptions": 0}, {"rule_shift": 0.5}


def dialect(name="dialect", knobs=LISTS):
    return {"name": name, "location": "dialect", "source": "synthetic", "knobs": knobs}


DIALECT = (dialect(),)
GSM8K = {"name": "gsm8k", "location": "gsm8k", "source": "jsonl", "knobs": {}}
FACTS = {"name": "facts", "location": "facts", "source": "synthetic", "knobs": {}}


def verdict(value, half=0.1, outcome="REFUTED", group="b on dialect", level=0.95, **changes):
    e = Estimate(value, value - half, value + half, 5, level=level)
    v = Verdict("c", group, outcome, e, 1.0, (0.9, 1.1), True, "", log=False)
    return dataclasses.replace(v, **changes)


def answer(
    folder,
    *verdicts,
    sweep="rank",
    scale="tiny",
    base="b",
    seeds=(100, 101),
    data=DIALECT,
    **more,
):
    """An answer in its folder, with one run per seed and data set."""
    at = folder / f"{sweep}-{scale}"
    at.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "run_id": f"{scale}{seed}{d['name']}",
            "model": base,
            "seed": seed,
            "hidden_size": 64,
            **{"method": "lora", "rank": 8.0, "batch_size": 16, "steps": 256},
            "dataset": d["name"],
            "spec": json.dumps({"dataset": d}),
        }
        for seed in seeds
        for d in data
    ]
    pd.DataFrame(rows).to_parquet(at / "table.parquet")
    results = {"sweep": sweep, "scale": scale, "runs": len(rows), "curves": [], **more}
    says = {v.claim: {"says": f"{v.claim} holds", "whose": "study"} for v in verdicts}
    asked = {"name": sweep, "scale": scale, "question": f"{sweep}?", "source": "the study"}
    return Part(at, results, {**asked, "analysis": sweep, "claims": says}, list(verdicts))


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("group", "setting"),
    [
        ("b on low, batch 16, steps 256", Setting.IN_REGIME),
        ("b, 8 symbols, drawn anew", Setting.IN_REGIME),
        ("b on dialect", Setting.BEYOND),
        ("b, 16 symbols, drawn anew + 30% new exceptions", Setting.BEYOND),
        ("b on facts", Setting.BEYOND),
        ("b, gsm8k", Setting.REAL),
        ("b on low, batch 16, steps 256 and b on facts, batch 16, steps 128", Setting.BEYOND),
        ("all 4 tasks", Setting.REAL),  # names none: the hardest of all
    ],
)
def test_the_setting_follows_from_the_data_that_a_verdict_names(tmp_path, group, setting):
    part = answer(tmp_path, data=(dialect("low", RULES), dialect(), FACTS, GSM8K))
    assert setting_of(part.runs, group) is setting


# ---------------------------------------------------------------- averages over bases


def bases(folder, verdicts, **changes):
    return [
        answer(
            folder,
            dataclasses.replace(v, group=f"b{k} on dialect"),
            scale=f"tiny_{k}",
            base=f"b{k}",
            **changes,
        )
        for k, v in enumerate(verdicts)
    ]


def test_three_bases_are_averaged_at_the_level_of_their_looks(tmp_path):
    level = look_level(3)
    values = (0.5, 0.6, 0.7)
    parts = bases(tmp_path, [verdict(v, 0.01, level=level) for v in values])
    (pool,) = pooled(parts)
    half = stats.t.ppf(0.5 + level / 2, 2) * np.std(values, ddof=1) / math.sqrt(3)
    assert pool.bases == ("b0", "b1", "b2") and pool.estimate.level == level
    assert pool.estimate.value == pytest.approx(0.6, abs=1e-3)
    assert pool.estimate.low == pytest.approx(0.6 - half, rel=0.02)
    # Ratios are averaged as logarithms.
    logs = bases(
        tmp_path,
        [
            verdict(math.exp(v), log=True, estimate=Estimate(*np.exp([v, v - 0.01, v + 0.01])))
            for v in values
        ],
    )
    (pool,) = pooled(logs)
    assert math.log(pool.estimate.value) == pytest.approx(0.6, abs=1e-3)


def test_what_is_no_replicate_is_not_averaged(tmp_path):
    three = [verdict(v) for v in (0.5, 0.6, 0.7)]
    assert len(pooled(bases(tmp_path, three))) == 1
    assert not pooled(bases(tmp_path, three[:2]))
    others = (
        {"estimate": Estimate(0.7, 0.7, 0.7)},  # a count
        {"estimate": Estimate(0.7, 0.6, 0.8, flags=(AT_LEAST,))},
        {"estimate": Estimate(0.7)},
    )
    for change in others:
        assert not pooled(bases(tmp_path, [*three[:2], dataclasses.replace(three[2], **change)]))
    last = three[2:]
    pair = bases(tmp_path, three[:2])
    early = [dataclasses.replace(v, exploratory="early seeds") for v in last]
    fresh = bases(tmp_path / "first", early)[0]
    low = bases(tmp_path / "low", last, data=(dialect(knobs=RULES),))[0]
    other = dataclasses.replace(low, results={**low.results, "scale": "small"})
    for part in (fresh, low, other):
        assert not pooled([*pair, part])


def test_answers_that_must_not_be_judged_are_left_out_of_the_average(tmp_path):
    gate = Gate(GateCode.FLAGGED, place="lora r8: ", flags=("at_edge",))
    four = bases(
        tmp_path, [verdict(v, 0.01) for v in (0.5, 0.6, 0.7)] + [verdict(9, gates=(gate,))]
    )
    (pool,) = pooled(four)
    assert pool.estimate == pooled(four[:3])[0].estimate and pool.left_out == ("b3",)
    assert "(1 not to be judged: b3): c holds; 0.6" in "\n".join(
        details.questions(four, [pool], tmp_path)
    )
    # Too few are left: no average, and the page says why.
    (none,) = pooled(four[1:])
    assert none.estimate.value is None and none.left_out == ("b3",)
    text = "\n".join(details.questions(four, [none], tmp_path))
    assert "No average over bases (1 not to be judged: b3): c holds" in text
    (row,) = forest.rows_of(four[1:], [none])
    assert all(m.outcome for m in row.marks[Setting.BEYOND])
    # Another answer of that base, with fewer runs and no gate, stands for it.
    again = bases(tmp_path / "again", [verdict(0.8, 0.01)], seeds=(100,))[0]
    again = dataclasses.replace(again, results={**again.results, "scale": "tiny_3"})
    vars(again)["runs"] = four[3].runs
    assert pooled([*four, again])[0].bases == ("b0", "b1", "b2", "b3")


def test_the_average_over_bases_covers_a_planted_mean(tmp_path):
    """Bases differ, and each has Student's interval over five seeds."""
    rng, covered, n = np.random.default_rng(5), 0, 200
    parts = bases(tmp_path, [verdict(0.0)] * 3)
    for _ in range(n):
        made = []
        for part in parts:
            seeds = rng.normal(0, 0.1) + rng.normal(0, 0.1, 5)
            half = stats.t.ppf(0.975, 4) * seeds.std(ddof=1) / math.sqrt(5)
            v = dataclasses.replace(
                part.verdicts[0],
                estimate=Estimate(seeds.mean(), seeds.mean() - half, seeds.mean() + half),
            )
            made.append(dataclasses.replace(part, verdicts=[v]))
            vars(made[-1])["runs"] = part.runs  # read once
        e = pooled(made)[0].estimate
        covered += e.low <= 0 <= e.high
    assert covered >= 0.92 * n


# ---------------------------------------------------------------- units of margins


@pytest.mark.parametrize(
    ("expected", "margin", "log", "value", "place", "band"),
    [
        (10, (5, 20), True, 20, 1, (-1, 1)),
        (10, (5, 20), True, 2.5, -2, (-1, 1)),
        (0, (-0.1, 0.1), False, 0.05, 0.5, (-1, 1)),
        (0.7, (0, 0.9), True, 0.9, 1, (-math.inf, 1)),
        (-0.1, (-2, -0.03), False, 0.04, 2, (-math.inf, 1)),
        (1.5, (1, 100), True, 1, -1, (-1, math.inf)),
        (1, (1, 1000), True, 0.25, -2, (0, math.inf)),  # a factor of 2 is the unit
        (0, (-10, 0), False, 0.03, 3, (-math.inf, 0)),  # 0.01 nats are the unit
        (1, (0.5, 1), False, 0.75, -0.5, (-1, 0)),  # a correlation: 1 is the most there is
    ],
)
def test_values_are_placed_in_units_of_the_margin(expected, margin, log, value, place, band):
    v = verdict(value, expected=float(expected), margin=margin, log=log)
    scale = forest.scale_for(v)
    assert scale.at(value) == pytest.approx(place)
    assert scale.band == pytest.approx(band)


def test_claims_that_say_the_same_share_a_row_and_averages_have_no_verdict(tmp_path):
    parts = bases(tmp_path, [verdict(v) for v in (0.5, 0.6, 0.7)])
    nothing = verdict(0.0, estimate=Estimate(None), group=NO_CELL)
    parts.append(answer(tmp_path, nothing, sweep="other"))
    (row,) = forest.rows_of(parts, pooled(parts))
    assert [m.outcome for m in row.marks[Setting.BEYOND]] == ["REFUTED"] * 3 + [""]
    assert row.marks[Setting.BEYOND][0].value == pytest.approx(-5)
    plots_study.forest([row], tmp_path / "forest.png")
    assert (tmp_path / "forest.png").stat().st_size > 10_000


# ---------------------------------------------------------------- regret over rank


def plain(value, half=1.0):
    return Estimate(value, value - half, value + half).plain()


def cell(name, *ranks, rank=5.0, loads=(0.01, 6.0, 0.4), updates=256):
    """Ranks as (rank, regret in percent); `loads` of the needed rank, by the three counts."""
    by_count = dict(zip(COUNTS, loads))
    return {
        "cell": name,
        "batch_size": 16,
        "updates": updates,
        "bits": {count: 100 * load for count, load in by_count.items()},
        "rank_interpolated": plain(rank),
        "loads_needed": {count: plain(load, 0.1) for count, load in by_count.items()},
        "ranks": [
            {"rank": r, "loads": by_count, "regret_percent": plain(percent)} for r, percent in ranks
        ],
    }


def batches(folder, regret, outcome="REFUTED"):
    """`large_batches` on another base: the control, and a batch of 512."""
    made = [
        verdict(0.01, outcome=o, claim=claim, group="c on dialect")
        for claim, o in (("at_32", outcome), ("at_512", "SUPPORTED"))
    ]
    rows = [(32, 384, regret), (512, 24, 9.0)]
    regrets = [
        {"batch_size": b, "updates": n, "rank": 8, "regret_percent": plain(v, 2.5)}
        for b, n, v in rows
    ]
    rules = (dialect(knobs=RULES),)
    curves = [curve("c", rank=8.0, batch_size=32, steps=384)]
    more = {"regrets": regrets, "curves": curves}
    return answer(folder, *made, sweep="large_batches", base="c", data=rules, **more)


def curve(model, dataset="dialect", **more):
    found = {"model": model, "dataset": dataset, "method": "lora", "rank": 8.0, "steps": 256}
    return {**found, "batch_size": 16, **more}


def test_regret_is_drawn_a_line_a_condition_with_the_other_bases_control(tmp_path):
    cells = [
        cell("b, nothing new", (8, 30.0)),
        cell("b, 8 symbols, change of rank 2", (1, 20.0), (8, 0.05)),
    ]
    regime = answer(tmp_path, sweep="regime", cells=cells)
    lines = by_rank.lines_of([regime, batches(tmp_path, 7.8)])
    assert [line.name for line in lines] == [
        "b, 8 symbols, change of rank 2, 256 updates of 16",
        "c, only rules new, 384 updates of 32",
    ]
    assert {r: e.value for r, e in lines[0].regrets.items()} == {1: 20.0, 8: 0.05}
    assert {r: e.value for r, e in lines[1].regrets.items()} == {8: 7.8}
    plots_study.regret_over_rank(lines, tmp_path / "regret.png")
    assert (tmp_path / "regret.png").stat().st_size > 10_000


def test_the_load_stands_there_by_all_three_counts(tmp_path):
    cells = [cell("b, x", (1, 20.0), (8, 1.0))]
    regime = answer(tmp_path, sweep="regime", cells=cells)
    (row,) = by_rank.room([regime])[2:]
    assert row == (
        "| b, x | 256 | 5 [4, 6] | 1 | 600 | 40 | 0.01 [-0.09, 0.11] | 6 [5.9, 6.1] "
        "| 0.4 [0.3, 0.5] |"
    )
    ranks = by_rank.loads([regime])[2:]
    assert ranks[0] == "| b, x | 256 | 1 | 0.01 | 6 | 0.4 | 20 [19, 21] |"
    # Answers from before the other counts were made show none.
    del cells[0]["bits"]
    assert by_rank.room([regime]) == by_rank.loads([regime]) == []


def test_regret_over_rank_comes_first_where_the_regime_was_measured(tmp_path):
    def headings(*parts):
        return [x for x in page.page(parts, tmp_path, kept=True).splitlines() if x.startswith("#")]

    rest = ["Sentence by sentence", "What was not tested", "How to read it"]
    rest = [f"## {title}" for title in [*rest, "What changed after a look", "Details"]]
    low = verdict(-0.01, claim="low", group="b, x")
    regime = answer(tmp_path, low, sweep="regime", cells=[cell("b, x", (8, 1.0))])
    first = ["## Regret over rank", "## Room for what is new", "## The claims"]
    assert headings(regime)[1:-1] == [*first, *rest]
    assert headings(answer(tmp_path, verdict(0.5)))[1:-1] == ["## The claims", *rest]


# ---------------------------------------------------------------- rates


def test_regret_is_drawn_over_multiples_of_full_fine_tunings_best_rate(tmp_path):
    rng, rows = np.random.default_rng(3), []
    arms = (("fullft", None, 1e-3, 2.0), ("lora", 4.0, 3e-3, 2.2), ("lora", 8.0, 5e-3, 2.1))
    for method, rank, best, lowest in arms:
        for k, seed in [*((k, 100) for k in range(-3, 4)), *((k, 101) for k in (-1, 0, 1))]:
            nll = lowest + 0.05 * k**2 + rng.normal(0, 1e-3)
            rows.append({"method": method, "rank": rank, "lr": best * 2.0**k, "seed": seed})
            rows[-1] |= {"test_nll": nll, "run_id": str(len(rows))}
    common = {"model": "b", "dataset": "dialect", "batch_size": 16, "steps": 100, "alpha": 32.0}
    table = pd.DataFrame(rows).assign(
        **common, status="done", nll_start=3.1, spec=json.dumps({"dataset": dialect()})
    )
    curves = [{"method": m, "best_lr": best} for m, _, best, _ in arms]
    part = answer(tmp_path, sweep="lr_ratio", curves=curves)
    table.to_parquet(part.folder / "table.parquet")
    assert rates.has_curves([part])
    (curve,) = rates.rate_curves([part])
    assert curve.label == "b, rank 8, beyond the regime"
    # 10 times full fine-tuning's best rate is twice LoRA's: 0.05 of a gain of 1 nat.
    at_ten = np.interp(10, curve.fitted_times, curve.fitted_percent)
    assert at_ten == pytest.approx(5, abs=0.5) and curve.fitted_percent.min() < 0.3
    assert curve.times[4] == pytest.approx(10, rel=0.03)
    assert curve.percent[4] == pytest.approx(5, abs=0.5)
    plots_study.rates([curve], tmp_path / "rates.png")
    assert not rates.has_curves([answer(tmp_path, sweep="rank", curves=curves)])


def test_the_page_lists_the_runs_that_were_added_after_a_look(tmp_path):
    part = answer(tmp_path, verdict(0.5), sweep="rank")
    added = {"arm": "lora", "what": "learning rate 1e-3", "why": "four were left"}
    part.question["added_after"] = [added]
    text = page.page([part], tmp_path, kept=True)
    assert "- `rank-tiny`, arm lora: learning rate 1e-3; four were left" in text
    part.question["added_after"] = []
    assert "<summary>Runs that were added" not in page.page([part], tmp_path, kept=True)


# ---------------------------------------------------------------- the ledger


def test_every_claim_that_the_ledger_names_is_asked_by_a_sweep_or_was():
    asked = {
        (path.stem, claim)
        for path in (ROOT / "sweeps").glob("*.yaml")
        for claim in yaml.safe_load(path.read_text()).get("claims", {})
    }
    for path in (ROOT / "analysis" / "results").glob("*/question.json"):
        question = json.loads(path.read_text())
        asked |= {(question["name"], claim) for claim in question["claims"]}
    named = [c for block in ledger.sentences().values() for s in block for c in s.claims]
    assert {tuple(c.split(": ")) for c in named} <= asked and len(named) == len(set(named))
    texts = [s.says for block in ledger.sentences().values() for s in block]
    assert len(texts) == len(set(texts)) > 60


def test_the_ledger_counts_outcomes_by_setting_and_names_the_scale(tmp_path):
    outcomes = ("REFUTED", "REFUTED", "UNDECIDED")
    made = [verdict(0.5, outcome=o, claim="parity") for o in outcomes]
    lines = ledger.ledger([*bases(tmp_path, made, seeds=(0,)), answer(tmp_path, verdict(1.0))])
    line = next(text for text in lines if "High ranks learn as fast" in text)
    counted = "**REFUTED** 2 of 3, **UNDECIDED** 1 of 3 at `tiny`"
    assert line.split(" | ")[1:] == ["", counted, " |"]
    untried = next(text for text in lines if "Start with rank 256" in text)
    assert untried.split(" | ")[1] == ledger.NOT_TESTED
    # A claim that no sentence names has a line of its own.
    assert lines[-1].startswith("| C holds |  | **REFUTED** at `tiny` |")


def test_a_sentence_that_states_a_bound_is_judged_by_the_upper_end_alone(tmp_path):
    """0.002 bits an episode respect "at most about one bit", though they are far from one."""

    def line(value, outcome, **changes):
        v = verdict(
            value,
            value / 2,
            claim="one_bit",
            outcome=outcome,
            margin=(0.5, 2.0),
            log=True,
            **changes,
        )
        lines = ledger.ledger([answer(tmp_path, v, sweep="rl_bits")])
        return next(text for text in lines if "at most about one bit" in text)

    assert "**SUPPORTED** at `tiny`" in line(0.002, "REFUTED")
    assert "**REFUTED** at `tiny`" in line(8.0, "REFUTED")
    assert "**UNDECIDED** at `tiny`" in line(2.1, "UNDECIDED")
    gate = Gate(GateCode.FEW_SEEDS_AT_BEST, 1)
    assert "**UNDECIDED** at `tiny`" in line(0.002, "UNDECIDED", gates=(gate,))


def rewarded(folder, claims=("rank_1",), **changes):
    """100 updates of 256 answers with 5,120 parameters of rank 1: 0.2 parameters an episode."""
    group = "b on words, policy gradient, batch 256, steps 100"
    made = [verdict(-8.6, 3.0, claim=c, group=group, **changes) for c in claims]
    arms = [{"rank": r, "steps": 100, "batch_size": 256} for r in (1.0, 16.0)]
    curves = [curve("b", "words", objective="policy_gradient", **a) for a in arms]
    words = {"name": "words", "location": "skills", "source": "synthetic", "knobs": {}}
    part = answer(folder, *made, sweep="rl", data=(words,), curves=curves)
    rows = [
        {
            **c,
            "n_trainable": 5120 * int(c["rank"]),
            "seed": 100,
            "hidden_size": 64,
            "run_id": str(k),
        }
        for k, c in enumerate(curves)
    ]
    table = pd.DataFrame(rows).assign(spec=json.dumps({"dataset": words}))
    table.to_parquet(part.folder / "table.parquet")
    return part


def test_the_studys_condition_on_rewards_stands_beside_the_verdict(tmp_path):
    part = rewarded(tmp_path)
    line = next(text for text in ledger.ledger([part]) if "rank 1 reaches full" in text)
    assert "**REFUTED** at `tiny`<br>at 0.2 parameters an episode" in line
    assert "the study: 8.6 parameters an episode" in line
    (said,) = findings.sentences([part])
    assert said.endswith("here rank 1 has 0.2 parameters an episode.")


# ---------------------------------------------------------------- the findings


def test_the_first_finding_names_every_base_rank_and_length(tmp_path):
    def first(*outcomes, control=None):
        made = [
            verdict(-0.01, outcome=o, claim="low", group=f"b, {k}") for k, o in enumerate(outcomes)
        ]
        cells = [cell(f"b, {k}", (4, 9.0), (8, 2.0 + k)) for k in range(len(outcomes))]
        rules = (dialect(knobs=RULES),)
        parts = [answer(tmp_path, *made, sweep="regime", data=rules, cells=cells)]
        parts += [batches(tmp_path, 7.8, control)] if control else []
        return findings.sentences(parts)[0]

    held = first("SUPPORTED", "SUPPORTED")
    # The rank of an eighth of the width of 64, with an interval on either data set.
    assert held == (
        "**Where only rules are new, a rank of an eighth of the width has no regret**. Its regret on b "
        "(rank 8, 256 updates of 16) was 2.0% [1.0, 3.0] and 3.0% [2.0, 4.0] of full fine-tuning's gain."
    )
    # Another base of the same share of the width stands beside it, in a sentence of its own.
    both = first("SUPPORTED", "SUPPORTED", control="REFUTED")
    assert "has no regret on some bases and data sets**" in both
    assert both.endswith(". On c (rank 8, 384 updates of 32) it was 7.8% [5.3, 10.3].")
    assert "has regret**" in first("REFUTED")
    assert "on some bases and data sets" in first("SUPPORTED", "UNDECIDED")
    assert "is open**" in first("UNDECIDED")
    assert findings.sentences([]) == []
    one_seed = verdict(2.0, outcome="UNDECIDED", claim="rank_1", estimate=Estimate(2.0))
    assert findings.sentences([answer(tmp_path, one_seed, sweep="rl")]) == []


def test_room_is_told_by_all_counts_on_one_base_after_one_length(tmp_path):
    def second(*cells):
        low = [verdict(-0.01, claim="low", group=c["cell"]) for c in cells]
        parts = [answer(tmp_path, *low, sweep="regime", cells=list(cells))]
        return [x for x in findings.sentences(parts) if "room" in x]

    cells = [cell("b, x", (8, 1.0)), cell("b, y", (8, 1.0), rank=14.0, loads=(0.2, 3.0, 0.5))]
    (said,) = second(*cells)
    assert said.startswith("**Whether an adapter has room for the data depends on how bits")
    assert "On b after 256 updates a regret of 5% takes ranks of 5 to 14, on 2 data sets." in said
    assert (
        "0.01 to 0.2 by the generator's count, 3 to 6 by the first pass and 0.4 to 0.5 by the first "
        "pass above its entropy"
    ) in said
    same = cell("b, z", (8, 1.0), loads=(0.4, 0.4, 0.4))
    assert "hardly depends" in second(same, cells[0])[0]
    assert second(cells[0]) == second(cells[0], cell("c, y", (8, 1.0))) == []
    assert second(cells[0], cell("b, y", (8, 1.0), updates=64)) == []


def test_answers_of_other_bases_ranks_or_lengths_share_no_sentence(tmp_path):
    rules = (dialect(knobs=RULES),)
    made = []
    for base, value, scale, data, steps in (
        ("b", 4.2, "tiny", rules, 128),
        ("m", 12.7, "small", (GSM8K,), 30),
    ):
        name = data[0]["name"]
        group = f"{base} on {name}, batch 16, steps {steps}"
        why = "" if base == "b" else "early seeds"
        verdicts = [
            verdict(value, claim=c, group=group, exploratory=why) for c in ("ratio", "order")
        ]
        curves = [curve(base, name, rank=16.0, steps=steps)]
        more = {"sweep": "lr_ratio", "scale": scale, "base": base}
        made.append(answer(tmp_path, *verdicts, data=data, curves=curves, **more))
    (said,) = findings.sentences(made)
    _, *rest = said.split(". ", 1)
    assert rest == [
        "The ratio was 4.2 [4.1, 4.3] on b (only rules new; rank 16, 128 updates). On m (gsm8k; rank "
        "16, 30 updates) it was 12.7 [12.6, 12.8] (exploratory)."
    ]


def test_batches_say_nothing_where_their_control_fails(tmp_path):
    def said(outcome):
        rules = (dialect(knobs=RULES),)
        penalty = verdict(-0.05, 0.02, outcome="UNDECIDED", claim="penalty")
        read = {"batch_effect": "rank 16, batches of 4 to 256 after 8 to 256 updates; rank 1: -1"}
        more = {"curves": [curve("b", rank=16.0)], "read": read}
        small = answer(tmp_path, penalty, sweep="batch_size", data=rules, **more)
        small.question["claims"]["penalty"]["estimand"] = "batch_effect"
        (sentence,) = findings.sentences([small, batches(tmp_path, 7.8, outcome)])
        return sentence

    assert "was -4.9% [-6.8, -3.0] on b (only rules new; rank 16, batches of 4 to 256 after" in (
        said("SUPPORTED")
    )
    assert "control" not in said("SUPPORTED")
    assert "is open, where only rules are new**" in said("SUPPORTED")
    assert said("REFUTED").endswith(
        "512 and more on c say nothing of it: their control, a batch of 32, has regret as well."
    )
    assert said("UNDECIDED").endswith("may have regret as well.")


def test_nothing_is_shown_as_minus_zero():
    shown = wording.with_unit(wording.signed, "%")(Estimate(-0.04, -0.2, 0.1))
    assert shown == "+0.0% [-0.2, +0.1]"
    assert wording.percent(-0.01) == "0.0" and wording.change(-1e-5) == "+0.0"
    assert number(-0.0) == "0" and fixed(-0.00001, 4, "+") == "+0.0000"


# ---------------------------------------------------------------- exploratory and withdrawn


def test_exploratory_and_withdrawn_verdicts_are_marked_wherever_they_are_shown(tmp_path):
    made = verdict(-9.0, claim="rank_1", exploratory="the rule was written later")
    explores = answer(tmp_path, made, verdict(-8.0, claim="rank_1"), sweep="rl", data=(FACTS,))
    gone = Gate(GateCode.WITHDRAWN, "an arm is missing")
    away = verdict(-20.0, claim="tie", outcome="UNDECIDED", gates=(gone,))
    withdrawn = answer(tmp_path, away, sweep="rl_bits", data=(FACTS,))
    withdrawn.question["withdrawn"] = "an arm is missing"
    parts = [explores, withdrawn]
    shown = [r[4] for r in rows_of(parts)[1:]]
    assert shown == ["REFUTED (exploratory)", "REFUTED", "WITHDRAWN"]
    lines = ledger.ledger(parts)
    (line,) = [text for text in lines if "rank 1 reaches full fine-tuning's accuracy" in text]
    assert "**REFUTED** at `tiny`<br>**REFUTED** at `tiny` (exploratory)" in line
    (line,) = [text for text in lines if "it ties with full fine-tuning" in text]
    assert "**WITHDRAWN** at `tiny`" in line and "UNDECIDED" not in line
    item = details.verdict(explores, made)
    assert "**REFUTED (exploratory)**" in item and "the rule was written later" in item
    said = findings.sentences(parts)
    assert said[-1] == "**The answer of `rl_bits` is withdrawn**: an arm is missing."
    assert not any("-20" in text for text in said)
    (alone, _) = findings.sentences([answer(tmp_path, made, sweep="rl", data=(FACTS,)), withdrawn])
    assert "was -9.0 points [-9.1, -8.9] on b on dialect (exploratory)." in alone
    (row,) = forest.rows_of(parts, [])  # no withdrawn number is in the figure
    assert [m.explores for marks in row.marks.values() for m in marks] == [True, False]
    text = page.page(parts, tmp_path)
    assert "**WITHDRAWN**: an arm is missing." in text

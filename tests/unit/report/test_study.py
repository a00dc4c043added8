"""The pages of all answers, on planted ones: figures, findings, ledger, and golden pages; rows of answers."""

import dataclasses
import functools
import json
import re
import shutil
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.text import Annotation

from analysis.inference.decide import Gate, GateCode, Verdict
from analysis.inference.estimate import AT_LEAST, Estimate
from analysis.inference.rows import measured, pick, rows_of
from analysis.inference.where import Setting, Where
from analysis.measures import next_runs
from analysis.measures.places import places_of, setting_of, settings_of
from analysis.measures.regret import COUNTS
from analysis.optimum.fit import Optimum, fit_all
from analysis.questions.base import NO_CELL, Panel, Series
from analysis.questions.registry import analyse, read_question
from analysis.report import plots, plots_study, report
from analysis.report.report import question_hash
from analysis.report.study import answers, page
from analysis.report.study.answers import claims_table, read_answers
from analysis.runs.curves import at_step, lr_curves, title
from analysis.runs.table import TableError
from lorasweep.advise import rules
from lorasweep.advise.advice import plain_of
from lorasweep.config.compose import compose_request as compose
from lorasweep.spec import recommended
from lorasweep.work.answer import KEPT
from tests import planted
from tests.customers import advice
from tests.planted import kept_answer
from tests.world import ROOT

GOLDEN = ROOT / "tests" / "golden" / "study"
WITHDRAWN = (Gate(GateCode.WITHDRAWN, "an arm is missing"),)


def data_set(name="dialect", location="dialect", source="synthetic", **params):
    return {"name": name, "location": location, "source": source, "knobs": params}


RULES = (data_set(rule_shift=0.25, new_exceptions=0),)
LISTS = (data_set(rule_shift=0.5),)
FACTS = data_set("facts", "facts")


def verdict(value, half=0.1, outcome="REFUTED", group="b on dialect", **changes):
    e = Estimate(value, value - half, value + half, 5)
    v = Verdict("c", group, outcome, e, 1.0, (0.9, 1.1), True, "", log=False)
    return dataclasses.replace(v, **changes)


def curve(model, dataset="dialect", **more):
    found = {"model": model, "dataset": dataset, "method": "lora", "rank": 8.0, "steps": 256}
    found |= {"batch_size": 16, "alpha": 32.0, "n": 5, "flags": [], "band": None}
    return {**found, **dict.fromkeys(("best_lr", "low", "high", "best_nll")), **more}


def place(group, data=LISTS, **more):
    """The place of a condition that is named `base on data` or `base, data`."""
    base, name = re.fullmatch(r"(\w+)(?:, | on )(.*)", group).groups()
    spec = [json.dumps({"dataset": d}) for d in data]
    known = settings_of(pd.DataFrame({"model": base, "dataset": range(len(data)), "spec": spec}))
    return Where(group, base, name, max(known.values()), **more)


def answer(folder, *verdicts, sweep="rank", scale="tiny", base="b", data=LISTS, **more):
    """Write an answer with one run per seed and data set; `more`: keys of results or question."""
    at = folder / f"{sweep}-{scale}"
    at.mkdir(parents=True, exist_ok=True)
    rows = [
        {"run_id": f"{scale}{seed}{d['name']}", "seed": seed, "spec": json.dumps({"dataset": d})}
        | {"hidden_size": 64, "n_trainable": 5120, **curve(base, d["name"])}
        for seed in (100, 101)
        for d in data
    ]
    table = pd.DataFrame(rows).drop(columns=["flags", "band"])
    table.to_parquet(at / "table.parquet")
    verdicts = [dataclasses.replace(v, where=place(v.group, data)) for v in verdicts]
    says = {v.claim: {"text": f"{v.claim} holds", "source": "study"} for v in verdicts}
    asked = {"name": sweep, "scale": scale, "question": f"{sweep}?", "source": "the study"}
    asked |= {"analysis": sweep, "claims": says}
    asked |= {k: more.pop(k) for k in ("withdrawn", "added_after") if k in more}
    results = {"sweep": sweep, "scale": scale, "runs": len(table), "curves": [], "rows": []}
    results |= more
    results["verdicts"] = [v.plain() for v in verdicts]
    (at / "results.json").write_text(json.dumps(results))
    (at / "question.json").write_text(json.dumps(asked))
    return answers.Answer(at, results, asked)


def pages(found, folder):
    return page.pages(found, folder / "study.md")


def test_a_verdict_is_the_one_of_its_own_report(reports):
    """All ranks of the planted runs need 1 / 0.7 as many updates, whatever the length."""
    (kept,) = read_answers([reports])
    assert {re.search(r"\((\w+): ", r[0])[1] for r in claims_table([kept])[1:]} == {"rank"}
    rows = plots_study.speed_rows([kept])
    found = pick(rows, "speed")  # along the run, at each length's best rate
    assert {r.updates for r in found} >= {16, 32, 64} and len({r.rank for r in found}) > 1
    assert [r.estimate.value for r in found] == pytest.approx([0.7] * len(found), abs=0.05)
    assert all(abs(r.estimate.value) < 8 for r in pick(rows, "speed_rise"))
    assert {r.setting for r in rows} == {Setting.BEYOND}
    results = json.loads((path := reports / "rank-smoke/results.json").read_text())
    assert any(v.gates for _, v in kept.judged)
    for v in results["verdicts"]:
        v["outcome"], v["p"] = "SUPPORTED", 0.04
        v["gates"] = []
    path.write_text(json.dumps(results))
    (kept,) = read_answers([reports])
    # The report has corrected its two primary claims; the page corrects nothing again.
    assert sum(v.primary for _, v in kept.judged) == 2
    assert {(v.outcome, v.gates) for _, v in kept.judged} == {("SUPPORTED", ())}
    assert "**SUPPORTED** at `smoke`" in pages([kept], reports)["ledger.md"]


def test_pages_replace_earlier_ones_once_all_of_them_can_be_written(reports, tmp_path, monkeypatch):
    shutil.copytree(reports / "rank-smoke", tmp_path / "kept" / "rank-smoke")
    found = read_answers([reports, tmp_path / "kept"])  # the first of one name is used
    assert [a.folder for a in found] == [reports / "rank-smoke"]
    before = {
        page.MAP: "of an answer that is gone",
        "questions/gone.md": "gone. How to read: [ledger](../ledger.md)",
        "questions/notes.md": "mine",
    }
    (tmp_path / "questions").mkdir()
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    for broken in ("ledger", "Path.write_text"):  # a text that cannot be made, and a full disk
        with monkeypatch.context() as patch:
            patch.setattr(f"analysis.report.study.page.{broken}", lambda *given: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                page.write(found, tmp_path / "study.md")
        assert {n: (tmp_path / n).read_text() for n in before} == before
    page.write(found, tmp_path / "study.md")
    texts = pages(found, tmp_path)
    assert {n: (tmp_path / n).read_text() for n in texts} == texts
    beside = {"ledger.md", "rows.csv", "questions/README.md", "questions/rank.md"}
    assert set(texts) == {"study.md", *beside}
    assert page.MAP not in texts["study.md"] and not (tmp_path / page.MAP).exists()
    assert not (tmp_path / "questions" / "gone.md").exists()
    assert (tmp_path / "questions" / "notes.md").read_text() == "mine"
    for name, text in texts.items():
        for target in re.findall(r"\]\(([^)#]+)", text):
            there = ((tmp_path / name).parent / target).exists()
            assert target.startswith("http") or there, (name, target)


@pytest.mark.parametrize("content", ["{", "[]"])
@pytest.mark.parametrize("name", ["table.parquet", "results.json", "question.json"])
def test_a_broken_report_leaves_the_others(tmp_path, capsys, name, content):
    for sweep in ("recipes-tiny", "invariance-tiny"):
        shutil.copytree(KEPT / sweep, tmp_path / sweep)
    (tmp_path / "recipes-tiny" / name).write_text(content)
    assert [a.sweep for a in read_answers([tmp_path])] == ["invariance"]
    assert "left out" in capsys.readouterr().err
    page.write([], tmp_path / "none" / "study.md")  # all of a study's parts may be broken


@pytest.mark.parametrize(
    ("names", "setting"),
    [
        (("low",), Setting.IN_REGIME),
        (("dialect",), Setting.BEYOND),
        (("gsm8k",), Setting.REAL),
        (("low", "facts"), Setting.BEYOND),  # the last of both
    ],
)
def test_the_setting_follows_from_the_data_of_the_curves(names, setting):
    low = data_set("low", rule_shift=0.25, new_exceptions=0)
    data = (low, *LISTS, FACTS, data_set("gsm8k", "gsm8k", "jsonl"))
    spec = [json.dumps({"dataset": d}) for d in data]
    known = settings_of(
        pd.DataFrame({"model": "b", "dataset": [d["name"] for d in data], "spec": spec})
    )
    assert setting_of([{"model": "b", "dataset": name} for name in names], known) is setting


def bases(folder, verdicts):
    named = [dataclasses.replace(v, group=f"b{k} on dialect") for k, v in enumerate(verdicts)]
    return [answer(folder, v, scale=f"tiny_{k}", base=f"b{k}") for k, v in enumerate(named)]


def test_the_figure_of_ratios_has_the_numbers_of_the_rows(kept_rows, tmp_path):
    found, rows = kept_rows
    pairs = {p.row.scale: p for p in plots_study.ratio_pairs(found)}
    assert pairs.keys() == {"tiny", "small"}
    for scale, quantity in (("tiny", "lr_ratio"), ("small", "lr_ratio, all runs")):
        p, own = pairs[scale], {"sweep": "lr_ratio", "scale": scale, "verdict": None}
        row = pick(rows, quantity, **own)[0]
        ratio = p.lora.best_lr.value / p.full.best_lr.value
        assert ratio == pytest.approx(row.estimate.value, rel=5e-3)  # a mean of draws there
        assert p.percent(p.full.best_nll) == 0
        assert p.percent(p.full.curve.nll_start) == pytest.approx(100)
    plots_study.ratio_figure([*pairs.values()], tmp_path / "ratio.png")
    assert (tmp_path / "ratio.png").stat().st_size > 10_000


def row(where, quantity, value, half=None, **more):
    """A measurement as in results.json."""
    e = Estimate(value) if half is None else Estimate(value, value - half, value + half)
    return measured(where, quantity, e, **more).measurement()


def condition(name, *ranks):
    """A condition of `regime`: (rank, regret in percent), and loads of the needed rank by count."""
    where, found = place(name, RULES, batch_size=16, updates=256), []
    for count, load in zip(COUNTS, (0.01, 6.0, 0.4)):
        found.append(row(where, f"bits, {count}", 100 * load))
        found.append(row(where, f"load at the needed rank, {count}", load, 0.1))
        found += [row(where, f"load, {count}", load, arm=f"lora r{r}", rank=r) for r, _ in ranks]
    found.append(row(where, "needed_rank", 5.0, 1.0))
    for r, percent in ranks:
        found.append(row(where, "regret_percent", percent, 1.0, arm=f"lora r{r}", rank=r))
    return found


def test_regret_is_drawn_a_line_a_condition_with_the_other_bases_control(tmp_path):
    low = condition("b, 8 symbols, drawn anew", (1, 20.0), (8, 0.05))
    rows = [*condition("b, nothing new", (8, 30.0)), *low]
    regime = answer(tmp_path, sweep="regime", data=RULES, rows=rows)
    at = functools.partial(place, "c on dialect", RULES, arm="lora r8", rank=8)
    regrets = [
        row(at(batch_size=b, updates=n), "regret_percent", v, 2.5)
        for b, n, v in [(32, 384, 7.8), (512, 24, 9.0)]
    ]
    v = verdict(0.01, claim="at_32", group="c on dialect")
    control = answer(tmp_path, v, sweep="large_batches", base="c", data=RULES, rows=regrets)
    lines = plots_study.regret_lines([regime, control])
    values = {line.name: {r: e.value for r, e in line.regrets.items()} for line in lines}
    assert values == {
        "b, 256 updates of 16:\n8 symbols, drawn anew": {1: 20.0, 8: 0.05},
        "c, 384 updates of 32:\n8 symbols, drawn anew": {8: 7.8},
    }
    assert {line.setting for line in lines} == {Setting.IN_REGIME}
    plots_study.regret_map(lines, tmp_path / "map.png")


def outcomes_of(made, sentence):
    (row,) = [r for r in answers.ledger(made) if sentence in r[0]]
    return row[1:]


def test_every_claim_that_the_ledger_names_is_asked_by_a_sweep_or_was():
    sweeps = [(p.stem, yaml.safe_load(p.read_text())) for p in (ROOT / "sweeps").glob("*.yaml")]
    kept = [json.loads(path.read_text()) for path in KEPT.glob("*/question.json")]
    questions = [*sweeps, *((k["name"], k) for k in kept)]
    asked = {(name, claim) for name, question in questions for claim in question.get("claims", {})}
    blocks = yaml.safe_load(answers.SENTENCES.read_text())
    lines = [s for block in blocks for s in block["sentences"]]
    named = [c for s in lines for c in answers.claims_of(s)]
    assert {tuple(c.split(": ")) for c in named} <= asked and len(named) == len(set(named))
    assert len(lines) == len({s["says"] for s in lines}) > 60


def test_the_ledger_counts_outcomes_by_setting_and_names_the_scale(tmp_path):
    outcomes = ("REFUTED", "REFUTED", "UNDECIDED")
    made = bases(tmp_path, [verdict(0.5, outcome=o, claim="parity") for o in outcomes])
    made.append(answer(tmp_path, verdict(1.0)))
    counted = "**REFUTED** 2 of 3, **UNDECIDED** 1 of 3 at `tiny`"
    assert outcomes_of(made, "High ranks learn as fast") == ["", counted, ""]
    assert outcomes_of(made, "Start with rank 256")[0] == answers.NOT_TESTED
    assert answers.ledger(made)[-1] == ["C holds", "", "**REFUTED** at `tiny`", ""]  # no sentence


@pytest.mark.parametrize(
    ("value", "outcome", "gates", "shown"),
    [
        (0.002, "REFUTED", (), "SUPPORTED"),  # respects "at most one", though far from one
        (8.0, "REFUTED", (), "REFUTED"),
        (2.1, "UNDECIDED", (), "UNDECIDED"),
        (0.002, "UNDECIDED", (Gate(GateCode.FEW_SEEDS_AT_BEST, 1),), "UNDECIDED"),
    ],
)
def test_a_bound_is_judged_by_its_upper_end_alone(tmp_path, value, outcome, gates, shown):
    claim = {"claim": "one_bit", "margin": (0.5, 2.0), "log": True}
    v = verdict(value, value / 2, outcome=outcome, gates=gates, **claim)
    made = [answer(tmp_path, v, sweep="rl_bits")]
    assert f"**{shown}** at `tiny`" in "".join(outcomes_of(made, "at most about one bit"))


def test_a_finding_is_marked_filled_and_stale_once_an_outcome_or_a_number_changes(
    tmp_path, monkeypatch
):
    path = tmp_path / "findings.yaml"
    monkeypatch.setattr(answers, "TEXTS", path)
    said = {"sweep": "rank", "lead": "It holds", "said": "it is {one}.", "more": "Also {one}."}
    said |= {"rests": {"rank-tiny: c": ["REFUTED"]}, "numbers": {"one": {"of": "rank-tiny: c"}}}

    def made(v, **changes):
        path.write_text(yaml.safe_dump([{**said, **changes}]))
        return answers.findings(answer(tmp_path, v).rows)

    (found,) = made(verdict(0.5))
    wanted = ("**It holds.** it is 0.5 [0.4, 0.6].", "Also 0.5 [0.4, 0.6].")
    assert (found.text, found.more) == wanted
    (later,) = made(verdict(0.5, exploratory="seen"), rests={})
    assert "(exploratory)" in later.text
    other = {"numbers": {"one": {"of": "rank-tiny: d"}}}
    for v, changes, words in (
        (verdict(0.5, outcome="UNDECIDED"), {}, r"rank-tiny: c \['REFUTED'\].*\['UNDECIDED'\]"),
        (verdict(0.5, exploratory="seen"), {}, "exploratory"),
        (verdict(0.5), other, "0 rows are rank-tiny: d"),
    ):
        with pytest.raises(TableError, match=words):
            made(v, **changes)


@pytest.fixture(scope="module")
def kept_rows():
    found = read_answers([KEPT])
    return found, page.rows_of(found)


@pytest.mark.parametrize("path", [answers.TEXTS, answers.SETTINGS], ids=lambda p: p.stem)
def test_every_number_that_a_text_writes_out_is_one_of_its_rows(path, kept_rows):
    """Numbers of places stand in the text: ranks, updates, batches, alphas, widths and counts."""
    found, rows = kept_rows
    # ahead; bits a parameter, margins (1.16 is e to 0.15), the post's ratio, the first evaluation, points
    constants = {"0", "2", "3", "5", "0.1", "1.16", "0.9", "10", "15", "64", "100"}
    constants |= {
        "1",
        "70",
        "11",
        "35",
        "1e-5",
        "3e-5",
        "1000",
    }  # predictions in docs/learning_rates.md
    constants |= {"29", "7000", "4.4", "5.0", "6"}  # 1 - 1 / sqrt(2); what the next test looks up
    made_of = answers.findings if path == answers.TEXTS else answers.settings
    for text, made in zip(yaml.safe_load(path.read_text()), made_of(rows), strict=True):
        mine = {(r.sweep, r.scale) for r in made.used}
        near = [r for r in rows if (r.sweep, r.scale) in mine]
        used = {id(r): r for r in made.used}.values()
        known = {getattr(r, k) for r in near for k in ("rank", "updates", "batch_size", "alpha")}
        known = {f"{v:g}" for v in known if v is not None} | constants
        known |= {f"{h:g}" for a in found if (a.sweep, a.scale) in mine for h in a.runs.hidden_size}
        counts = [Counter((r.sweep, r.quantity) for r in of) for of in (near, used)]
        counts = (str(n) for count in counts for n in count.values())
        words = " ".join([*(r.at + r.data + r.base for r in near), *counts])
        known |= set(re.findall(r"\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", words)))
        known |= {f"{abs(v):g}" for r in used if r.verdict for v in r.verdict.margin}
        known |= {str(len(outcomes)) for outcomes in text.get("rests", {}).values()}
        keys = ("lead", "said", "more", "short", "start", "why", "tag", "set", "elsewhere")
        said = " ".join(str(text.get(k, "")) for k in keys)
        for line in text.get("measured", ()):
            said += " ".join(str(line.get(k, "")) for k in ("says", "place", "we"))
        # not numbers of rows: placeholders, commands, names
        bare = re.sub(r"\{.*?\}|`.*?`|\b(tiny\d+(-\w+)?|SmolLM2|2e-4)\b", "", said)
        bare = re.sub(r"(?<=\d),(?=\d{3})", "", bare)
        written = set(re.findall(r"(?<![\w.])\d+(?:\.\d+)?", bare))
        assert written <= known, (text.get("lead") or text["setting"], written - known)


def found_elsewhere():
    """What the page says of the search and of the adviser, from their kept results."""
    search = json.loads((KEPT / "search" / "search.json").read_text())["replays"]
    tune = [r["methods"]["tune"] for r in search]
    right = sum(round(t["searches"] * t["right"]) for t in tune)
    ends = sorted(f"{t['end']:.1f}" for t in tune)
    rates = (KEPT / "advice" / "README.md").read_text().partition("## Best learning rates")[2]
    of, hits = re.search(r"Of (\d+) rows (\d+) are hits", rates).groups()
    every = sum(t["searches"] for t in tune)
    return [
        f"{right:,} of {every:,} replayed searches cost less than 1%",
        f"a search ended after {ends[0]} to {ends[-1]} runs of full length per method",
        f"the range that `lorasweep advise` prints contains {hits} of {of}",
    ]


def test_the_ratio_on_the_real_model_is_of_every_kept_run_once(kept_rows, tmp_path):
    """14.2 [13.1, 15.3] by least squares with an intercept for each seed; ten is outside."""
    found, rows = kept_rows
    (one,) = pick(rows, "lr_ratio, all runs")
    real = [a.runs for a in found if a.scale == "small" and "objective" not in a.runs]
    runs = pd.concat(real).drop_duplicates("run_id")
    same = (runs["rank"] == 16) & (runs["alpha"] == 32) & (runs["method"] == "lora")
    same |= (runs["method"] == "fullft") & (runs["scope"] == "all")
    usable = same & (runs["layers"] == "attention+mlp+unembedding") & (runs["status"] == "done")
    assert one.estimate.n <= usable.sum() <= one.estimate.n + 3  # at collapsed learning rates
    assert 10 < one.estimate.low < 13.1 < 15.3 < one.estimate.high
    moved = [dataclasses.replace(a, folder=tmp_path / a.folder.name) for a in found]
    assert not plots_study.joined_rows(moved)  # somebody's own reports


def test_the_page_states_every_outcome_beside_what_was_expected(kept_rows):
    """Also of the search and the adviser; a cell fits on a line of a terminal."""
    _, rows = kept_rows
    texts = yaml.safe_load(answers.SETTINGS.read_text())
    assert [line[1] for text in texts for line in text.get("elsewhere", ())] == found_elsewhere()
    made = answers.settings(rows)
    assert all(len(cell) <= 100 for s in made for line in s.lines for cell in line)
    for text, s in zip(texts, made, strict=True):
        judged = {v.shown.lower() for r in s.used if (v := r.verdict)}
        for _, result, outcome in s.lines:
            assert outcome.startswith("measured") or outcome.partition(": ")[2] in judged, result
        assert len({line["of"] for line in text["measured"]}) <= len(s.lines)
        assert max(len(cell.split()) for cell in (s.start, s.why)) <= 15, s.setting
    asked = json.loads((KEPT / "recipes-tiny" / "question.json").read_text())["claims"]
    assert "2e-4" in asked["default_rate"]["text"]


def test_a_line_without_its_verdict_or_with_one_that_it_does_not_state_is_refused(kept_rows):
    known = answers.by_answer(kept_rows[1])
    of, ten = "regime-small: regret_percent", {"of": "lr_ratio-tiny: ratio", "show": "times"}
    for line in (
        {"of": of, "rank": 16, "show": "percent", "we": "a match"},  # no claim is named
        {"of": of, "rank": 16, "show": "percent", "claim": "real_17", "we": "a match"},
        ten,  # a claim whose outcome is not said
    ):
        with pytest.raises(TableError, match=r"verdicts on"):
            answers._lines(known, "{}", **line)
    ((place, said, outcome),), _ = answers._lines(known, "{} times", **ten, we="ten")
    assert (said, outcome) == ("4.2 [3.4, 5.2] times", "ten: refuted") and "tiny128" in place


def test_one_set_of_settings_is_recommended_everywhere(kept_rows):
    """By the search, the adviser, fleets and README; each with a claim that supports it."""
    r, made = recommended, {s.setting: s.start for s in answers.settings(kept_rows[1])}
    floors = [e["rank"] for e in rules.texts("published")["least_rank"] if e["task"] == "sft"]
    assert max(floors) == r.RANK == r.RANKS[0] and made["Rank"].startswith(f"{r.RANK};")
    assert made["Alpha"].startswith(f"{r.ALPHA}, ") and r.METHOD == "lora"
    assert made["Batch"].startswith(f"{r.BATCH['sft']} rows or fewer") and rules.SAFE == 32
    assert made["Layers"].lower().startswith("attention and mlp,") and r.LAYERS == "attention+mlp"
    request = compose(["+sweep=tune", "model=llama-3.2-1b", "dataset=tulu3"])
    arms = [p.spec.method for p in request.points if p.arm == "lora"]
    assert [(m.rank, m.layers, m.alpha) for m in arms] == [(k, r.LAYERS, r.ALPHA) for k in r.RANKS]
    run = request.points[0].spec
    assert (run.schedule, run.warmup_steps) == (r.SCHEDULE, 0) and run.batch_size <= r.BATCH["sft"]
    plan = plain_of(advice(examples=1000))
    assert (plan["layers"], plan["alpha"], plan["rank"]) == (r.LAYERS, r.ALPHA, r.RANK)
    for name, claims in r.SUPPORT.items():
        assert hasattr(r, name) and claims
        for place in claims:
            answer, _, claim = place.partition(": ")
            judged = pick(answers.by_answer(kept_rows[1])[answer], claim=claim)
            assert "SUPPORTED" in {row.verdict.outcome for row in judged}, place
    assert {*r.SUPPORT, "UPDATES"} == {k for k in vars(r) if k.isupper()} - {"SUPPORT"}


def test_pages_of_planted_answers_are_the_golden_ones(tmp_path):
    """Exploratory and withdrawn verdicts, a mixed claim, runs added after a look.

    To write them again: delete tests/golden/study, and run this test twice.
    """
    low = condition("b, 8 symbols, drawn anew", (4, 9.0), (8, 2.0))
    mark = {"exploratory": "stated later"}
    regime = [
        verdict(-0.01, outcome="SUPPORTED", claim="low", group="b, 8 symbols, drawn anew"),
        verdict(0.2, outcome="UNDECIDED", claim="growth_high", group="b, lists", why="too wide"),
        verdict(0.3, claim="growth_high", group="b, 8 symbols, drawn anew", **mark),
    ]
    task, size = "b on dialect, batch 16, steps 100", {"batch_size": 16, "updates": 100}
    arms = (("fullft", None, 1e-3), ("lora", 4, 3e-3), ("lora", 8, 5e-3))
    at = [
        dataclasses.replace(place("b on dialect", **size), task=task)
        if r is None
        else dataclasses.replace(place("b on dialect", **size), task=task, rank=r)
        for _, r, _ in arms
    ]
    at = [dataclasses.replace(w, arm=m + (f" r{r}" if r else "")) for w, (m, r, _) in zip(at, arms)]
    ratios = [row(at[k], "lr_ratio", 2.0 + k, 1.0, alpha=32.0) for k in (1, 2)]
    ratios += [row(at[k], "nats lost at 10 x FullFT's best LR", 0.02 * k) for k in (1, 2)]
    curves = [
        curve("b", method=m, rank=r, best_lr=lr, steps=100, where=w.plain())
        for w, (m, r, lr) in zip(at, arms)
    ]
    added = [{"arm": "lora", "what": "learning rate 1e-3", "why": "four were left"}]
    gone = verdict(-20.0, claim="tie", outcome="UNDECIDED", gates=WITHDRAWN)
    made = [
        answer(tmp_path, *regime, sweep="regime", data=RULES, rows=low),
        answer(tmp_path, sweep="lr_ratio", curves=curves, rows=ratios, added_after=added),
        *bases(tmp_path, [verdict(v, claim="parity") for v in (0.5, 0.6, 0.7)]),
        answer(tmp_path, gone, sweep="rl_bits", data=(FACTS,), withdrawn="an arm is missing, so"),
    ]
    read = read_answers([tmp_path])
    assert [r for a in read for r in a.rows] == [r for a in made for r in a.rows]
    texts = pages(made, tmp_path)
    texts.pop("ledger.md")  # the sentences of ledger.yaml, mostly not tested
    if not GOLDEN.is_dir():
        for name, text in texts.items():
            (GOLDEN / name).parent.mkdir(parents=True, exist_ok=True)
            (GOLDEN / name).write_text(text)
        pytest.fail("the golden pages were written: read them")
    files = (p for p in GOLDEN.rglob("*") if p.is_file())
    assert {str(p.relative_to(GOLDEN)): p.read_text() for p in files} == texts


def test_what_a_sweeps_file_says_of_its_answer_is_in_the_verdicts(reports):
    table, asked = kept_answer(reports / "rank-smoke")
    as_asked, plain = question_hash(asked), analyse(table, asked)
    first = "faster"
    asked["claims"][first]["exploratory"] = {"smoke": "the rule came later", "tiny": "no"}
    asked["withdrawn"] = "an arm is missing"
    found = analyse(table, asked)
    assert {v.claim for v in found.verdicts if v.exploratory} == {first}
    for v, as_judged in zip(found.verdicts, plain.verdicts):
        assert (v.outcome, v.shown) == ("UNDECIDED", "WITHDRAWN")
        assert [g["code"] for g in v.plain()["gates"]][:1] == ["WITHDRAWN"]
        assert v.estimate.plain() == as_judged.estimate.plain()
    assert next_runs.suggest(found) == []  # more seeds do not bring it back
    text = report.render(found, asked, table)
    assert "**WITHDRAWN**: an arm is missing." in text and "**REFUTED" not in text
    asked["claims"][first]["not_withdrawn"] = True
    again = {v.claim: v.shown for v in analyse(table, asked).verdicts}
    assert again.pop(first).endswith(" (exploratory)") and set(again.values()) == {"WITHDRAWN"}
    asked["claims"][first] |= {"text": "other", "planning": {"smoke": {"sd": 0.5, "units": 7}}}
    asked["claims"][first] |= {"if_supported": "a", "if_refuted": "b", "if_open": "c", "cost": "d"}
    assert question_hash(asked) == as_asked
    asked["claims"][first]["margin"] = [0.0, 1e9]
    assert question_hash(asked) != as_asked


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """drawn(draw, *given): the axes of the figure that draw(*given, path) saves."""

    def run(draw, *given):
        figures = []
        with monkeypatch.context() as patch:
            patch.setattr(plots.plt, "close", figures.append)
            draw(*given, tmp_path / "figure.png")
        return figures[0].axes

    return run


def test_a_bound_is_an_arrow_to_its_side_and_no_point(drawn):
    ends = [{"low": 0.9, "high": 1.1}, {"low": 2.0}, {"high": 3.0}, {"low": 1.0, "high": 4.0}]
    estimates = [Estimate(value, **e) for value, e in zip((1.0, None, None, None), ends)]
    estimates.append(Estimate(5.0, 4.5, 5.5, flags=(AT_LEAST,)))
    series = Series.of("rho", range(5), estimates)
    assert series.bounds == [0, 1, -1, 0, 1] and series.y == [1.0, 2.0, 3.0, None, 5.0]
    (ax,) = drawn(plots.panels, [Panel("t", "x", "y", [series])])
    found = [a for a in ax.get_children() if isinstance(a, Annotation)]
    ends = {(a.xy[0], a.xy[1]): a.xyann[1] for a in found}
    assert ends == {(1, 2.0): plots.ARROW, (2, 3.0): -plots.ARROW, (4, 5.0): plots.ARROW}
    points = np.array(ax.lines[0].get_ydata(), float)
    assert np.isfinite(points).tolist() == [True, False, False, False, False]


def runs():
    common = {"model": "m", "dataset": "dialect(rule_shift=0)", "batch_size": 4, "steps": 16}
    common |= {"steps_done": 16, "schedule": "constant", "seed": 0, "status": "done"}
    rows = []
    for method, rank in (("fullft", None), ("lora", 4)):
        for lr in 1e-3 * 2.0 ** np.arange(-2, 3):
            off = 0.1 * np.log(lr / 1.1e-3) ** 2
            curve = [{"step": s, "test_nll": 3 - 0.2 * np.log2(s) + off} for s in (1, 2, 4, 8, 16)]
            rows.append({**common, "method": method, "rank": rank, "lr": lr, "nll_start": 5.0})
            rows[-1] |= {"test_nll": curve[-1]["test_nll"], "result": json.dumps({"curve": curve})}
    return pd.DataFrame(rows)


def test_a_figure_of_cut_runs_shows_them_and_says_of_what_they_are_the_beginning(drawn):
    table = runs()
    optima = fit_all(lr_curves(at_step(at_step(table, 8), 4)))
    (ax,) = drawn(plots.learning, table, optima)
    curves = [line.get_xdata() for line in ax.lines if len(line.get_xdata()) > 2]
    assert len(curves) == 10 and all(max(x) == 4 for x in curves)
    words = "m on dialect (no new rules), batch 4, "
    assert ax.get_title() == title(optima[0].curve) == f"{words}first 4 of 16 updates"


def test_rewards_are_drawn_as_rewards_upwards_and_on_one_scale(drawn):
    """A loss of -0.4 is a reward of 0.4; an optimum at an edge is an arrow, its legend a bound."""
    metric = {"name": "test_reward", "higher_is_better": True, "label": "held-out reward"}
    found = []
    for name, height in (("a", 0.4), ("b", 0.8)):
        table = runs().assign(dataset=name, objective="policy_gradient", metric="test_reward")
        table["test_nll"] = table["test_nll"] - table["test_nll"].min() - height
        kept = json.dumps({"metric": metric, "curve": [{"step": 1, "test_nll": -height}]})
        found.append(table.assign(nll_start=-0.1, result=kept))
    table = pd.concat(found, ignore_index=True)
    optima = fit_all(lr_curves(table))
    for given in ((plots.lr_against_nll, optima), (plots.learning, table, optima)):
        one, other = drawn(*given)
        assert one.yaxis_inverted() and one.get_ylim() == other.get_ylim()
        assert one.get_ylabel().startswith("held-out reward")
        assert one.yaxis.get_major_formatter()(-0.4) == "0.4"
    table = runs()
    table["test_nll"] = 3 - 0.1 * np.log(table["lr"] / 1e-4)  # falls up to the highest rate
    (ax,) = drawn(plots.lr_against_nll, fit_all(lr_curves(table)))
    arrows = [a.xyann for a in ax.get_children() if isinstance(a, Annotation)]
    assert arrows == [(plots.ARROW, 0)] * 2
    assert all("best > " in t.get_text() for t in ax.get_legend().get_texts())


def test_every_kept_verdict_has_one_row_and_says_where_it_was_measured():
    rows, there = [], []
    for folder in planted.ANSWERS:
        results = json.loads((folder / "results.json").read_text())
        rows += rows_of(results, read_question(folder))
        there += results["verdicts"]
    assert [r.verdict.plain() for r in rows if r.verdict] == there
    columns = ("sweep", "scale", "task", "quantity", "arm", "rank", "batch_size", "updates")
    keys = [(*(getattr(r, c) for c in columns), r.alpha, r.claim) for r in rows]
    assert len(set(keys)) == len(keys)
    regime, beyond, both = Setting.IN_REGIME, Setting.BEYOND, "tiny128 and tiny64-skills"
    for sweep, claim, *where in (
        ("regime", "low", "tiny128", "rank 16, 256 updates", regime),
        ("rank", "alike", "tiny128", "ranks 1 to 32, to update 256", regime),
        ("large_batches", "at_512", "tiny64", "rank 8, after 12,288 examples", regime),
        ("rl_matrices", "top_rank", "tiny64-skilled", "rank 16, 100 updates", beyond),
        ("layers", "attention_everywhere", both, "128 to 256 updates", beyond),
        ("regime", "fits", "tiny128", "rank 1, 256 updates", regime),
        ("regime", "beyond", "tiny128", "rank 16, 256 updates", beyond),
        ("rl_bits", "one_bit", "tiny64-knows", "full fine-tuning, 200 updates", beyond),
    ):
        row = pick(rows, sweep=sweep, claim=claim, scale="tiny")[0]
        assert [row.base, row.at, row.setting] == where
    asked = (r for r in rows if r.sweep in ("regime", "rank", "rl_bits") and r.task != NO_CELL)
    ranks = {r.claim: r.rank for r in asked}
    known = [ranks[c] for c in ("beyond", "overfull", "better", "real", "parity", "one_bit")]
    assert known == [16, 1, 16, 64, 32, None]


def test_arms_of_one_rank_have_each_their_own_place():
    """They were joined by group and rank once, so that all had the ratio of the last one."""
    one = {"model": "b", "dataset": "dialect(x=1)", "method": "lora", "rank": 4.0, "steps": 8}
    layers = ("attention", "mlp", "attention+mlp")
    curves = [planted.lr_curve(*np.zeros((3, 1)), **one, layers=v) for v in layers]
    made = [Optimum(c, Estimate(None), None, ()) for c in curves]
    found = places_of(made, pd.DataFrame({"model": ["b"], "dataset": ["dialect(x=1)"]}))
    arms = [f"lora r4, {v}" for v in layers]
    assert [(w.arm, w.rank, w.updates, w.data) for w in map(found.get, map(id, made))] == [
        (arm, 4, 8, "dialect") for arm in arms
    ]


def test_an_answer_of_an_earlier_version_is_left_out_with_what_to_do(reports, tmp_path, capsys):
    shutil.copytree(reports / "rank-smoke", old := tmp_path / "rank-smoke")
    results = json.loads((old / "results.json").read_text())
    del results["rows"]
    (old / "results.json").write_text(json.dumps(results))
    assert read_answers([tmp_path]) == []
    assert "earlier version: judge it again" in capsys.readouterr().err


def test_a_fitted_line_ends_before_the_first_rate_at_which_a_run_broke_down(drawn):
    """One run of three at the fourth rate of six: the best rates are beyond it, and have no line."""
    one = runs().query("method == 'lora'").drop_duplicates("lr").sort_values("lr")
    rates, losses = 1e-4 * 2.0 ** np.arange(6), np.array([3.0, 2.6, 2.3, 2.1, 2.0, 2.05])
    table = pd.concat([one.iloc[[0]]] * 18, ignore_index=True)
    table = table.assign(lr=rates.repeat(3), seed=[0, 1, 2] * 6, test_nll=losses.repeat(3))
    table["test_nll"] += 0.01 * table["seed"]
    table.loc[10, ["status", "test_nll"]] = ["diverged", None]
    (ax,) = drawn(plots.lr_against_nll, fit_all(lr_curves(table)))
    (fitted,) = [line for line in ax.lines if len(line.get_xdata()) == 200]
    assert max(fitted.get_xdata()) == pytest.approx(rates[2])
    lines = [line for line in ax.lines if line.get_markerfacecolor() == "none"]
    hollow = {round(x, 8) for line in lines for x in line.get_xdata()}
    assert hollow == set(np.round(rates[3:], 8))

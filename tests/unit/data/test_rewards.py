"""Generated data: the dialect's shift, facts of 16 bits each, fingerprints; rewarded data sets: right,
wrong, unreadable answers, checks that hang, refused settings."""

import dataclasses
import importlib.util
import math
import os
import subprocess
import sys
import time
from decimal import Decimal
from functools import partial

import numpy as np
import psutil
import pytest

from lorasweep.data import rewards
from lorasweep.data import splits as data
from lorasweep.data.examples import answer_of, prompt_of, with_fingerprint
from lorasweep.data.rewards import MathChecks, boxed, integer, marked
from lorasweep.data.synthetic import dialect, generators
from lorasweep.errors import DataError, SpecError
from lorasweep.spec.run import validate
from lorasweep.spec.streams import stream
from lorasweep.work.inputs import check_available
from tests.small_hub import composed, deep, llama_like, problem, shipped
from tests.unit.data.test_data import jsonl, load, spec_of
from tests.world import wait_for, write_splits


def params(m, k, **more):
    return {"rule_shift": m / 32, "new_exceptions": 0.0, "shift_rank": k, **more}


@pytest.mark.parametrize(("m", "k"), [(8, 2), (8, 8), (32, 2), (32, 8)])
def test_every_shift_has_the_distance_the_rank_and_the_symbols_that_were_asked(m, k):
    language = dialect.transition(params(0, 0))
    for draw in (None, 100):
        table = dialect.transition(params(m, k, shift_nats=0.2), draw=draw)
        assert dialect.distance(table, language) == pytest.approx(0.2, rel=1e-5)
        assert np.allclose(table.sum(-1), 1) and table.min() >= 0
    assert np.array_equal(dialect.transition(params(0, k)), language)
    changed, before = (dialect.parts_of(p, draw=7) for p in (params(m, k), params(0, 0)))
    for new, old in zip(changed.feats_VF, before.feats_VF):
        assert np.linalg.matrix_rank(new - old, tol=1e-9) == k
        assert (np.abs(new - old).max(1) > 0).sum() == m
    if (m, k) == (8, 2):
        first, second = (dialect.transition(params(m, k), draw=d) for d in (100, 101))
        assert not np.array_equal(first, second)  # and (24/32)^2 of the contexts stay
        assert all(0.4 < (t == language).all(-1).mean() < 0.7 for t in (first, second))


def test_an_old_dialect_is_the_same_table():
    """Weighted sums of the tables, made by the code that trained the exploratory study's runs."""
    for old, total in (
        ({"rule_shift": 0.5, "new_exceptions": 0.3}, 13.638929920548115),
        ({"rule_shift": 0.25, "new_exceptions": 0.0, "language": 1.0}, 8.168247878034254),
    ):
        table = dialect.transition(old).ravel()
        assert table @ np.cos(np.arange(table.size)) == pytest.approx(total, abs=1e-6)


def test_bits_are_those_of_the_free_numbers_and_of_the_exceptions():
    n = 2**20
    for m, k, free in ((8, 2, 2 * (8 + 8 - 2)), (8, 8, 8 * 8), (0, 2, 0)):
        parts = dialect.parts_of(params(m, k))
        assert dialect.bits(parts, n) == {"generator": 2 * free / 2 * 20}
    parts = dialect.parts_of({"rule_shift": 0, "new_exceptions": 0.1})
    some = dialect.bits(parts, n)
    exceptions, replaced = int(parts.is_exception_VVV.sum()), int(parts.replaced_VVV.sum())
    which = math.log2(math.comb(exceptions, replaced))
    assert some["generator"] == pytest.approx(5 * replaced + which, rel=1e-9)


def test_the_exact_loss_has_the_same_mean():
    sampled = data.load(shipped("dialect_smoke", n_test=2048), [])
    exact = data.load(shipped("dialect_smoke", n_test=64, exact_loss=True), [])
    assert all(e.truth.probabilities.shape == (e.loss.sum(), 32) for e in exact.test)
    assert exact.entropy_floor_nats == pytest.approx(sampled.entropy_floor_nats, abs=0.03)
    changed = np.concatenate([e.truth.changed for e in exact.test])
    assert 0.7 < changed.mean() < 0.95  # half of the symbols are new: 1 - 1/4, and the exceptions


def test_with_draws_by_seed_all_seeds_share_one_fingerprint():
    asked = {"draw_by_seed": True, "exact_loss": True}
    whole = shipped("dialect_smoke", generator_params=params(8, 2), **asked)
    one, two = (data.load(whole, [], draw=d) for d in (100, 101))
    assert one.sha256 == two.sha256 == data.load(whole, []).sha256
    assert not np.array_equal(one.test[0].truth.probabilities, two.test[0].truth.probabilities)
    other = dataclasses.replace(whole, generator_params=params(8, 4))
    assert data.load(other, [], draw=100).sha256 != one.sha256


@pytest.mark.parametrize("name", ["dialect_smoke", "facts"])
def test_wrong_parameters_are_refused(name):
    given = {"shift_rank": 2}
    wrong = "shift_rank=9 shift_rank=1.5 shift=0.5 shift_nats=0 language=1.5"
    if name == "facts":
        given, wrong = {}, "facts=12 facts=30000 fact=8 fresh=2 max_length=60 set=0.5"
    for key, value in (one.split("=") for one in wrong.split()):
        changes = {"generator_params": {**given, key: float(value)}}
        if key == "max_length":
            changes = {key: int(value)}
        words = f"dataset '{name}.*{key}(={value}| is unknown).*Allowed"
        with pytest.raises(DataError, match=words):
            data.check_available(shipped(name, **changes), [])


def test_skills_have_right_answers():
    right = {"reverse": lambda s: s[::-1], "sort": lambda s: "".join(sorted(s))}
    rng = stream("test")
    for _ in range(300):
        prompt, answer = generators.instance(rng, 2)
        name, _, rest = prompt[:-1].partition(" ")
        if name in right:
            assert answer == right[name](rest)
        elif "+" in prompt:
            assert int(answer) == sum(map(int, prompt[:-1].split("+")))


facts = partial(shipped, "facts")


def symbols(rows, first=0):
    """The facts in rows, 8 symbols each, from the symbol `first` on."""
    return [tuple(r.tokens[k + first : k + 8]) for r in rows for k in range(0, 64, 8)]


def test_facts_are_shown_equally_often_and_hold_16_bits():
    loaded = data.load(facts(generator_params={"facts": 24}, n_retain=2), [])
    rows = loaded.train(0, 0, 12)  # 96 facts: four epochs of 24
    counts = {f: symbols(rows).count(f) for f in symbols(rows)}
    assert len(counts) == 24 and set(counts.values()) == {4}
    keys = {f[1:4] for f in counts}
    assert len(keys) == 24 and not keys & {f[1:4] for f in symbols(loaded.retain)}
    assert all(sum(r.loss) == 32 and r.loss[4] and not r.loss[3] for r in rows)
    assert set(symbols(loaded.test)) == set(counts) and max(max(f[4:]) for f in counts) < 16
    again = loaded.train(0, 6, 6)
    assert all((a.tokens == b.tokens).all() for a, b in zip(rows[6:], again))
    for n in (10, 24, 100):
        assert loaded.bits(4 * n) == {"generator": 16 * min(n, 24)}
    spec = facts(generator_params={"facts": 8192}, n_test=1024)  # the entropy of untrained values
    values = np.concatenate([e.tokens[e.loss] for e in data.load(spec, []).test])
    share = np.bincount(values, minlength=16) / len(values)
    assert -(share * np.log(share)).sum() == pytest.approx(math.log(16), abs=2e-3)


def test_fresh_rows_never_come_again_and_the_others_are_as_without_them():
    known = data.load(facts(generator_params={"facts": 24}), []).train(0, 0, 200)
    mixed = data.load(facts(generator_params={"facts": 24, "fresh": 0.25}), [])
    rows = mixed.train(0, 0, 200)
    new = [b for a, b in zip(known, rows) if (a.tokens != b.tokens).any()]
    assert 0.15 < len(new) / 200 < 0.35 and len(set(symbols(new, 1))) == 8 * len(new)
    assert all((a.tokens == b.tokens).all() for a, b in zip(rows[70:90], mixed.train(0, 70, 20)))
    assert mixed.bits is None


def few(name, **changes):
    return shipped(name, **{"n_test": 64, "n_test_curve": 16, **changes})


@pytest.mark.parametrize("name", ["dialect_few", "bandit", "facts", "skills"])
def test_generated_data_are_known_by_their_distribution_and_held_out_rows(name):
    params = few(name).generator_params
    other = {k: {"facts": 256.0, "difficulty": 3.0}.get(k, v / 2) for k, v in params.items()}
    changes = ({}, {}, {"generator_params": other}, {"n_test": 32})
    same, again, *others = (data.load(few(name, **c), []).sha256 for c in changes)
    assert same == again and len({same, *others}) == 3


def test_another_draw_changes_the_fingerprint_and_a_processors_last_digits_do_not(monkeypatch):
    before = data.load(few("skills"), []).sha256
    monkeypatch.setattr(generators, "instance", lambda rng, difficulty: ("copy a>", "a"))
    assert data.load(few("skills"), []).sha256 != before
    loaded = data.load(few("dialect"), [])
    table = dialect.transition(few("dialect").generator_params)
    noise = 1 + 1e-15 * np.random.default_rng(0).uniform(-1, 1, table.shape)
    assert with_fingerprint(loaded, (table * noise).astype("<f2")).sha256 == loaded.sha256
    assert with_fingerprint(loaded, (table * 1.01).astype("<f2")).sha256 != loaded.sha256


def test_every_context_has_one_hidden_label_of_sixteen_and_comes_once_an_epoch():
    def bandit(**params):
        return data.load(shipped("bandit", generator_params=params), [])

    loaded = bandit(contexts=4096)
    rows, labels = loaded.test, np.array([answer_of(r)[0] for r in loaded.test])
    assert len({tuple(prompt_of(r)) for r in rows}) == loaded.n_train == len(rows) == 4096
    counts = np.bincount(labels, minlength=16)
    assert len(counts) == 16 and ((counts - 256) ** 2 / 256).sum() < 37.7  # chi2(15), p = .001
    assert {tuple(r.tokens) for r in loaded.train(3, 0, 4096)} == {tuple(r.tokens) for r in rows}
    assert all((a.tokens == b.tokens).all() for a, b in zip(bandit(contexts=64).test, rows))
    one, two = (data.load(shipped("bandit_drawn"), [], draw=seed) for seed in (300, 301))
    assert one.sha256 == two.sha256 == data.load(shipped("bandit_drawn"), []).sha256
    assert not np.array_equal([e.tokens for e in one.test], [e.tokens for e in two.test])
    found = loaded.rewards.of([(rows[0], np.array([a])) for a in range(48)])
    assert [k for k, reward in enumerate(found) if reward] == [labels[0]] and max(found) == 1.0


def test_a_word_is_answered_by_its_skill_and_ends_its_line():
    loaded = data.load(shipped("words"), [])
    text = "\n abcdefghijklmnopqrstuvwxyz0123456789+-*=:>.?"
    for row in loaded.test[:200]:
        word, letters = "".join(text[t] for t in prompt_of(row)).removesuffix(">").split()
        answer = "".join(text[t] for t in answer_of(row))
        skill = {"cort": sorted(letters), "sverse": letters[::-1], "sopy": letters}[word]
        assert answer == "".join(skill) + "\n" and len(letters) in (4, 5)
        given = [(row, answer_of(row)), (row, answer_of(row)[:-1])]  # with and without its end
        assert loaded.rewards.of(given) == [1.0, 0.0]
    rewards.check_rows(shipped("words"), loaded, 6)


def test_whole_numbers_marks_and_boxes_are_read_exactly():
    numbers = {"so 3+4\n#### 7": 7, "#### 1,234": 1234, r"is \boxed{\$18.}": 18, "#### $-5.00": -5}
    numbers |= {"#### -0": 0, "#### \u0663": 3, "seven": None, r"\boxed{7": None}
    numbers["#### " + "9" * 4400] = Decimal("9" * 4400)  # int() refuses more than 4,300 digits
    numbers[r"\boxed{" * 5000 + "7" + "}" * 5000] = 7
    others = ("1/2", "0.5", "7 apples", "\u00b2", "1e9", "inf", "\u2028")
    numbers |= {f"#### {text}": None for text in others}
    assert {text: integer(text) for text in numbers} == numbers
    assert boxed(r"\boxed{1} or \boxed{\{2, 3\}}.") == r"\{2, 3\}"
    assert boxed(r"so $\boxed 7$") == "7" and boxed(r"\fbox{a{b}c}") == "a{b}c"
    assert boxed(r"\boxed{\frac{1}{2}") is None and boxed("none") is None
    assert marked("a #### 1\n#### 2,000 \n") == "2000" and marked("none ####") is None


def test_text_is_rewarded_by_its_number_and_a_gold_answer_must_be_readable(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": f"so\n#### {i},000"} for i in range(4)]
    loaded = jsonl(tmp_path, rows, verifier="integer")
    said = ("#### 1000", "#### 1", "one", "#### " + "7" * 4400)
    given = [(loaded.test[1], np.array(list(text.encode()))) for text in said]
    assert loaded.rewards.of(given) == [1.0, 0.0, None, 0.0]
    spec = shipped("gsm8k", verifier="integer", max_length=64)
    rewards.check_rows(spec, loaded, 16)
    unread = jsonl(tmp_path, [*rows, {"prompt": "p", "completion": "many"}], verifier="integer")
    for found, new_tokens, words in (
        (loaded, 62, r"row 0: its prompt.* 3 tokens.*Set dataset.max_length=65"),
        (unread, 16, r"row 4: the gold answer of the row cannot be read"),
    ):
        with pytest.raises(DataError, match=words):
            rewards.check_rows(spec, found, new_tokens)


def test_a_row_with_two_answers_in_the_loss_has_no_prompt_to_reward(tmp_path):
    said = [{"role": r, "content": "2+2? #### 4"} for r in ("user", "assistant") * 2]
    spec = {"source": "jsonl", "location": "mine", "revision": "", "holdout": 0}
    spec = shipped("tulu3", **spec, mask="completion", verifier="integer")
    write_splits(tmp_path / "mine", [{"messages": said}])
    with pytest.raises(DataError, match=r"row 0 has 2 answers in the loss.*\"weight\": 0"):
        rewards.check_rows(spec, data.load(spec, [str(tmp_path)], llama_like()), 16)


RL = ("model=tiny64-knows", "dataset=bandit", "objective=policy_gradient", "batch_size=32")
SIZES = ("group_size=4", "max_new_tokens=1")


@pytest.mark.parametrize(
    "more, words",
    [
        *((wrong, wrong) for wrong in ("group_size=1", "group_size=5", "max_new_tokens=5")),
        ("objective=sft", "objective='?sft"),
        ("dataset=facts", r"'facts' has no verifier.*bandit, words"),
        ("dataset.mask=all", "mask=all"),
        ("dataset.generator_params.contexts=0", r"generator_params.contexts=0"),
    ],
)
def test_what_cannot_be_rewarded_is_refused_before_anything_starts(compose, more, words):
    check_available(compose(*RL, *SIZES, "exec.world_size=2"))
    with pytest.raises((DataError, SpecError), match=words):
        check_available(compose(*RL, *SIZES, more))


# ---------------------------------------------------------------- processes that check answers

HANGS = r"\binom{10000000}{5000000}"
DIGITS = "9" * 4400


def children(of=None):
    """Ids of the processes that check answers for a process."""
    every = [p.info for p in psutil.process_iter(["pid", "ppid", "cmdline"])]
    mine = [p for p in every if p["ppid"] == (of or os.getpid())]
    return {p["pid"] for p in mine if "math_worker" in " ".join(p["cmdline"] or ())}


def test_answers_are_right_wrong_or_unread():
    checks = MathChecks(1)
    right = [(r"\frac{1}{2}", "0.5"), (r"\frac{1}{2}", r"\dfrac12"), ("x^2+1", "1+x^2")]
    right += [(r"\text{(C)}", "C"), ("Yes", "Yes"), (DIGITS, DIGITS)]
    wrong = [("10", "11"), ("(1,2]", "[1,2)"), ("Yes", "No"), (r"\infty", r"-\infty")]
    odd = ("1e99999999999", "nan", r"\frac{1}{0}", "\u0663", DIGITS)
    wrong += [(DIGITS, "7"), *(("7", answer) for answer in odd)]
    assert checks.check(right) == [1.0] * len(right) and checks.check(wrong) == [0.0] * len(wrong)
    assert not any(checks.check([pair for gold, _ in right for pair in ((gold, ""), ("", gold))]))
    assert checks.check([("7", ""), ("", "7")]) == [None, None]


def test_a_check_that_hangs_or_crashes_is_ended_and_the_next_one_is_right():
    before = children()
    checks = MathChecks(1, limit_s=5)
    assert checks.check([("2", "2")]) == [1.0]
    (first,), files = children() - before, len(os.listdir("/proc/self/fd"))
    started = time.monotonic()
    assert checks.check([("7", HANGS), ("4", "4"), ("7", "7"), ("7", HANGS)]) == [None, 1, 1, None]
    assert time.monotonic() - started > 5  # the last one was known
    (second,) = children() - before
    assert second != first
    os.kill(second, 9)
    assert checks.check([("5", "5"), ("7", HANGS)]) == [1.0, None]
    assert len(os.listdir("/proc/self/fd")) == files  # those of processes that ended are closed
    del checks
    wait_for(lambda: children() == before)


def test_processes_end_with_the_one_that_asks_even_while_one_hangs():
    """Killed, it cannot end them itself: the alarm does, also where a launcher blocks it."""
    code = (
        "import signal as s\ns.pthread_sigmask(s.SIG_BLOCK, [s.SIGALRM])\n"
        "from lorasweep.data.rewards import MathChecks as M\n"
        "m = M(1, 3.0)\nprint(m.check([('1', '1')]), flush=True)\nm.check([('7', '9^{9^{9^{9}}}')])"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout.readline() == b"[1.0]\n"
    (worker,) = children(parent.pid)
    time.sleep(0.3)
    parent.kill()
    parent.communicate()
    every = partial(psutil.process_iter, ["cmdline"])  # one that nobody waits for has an empty one
    wait_for(lambda: not any(p.pid == worker and p.info["cmdline"] for p in every()))


def test_a_verifier_that_does_not_start_is_said(monkeypatch):
    monkeypatch.setattr(rewards.sys, "executable", "/bin/false")
    with pytest.raises(DataError, match="no process starts"):
        MathChecks(1).check([("1", "1")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match="verifier=math needs math_verify"):
        rewards.check_available(shipped("math_reward"))


def encoded(text):
    return np.array(llama_like()(text, add_special_tokens=False).input_ids)


def given(loaded, row, *texts):
    return loaded.rewards.of([(row, encoded(text)) for text in texts])


def math_in(hub, name="MATH", wrong=None):
    def rows(k):
        own = [problem(k), problem(k + 1)]
        return own if wrong is None else [*own, {**own[0], "solution": wrong}]

    spec = spec_of("math_reward", "")
    held_out = [{"problem": "Why?", "solution": r"It is late: $\boxed{x^2 + 1}$", "answer": "no"}]
    where = hub(f"{name}500", {"default": {"test": held_out}})
    kinds = spec.config.split("+")
    path = hub(name, {kind: {"train": rows(0), "test": rows(9)} for kind in kinds})
    return spec_of("math_reward", path, test_location=where, test_revision="", n_test=1)


def test_an_answer_to_math_is_what_stands_in_its_last_box(hub):
    spec = math_in(hub)
    loaded = load(spec, llama_like())
    (row,) = loaded.test
    said = [r"so \boxed{1 + x^2}", r"\boxed{3} no, \boxed{x^2+1}." + "\n\nUser:", r"\boxed{x^2}"]
    assert given(loaded, row, *said, "x^2 + 1", r"\boxed{x^2") == [1.0, 1.0, 0.0, None, None]
    end = tuple(encoded("User:"))
    assert loaded.rewards.ends == ((llama_like().eos_token_id,), end)
    assert tuple(answer_of(row)[-len(end) :]) == end
    rewards.check_rows(spec, loaded, 512)
    assert len(prompt_of(row)) + len(answer_of(row)) == len(row.tokens)
    spec = math_in(hub, "damaged", wrong="It is late, and nothing is in a box.")
    with pytest.raises(DataError, match=r"'math_reward', training row \d+: the gold answer"):
        rewards.check_rows(spec, load(spec, llama_like()), 512)


def test_the_gold_answer_of_deepmath_is_a_column_and_needs_no_box(hub):
    answers = [r"\dfrac{\pi}{2}", "Yes", r"\infty", "0", "(0, 1)", "7"]
    rows = [{**deep(k), "final_answer": answer} for k, answer in enumerate(answers)]

    def loaded(name, rows):
        path = hub(name, {"default": {"train": rows}})
        spec = spec_of("deepmath_reward", path, n_test=2, holdout=2)
        found = load(spec, llama_like())
        rewards.check_rows(spec, found, 8192)
        return found

    whole = loaded("deep", rows)
    for row in whole.test:
        gold = llama_like().decode(answer_of(row)).removesuffix("User:").strip()
        box = rf"<think> </think> \boxed{{{gold}}}" + "\n\n"
        # a sampled answer needs one, also if it is the gold answer's very text
        assert given(whole, row, box, r"\boxed{-123}", gold, "") == [1.0, 0.0, None, None]
    with pytest.raises(DataError, match=r"row \d+: the gold answer of the row cannot be read"):
        loaded("none", [*rows, {**rows[0], "final_answer": " "}])
    spec = dataclasses.replace(composed("deepmath"), dataset=shipped("deepmath", verifier="math"))
    with pytest.raises(SpecError, match="completion_field"):
        validate(spec)

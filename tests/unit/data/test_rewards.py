"""Rewarded data sets: right, wrong, unreadable answers, checks that hang, refused settings."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
import time
from decimal import Decimal
from functools import partial

import numpy as np
import psutil
import pytest

from lorasweep.cli.plans import check_available
from lorasweep.data import load as data
from lorasweep.data import rewards
from lorasweep.data.examples import answer_of, prompt_of
from lorasweep.data.rewards import MathChecks, boxed, integer, marked
from lorasweep.errors import DataError, SpecError
from lorasweep.spec.run import validate
from tests.small_hub import deep, llama_like, problem
from tests.unit.data.conftest import composed, shipped
from tests.unit.data.test_data import jsonl, load, spec_of
from tests.world import wait_for, write_splits


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


# ---------------------------------------------------------------- data sets of the hub


def encoded(text):
    return np.array(llama_like()(text, add_special_tokens=False).input_ids)


def given(loaded, row, *texts):
    return loaded.rewards.of([(row, encoded(text)) for text in texts])


def math(hub, name="MATH", wrong=None):
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
    spec = math(hub)
    loaded = load(spec, llama_like())
    (row,) = loaded.test
    said = [r"so \boxed{1 + x^2}", r"\boxed{3} no, \boxed{x^2+1}." + "\n\nUser:", r"\boxed{x^2}"]
    assert given(loaded, row, *said, "x^2 + 1", r"\boxed{x^2") == [1.0, 1.0, 0.0, None, None]
    end = tuple(encoded("User:"))
    assert loaded.rewards.ends == ((llama_like().eos_token_id,), end)
    assert tuple(answer_of(row)[-len(end) :]) == end
    rewards.check_rows(spec, loaded, 512)
    assert len(prompt_of(row)) + len(answer_of(row)) == len(row.tokens)
    spec = math(hub, "damaged", wrong="It is late, and nothing is in a box.")
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

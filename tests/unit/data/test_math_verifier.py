"""Mathematical answers are compared in separate processes; one that hangs is ended."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given as any_of
from hypothesis import settings
from hypothesis import strategies as st

from lorasweep.data import rewards
from lorasweep.data.examples import answer_of, prompt_of
from lorasweep.data.verifiers import math_checks
from lorasweep.data.verifiers.math_checks import MathChecks
from lorasweep.errors import DataError, SpecError
from lorasweep.spec.run import validate
from tests.bpe import llama_like
from tests.small_hub import deep
from tests.unit.data.shipped import composed, shipped
from tests.unit.data.test_rewards import PIECES
from tests.unit.data.test_study_data import load, problem, spec_of

HANGS = r"\binom{10000000}{5000000}"
DIGITS = "9" * 4400
TOWER = "9^{9^{9^{9}}}"


def children(of=None):
    """Ids of the processes that check answers for a process."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_text()
        except OSError:
            continue
        if parent == (of or os.getpid()) and "math_worker" in command:
            found.add(int(folder.name))
    return found


def running(process):
    """Whether a process has not ended; one that nobody waits for has an empty command line."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_text())
    except OSError:
        return False


@pytest.fixture(scope="module")
def checks():
    return MathChecks(1)


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        ("7", "1e99999999999", 0.0),
        ("7", "nan", 0.0),
        ("7", r"\frac{1}{0}", 0.0),
        ("7", "\u0663", 0.0),
        (r"\frac{1}{2}", "0.5", 1.0),
        (r"\frac{1}{2}", r"\dfrac12", 1.0),
        ("x^2+1", "1+x^2", 1.0),
        ("10", "11", 0.0),
        ("(1,2]", "[1,2)", 0.0),
        (r"\text{(C)}", "C", 1.0),
        ("Yes", "Yes", 1.0),
        ("Yes", "No", 0.0),
        (r"\infty", "-\\infty", 0.0),
        ("7", "", None),
        ("", "7", None),
        ("7", DIGITS, 0.0),
        (DIGITS, DIGITS, 1.0),
        (DIGITS, "7", 0.0),
    ],
)
def test_answers_are_right_wrong_or_unread(checks, gold, answer, verdict):
    assert checks.check([(gold, answer)]) == [verdict]


@settings(max_examples=40, deadline=None)
@any_of(answer=st.text() | st.lists(PIECES, max_size=8).map("".join))
def test_no_answer_makes_a_check_raise(checks, answer):
    assert checks.check([("7", answer)])[0] in (0.0, 1.0, None)


def test_a_check_that_hangs_or_crashes_is_ended_and_the_next_one_is_right():
    before = children()
    checks = MathChecks(1, limit_s=5)
    assert checks.check([("2", "2")]) == [1.0]
    (first,) = children() - before
    started = time.monotonic()
    assert checks.check([("7", HANGS), ("4", "4"), ("7", "7"), ("7", HANGS)]) == [None, 1, 1, None]
    assert time.monotonic() - started > 5  # the last one was known
    (second,) = children() - before
    assert second != first
    os.kill(second, 9)
    assert checks.check([("5", "5"), ("7", HANGS)]) == [1.0, None]
    del checks
    assert children() == before


def test_processes_end_with_the_one_that_asks_even_while_one_hangs():
    """Killed, it cannot end them itself: the alarm does."""
    code = (
        "from lorasweep.data.verifiers.math_checks import MathChecks as M\n"
        "m = M(1, 5.0)\nprint(m.check([('1', '1')]), flush=True)\n"
        f"m._free.queue[0]._limit_s = 999\nm.check([('7', {TOWER!r})])"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout.readline() == b"[1.0]\n"
    (worker,) = children(parent.pid)
    time.sleep(0.3)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 90
    while running(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running(worker)


def test_a_verifier_that_does_not_start_is_said(monkeypatch):
    monkeypatch.setattr(math_checks.sys, "executable", "/bin/false")
    with pytest.raises(DataError, match="does not start"):
        MathChecks(1).check([("1", "1")])
    monkeypatch.setattr(math_checks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"math-verify.*pip install 'lorasweep\[rl\]'"):
        rewards.check_available(shipped("math_reward"))


# ---------------------------------------------------------------- the study's data sets


def encoded(text):
    return np.array(llama_like()(text, add_special_tokens=False).input_ids)


def given(loaded, row, *texts):
    return loaded.rewards.of([(row, encoded(text)) for text in texts])


def math(hub, name="MATH", wrong=None):
    def rows(kind, k):
        own = [problem(f"{k + i}", kind) for i in range(2)]
        return own if wrong is None else [*own, {**own[0], "solution": wrong}]

    spec = spec_of("math_reward", "")
    held_out = [{"problem": "Why?", "solution": r"It is late: $\boxed{x^2 + 1}$", "answer": "no"}]
    where = hub(f"{name}500", {"default": {"test": held_out}})
    kinds = spec.config.split("+")
    path = hub(name, {kind: {"train": rows(kind, 0), "test": rows(kind, 9)} for kind in kinds})
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


def test_a_gold_answer_that_cannot_be_read_is_named(hub):
    spec = math(hub, "damaged", wrong="It is late, and nothing is in a box.")
    loaded = load(spec, llama_like())
    with pytest.raises(DataError, match=r"'math_reward', training row \d+: its own gold answer"):
        rewards.check_rows(spec, loaded, 512)


def test_the_gold_answer_of_deepmath_is_a_column_and_needs_no_box(hub):
    answers = [r"\dfrac{\pi}{2}", "Yes", r"\infty", "0", "(0, 1)", "7"]
    rows = [{**deep(k), "final_answer": answer} for k, answer in enumerate(answers)]
    path = hub("deep", {"default": {"train": rows}})
    spec = spec_of("deepmath_reward", path, n_test=2, holdout=2)
    loaded = load(spec, llama_like())
    rewards.check_rows(spec, loaded, 8192)
    order = [llama_like().decode(answer_of(r)).removesuffix("User:").strip() for r in loaded.test]
    for row, gold in zip(loaded.test, order):
        box = rf"<think> </think> \boxed{{{gold}}}" + "\n\n"
        # a sampled answer needs one, also if it is the gold answer's very text
        assert given(loaded, row, box, r"\boxed{-123}", gold, "") == [1.0, 0.0, None, None]
    empty = hub("none", {"default": {"train": [*rows, {**rows[0], "final_answer": " "}]}})
    spec = spec_of("deepmath_reward", empty, n_test=2, holdout=2)
    with pytest.raises(DataError, match=r"row \d+: its own gold answer cannot be read"):
        rewards.check_rows(spec, load(spec, llama_like()), 8192)


def test_a_gold_answer_that_the_reward_would_not_read_is_refused():
    spec = dataclasses.replace(composed("deepmath"), dataset=shipped("deepmath", verifier="math"))
    with pytest.raises(SpecError, match="completion_field=final_answer"):
        validate(spec)


def test_gsm8k_with_the_studys_prompt_is_read_in_a_box_or_behind_its_mark(hub):
    rows = [{"question": "So?", "answer": f"It is <<2*3=6>>6.\n#### {n}"} for n in ("6", "1,200")]
    where = hub("gsm8k", {"main": {"train": rows, "test": rows}})
    spec = spec_of("gsm8k_boxed_reward", where, n_test=2)
    loaded = load(spec, llama_like())
    rewards.check_rows(spec, loaded, 256)
    learned = llama_like().decode(answer_of(loaded.test[0]))
    assert learned == " It is <<2*3=6>>6.\n#### 6\n\nUser:"
    said = (r"it is \boxed{1200}" + "\n\nUser:", "#### 1,200", r"\boxed{12}", "1200")
    assert given(loaded, loaded.test[1], *said) == [1.0, 1.0, 0.0, None]

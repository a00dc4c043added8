"""Rewarded data sets: right, wrong and unreadable answers, and settings that are refused."""

import dataclasses
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasweep.config.preflight import check_available
from lorasweep.data import load as data
from lorasweep.data import rewards
from lorasweep.data.examples import answer_of, prompt_of
from lorasweep.data.rewards import boxed, integer, marked
from lorasweep.errors import DataError, SpecError
from lorasweep.spec.run import validate
from tests.unit.data.shipped import shipped
from tests.unit.data.test_data import jsonl


def test_every_context_has_one_hidden_label_of_sixteen_and_comes_once_an_epoch():
    loaded = data.load(shipped("bandit", generator_params={"contexts": 4096}), [])
    rows = loaded.test
    assert len({tuple(prompt_of(r)) for r in rows}) == loaded.n_train == len(rows) == 4096
    labels = np.array([answer_of(r)[0] for r in rows])
    counts = np.bincount(labels, minlength=16)
    assert len(counts) == 16 and ((counts - 256) ** 2 / 256).sum() < 37.7  # chi2(15), p = .001
    epoch = loaded.train(3, 0, 4096)
    assert {tuple(r.tokens) for r in epoch} == {tuple(r.tokens) for r in rows}
    fewer = data.load(shipped("bandit", generator_params={"contexts": 64}), [])
    assert all((a.tokens == b.tokens).all() for a, b in zip(fewer.test, rows))
    other = data.load(shipped("bandit", generator_params={"set": 1}), [])
    assert other.sha256 != fewer.sha256
    of = loaded.rewards.of
    assert sum(of([(rows[0], np.array([a])) for a in range(48)])) == 1.0
    assert of([(rows[0], labels[:1])]) == [1.0]


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


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3+4\n#### 7", 7),
        ("#### 1,234", 1234),
        (r"is \boxed{\$18.}", 18),
        ("#### $-5.00", -5),
        ("#### -0", 0),
        ("#### \u0663", 3),
        ("seven", None),
        (r"\boxed{7", None),
        *(
            (f"#### {t}", None)
            for t in ("1/2", "0.5", "7 apples", "\u00b2", "1e9", "inf", "\u2028")
        ),
        # int() refuses more than 4,300 digits
        ("#### " + "9" * 4400, Decimal("9" * 4400)),
        (r"\boxed{" * 5000 + "7" + "}" * 5000, 7),
    ],
)
def test_whole_numbers_are_read_exactly(text, number):
    assert integer(text) == number


def test_marks_and_boxes_are_read():
    assert boxed(r"\boxed{1} or \boxed{\{2, 3\}}.") == r"\{2, 3\}"
    assert boxed(r"so $\boxed 7$") == "7" and boxed(r"\fbox{a{b}c}") == "a{b}c"
    assert boxed(r"\boxed{\frac{1}{2}") is None and boxed("none") is None
    assert boxed(r"\boxed" + "{" * 5000 + "7" + "}" * 5000) == "{" * 4999 + "7" + "}" * 4999
    assert marked("a #### 1\n#### 2,000 \n") == "2000" and marked("none ####") is None


PIECES = st.sampled_from(
    [*"{}^_/\\$,.-07 \n\x00\x85", "\u0663", "\u00b2", "\u2028", "9" * 4301, "1e999", "inf", "nan"]
    + ["#### ", r"\boxed", r"\fbox", r"\{", r"\frac"]
)
"""Pieces of solutions, and characters that break readers of numbers."""


@given(st.text() | st.lists(PIECES).map("".join))
def test_no_text_makes_a_reader_raise(text):
    for solution in (text, f"#### {text}", rf"\boxed{{{text}}}", rf"\boxed {text}"):
        number, box, marked_ = integer(solution), boxed(solution), marked(solution)
        assert number is None or number == number.to_integral_value()
        assert all(isinstance(found, str | None) for found in (box, marked_))


def test_an_answer_of_very_many_digits_is_wrong_and_right_if_it_is_the_gold_one(tmp_path):
    digits = "7" * 4400
    rows = [{"prompt": f"p{i}", "completion": f"#### {d}"} for i, d in enumerate(("5", digits))]
    loaded = jsonl(tmp_path, rows * 2, verifier="integer", max_length=9000)
    for row in loaded.test[:2]:
        long = len(answer_of(row)) > 4400
        said = [(row, np.array(list(f"#### {d}".encode()))) for d in ("5", digits, digits + "0")]
        assert loaded.rewards.of(said) == [float(not long), float(long), 0.0]


def test_text_is_rewarded_by_its_number_and_a_gold_answer_must_be_readable(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": f"so\n#### {i},000"} for i in range(4)]
    loaded = jsonl(tmp_path, rows, verifier="integer")
    row = loaded.test[1]

    def of(text):
        return loaded.rewards.of([(row, np.array(list(text.encode())))])[0]

    assert (of("#### 1000"), of("#### 1"), of("one")) == (1.0, 0.0, None)
    spec = shipped("gsm8k", verifier="integer", max_length=64)
    rewards.check_rows(spec, loaded, 16)
    with pytest.raises(
        DataError, match=r"row 0: its prompt, the longest, has 3 tokens.*Set dataset.max_length=65"
    ):
        rewards.check_rows(spec, loaded, 62)
    unread = jsonl(tmp_path, [*rows, {"prompt": "p", "completion": "many"}], verifier="integer")
    with pytest.raises(DataError, match=r"row 4: its own gold answer cannot be read"):
        rewards.check_rows(spec, unread, 16)


RL = ("model=tiny64-knows", "dataset=bandit", "objective=policy_gradient", "batch_size=32")
SIZES = ("group_size=4", "max_new_tokens=1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "group_size=1.*Expected at least 2"),
        ({"group_size": 5}, "batch_size=32: expected a multiple of group_size=5"),
        ({"max_new_tokens": 5}, "max_new_tokens=5.*less than dataset.max_length=5"),
        ({"objective": "sft"}, "group_size=4 has no effect with objective=sft"),
        ({"objective": "dpo"}, "objective='dpo'. Allowed: sft, policy_gradient"),
        ({"reward_scale": "batch"}, "Allowed: none, group"),
        ({"ratio_level": "batch"}, "Allowed: token, sequence"),
        ({"clip_ratio": 0.0}, "clip_ratio=0.0: expected a number above 0"),
        ({"kl_weight": -1.0}, "kl_weight=-1.0"),
    ],
)
def test_settings_of_sampling_are_checked(compose, changes, message):
    spec = compose(*RL, *SIZES).points[0].spec
    validate(spec)
    with pytest.raises(SpecError, match=message):
        validate(dataclasses.replace(spec, **changes))


def test_what_cannot_be_rewarded_is_refused_before_anything_starts(compose):
    check_available(compose(*RL, *SIZES))
    facts = [o.replace("bandit", "facts") for o in RL]
    with pytest.raises(DataError, match=r"'facts' has no verifier.*bandit, words"):
        check_available(compose(*facts, *SIZES))
    with pytest.raises(DataError, match="mask=all does not say"):
        check_available(compose(*RL, *SIZES, "dataset.mask=all"))
    check_available(compose(*RL, *SIZES, "exec.world_size=2"))
    with pytest.raises(SpecError, match=r"exec.world_size=2 with kl_weight"):
        check_available(compose(*RL, *SIZES, "exec.world_size=2", "kl_weight=0.1"))
    with pytest.raises(DataError, match=r"generator_params.contexts=0"):
        check_available(compose(*RL, *SIZES, "dataset.generator_params.contexts=0"))

"""Exact answers: which texts are right, and the intervals of their counts."""

import itertools
import json
from math import comb
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import beta, binomtest, multinomial

from lorasweep.data.splits import load
from lorasweep.fleet.score import KEPT, Questions, count, counts
from lorasweep.spec.dataset import DatasetSpec
from tests.customers import CHAT_TEMPLATE
from tests.small_hub import llama_like
from tests.world import tiny_spec, write_json


def counted(gained, lost, n, kept=0, of=0):
    stays = [(True, True)] * kept + [(False, False)] * (n - gained - lost - kept)
    pairs = [(False, True)] * gained + [(True, False)] * lost + stays
    return counts([b for b, _ in pairs], [a for _, a in pairs], of or n)


def test_counts_in_words_and_clopper_pearsons_interval():
    found = counted(11, 0, 12, of=812)
    said = "0 of 12 before, 11 of 12 after [62%, 100%]; difference 92 points [35, 100] "
    assert found["text"] == said + "(the first 12 of 812 test prompts)"
    for k, n in ((0, 1), (11, 12), (12, 12), (57, 200)):
        low, high = binomtest(k, n).proportion_ci(0.95, "exact")
        assert counted(k, 0, n)["share"] == pytest.approx([low, high], abs=1e-6)


@pytest.mark.parametrize("gained, lost, n", [(1, 7, 21), (11, 0, 12), (3, 2, 50), (48, 2, 200)])
def test_the_difference_is_by_the_published_definition(gained, lost, n):
    """Fay and Lumbard (2021), by random draws as in exact2x2::mcnemarExactDP(nmc=...)."""
    m, rng = gained + lost, np.random.default_rng(0)

    def lower(x):
        net = 2 * beta.rvs(x, m - x + 1, size=400_000, random_state=rng) - 1 if x else -1.0
        shares = (beta.rvs(m + i, n - m + 1 - i, size=400_000, random_state=rng) for i in range(2))
        return 100 * min(np.quantile(share * net, 0.025) for share in shares)

    found = counted(gained, lost, n, kept=1 if gained + lost < n else 0)["difference"]
    assert found == pytest.approx([100 * (gained - lost) / n, lower(gained), -lower(lost)], abs=0.3)


@pytest.mark.parametrize("n", [1, 5, 12])
def test_each_limit_misses_the_true_difference_in_at_most_one_case_of_forty(n):
    """Enumerated; and the interval excludes 0 where McNemar's exact test is significant."""
    pairs = [(g, c) for g in range(n + 1) for c in range(n + 1 - g)]
    limits = np.array([counted(g, c, n)["difference"][1:] for g, c in pairs]) / 100
    for (g, c), (low, high) in zip(pairs, limits):
        m, k = g + c, max(g, c)
        p = min(1.0, 2 * sum(comb(m, i) for i in range(k, m + 1)) / 2**m)
        assert (low > 1e-3 or high < -1e-3) == (p <= 0.05), (g, c)
    counts_ = np.array([(g, c, n - g - c) for g, c in pairs])
    for theta, share in itertools.product(np.linspace(0, 1, 26), repeat=2):
        p = np.array([theta * share, theta * (1 - share), 1 - theta])
        weights = multinomial.pmf(counts_, n, p)
        missed = [limits[:, 0] > p[0] - p[1] + 1e-9, limits[:, 1] < p[0] - p[1] - 1e-9]
        assert max(weights @ miss for miss in missed) <= 0.025 + 5e-4


def asked(folder, rows, tokenizer, **changes):
    write_json(folder / "test.jsonl", rows)
    form = {"n_test": len(rows), "n_validation": 0, "train_split": "test", **changes}
    spec = tiny_spec(dataset=DatasetSpec("rows", "jsonl", str(folder), **form))
    data = load(spec.dataset, ["."], tokenizer)
    base = SimpleNamespace(tokenizer=tokenizer)
    trainer = SimpleNamespace(base=lambda *_: base, data=lambda *_: data)
    return Questions(spec, SimpleNamespace(exec=None), trainer), data


@pytest.mark.parametrize("render", ["role_eos", "role_colon", "chat_template"])
def test_the_last_turn_is_asked_once_and_any_of_its_answers_is_right(tmp_path, render):
    tokenizer = llama_like()
    tokenizer.chat_template = CHAT_TEMPLATE
    says = [("user", "one"), ("assistant", "two"), ("user", "three")]
    turns = [{"role": role, "content": text} for role, text in says]
    answers = ("four", " four words, no more ", "five")
    rows = [{"messages": [*turns, {"role": "assistant", "content": a}]} for a in answers]
    rows += [{"messages": [*turns[:1], {"role": "assistant", "content": "six"}]}]
    questions, data = asked(tmp_path, rows, tokenizer, format="messages", render=render)
    assert len(questions.prompts) == questions.of == 2
    first, second = (tokenizer.decode(p) for p in questions.prompts)
    assert "two" in second and "three" in second and "two" not in first
    end = list(questions.ends[-1])
    assert data.test[0].tokens[-len(end) :].tolist() == end

    def right(*texts, ended=True):
        said = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        tokens = [[*text, *end * ended] for text in said]
        return questions.right([*map(np.array, tokens)], [ended, ended])

    assert right("six", "four") == right(" six\n", "five") == [True, True]
    assert right("four", "fours") == right("six", "five", ended=False) == [False, False]
    assert questions.longest > 2 and questions.most > questions.longest


@pytest.mark.parametrize("end", ["<|end_of_text|>", "<|im_end|>\n", "\n### End\n", "\n\n"])
def test_an_answer_ends_as_its_template_says_and_special_tokens_are_text(tmp_path, end):
    tokenizer = llama_like()
    tokenizer.add_tokens(["<|im_end|>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|yes|>", "<|no|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ eos_token }}", end)
    answers = ["four", "five.", "<|yes|>", "one two three, and so on to a hundred, or more" * 2]
    rows = [{"prompt": f"{k}", "completion": text} for k, text in enumerate(answers)]
    form = {"render": "chat_template", "max_length": 50}
    questions, data = asked(tmp_path, rows, tokenizer, **form)
    assert questions.of == 3  # the last one is cut
    own = {row.tokens.tobytes(): row.tokens[row.loss] for row in data.test[:3]}
    said = [own[row.tokens.tobytes()] for (row,) in questions._rows]
    assert questions.right(said, [False] * 3) == [True] * 3  # a token may join the end
    assert questions.right([*said[1:], said[0]], [True] * 3) == [False] * 3
    assert questions.right([np.array([tokenizer.eos_token_id])] * 3, [True] * 3) == [False] * 3


def test_a_verifier_accepts_other_words(tmp_path):
    rows = [{"prompt": "2 + 3", "completion": "Two and three are #### 5"}]
    tokenizer = llama_like()
    questions, _ = asked(tmp_path, rows, tokenizer, verifier="integer")
    for text, right in (("#### 5", True), (rows[0]["completion"], True), ("#### 6", False)):
        ids = np.array(tokenizer(text, add_special_tokens=False).input_ids)
        assert questions.right([ids], [True]) == [right], json.dumps(text)


@pytest.mark.parametrize("kept", ["[1]", "3", '{"a": 1}', None])
def test_a_damaged_count_is_made_again_and_one_that_cannot_be_read_is_said(tmp_path, kept):
    run = tiny_spec()
    path = tmp_path / run.id / KEPT
    path.parent.mkdir()
    path.mkdir() if kept is None else path.write_text(kept)
    request = SimpleNamespace(score="auto", exec=SimpleNamespace(runs_dir=tmp_path))
    why = f"{KEPT} cannot be read" if kept is None else f"the weights of run {run.id}"
    assert count(run, request, None)["text"].startswith(f"not counted: {why}")

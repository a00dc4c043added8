"""Verdicts on planted log-probabilities, and how a server is asked."""

from contextlib import ExitStack

import numpy as np
import pytest

from lorasweep.data.examples import Example
from lorasweep.errors import SpecError
from lorasweep.fleet.served import (
    ANOTHERS,
    DIFFERS,
    KEY,
    NOT_APPLIED,
    OF_CHANGE,
    SERVED,
    TOO_SMALL,
    Probe,
    Server,
    judge,
)
from tests.answering import answering, openai

COMMON, OWN, NOISE = 64, 16, 0.02


def planted(seed, change=0.5, customers=5, noise=NOISE):
    """The trainer's base and its adapters, by name; and errors of a server, drawn by name."""
    rng = np.random.default_rng(seed)
    base = rng.normal(-3, 2, COMMON + OWN)
    trained = {f"c{k}": base + rng.normal(0, change, base.shape) for k in range(customers)}
    return base, trained, lambda: rng.normal(0, noise, base.shape)


def judged(base, trained, served, served_base, name="c0", noise=NOISE):
    common = {n: v[:COMMON] for n, v in trained.items()}
    return judge(name, Probe(base, trained[name], served_base, served), common, noise)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("change", [0.05, 0.5, 3.0])
def test_each_fault_has_its_verdict_and_a_right_adapter_none(seed, change):
    base, trained, error = planted(seed, change)
    own, served_base = trained["c0"], base + error()
    # as measured on a server in bf16, errors also grow with the change
    rough = error() / NOISE * OF_CHANGE / 5 * change
    # an adapter of another base, or of nobody here
    stranger = base + 3 * change * np.random.default_rng(seed + 99).normal(size=base.shape)
    for served, verdict, factor in (
        (own + error() + rough, SERVED, 1),
        (served_base.copy(), NOT_APPLIED, 0),
        (trained["c3"] + error() + rough, ANOTHERS, None),
        (2 * own - base + error(), DIFFERS, 2),
        ((own + base) / 2 + error(), DIFFERS, 0.5),
        (stranger + error(), DIFFERS, None),
    ):
        found = judged(base, trained, served, served_base)
        assert found.verdict == verdict and found.nearest in trained, found
        if factor is not None:
            assert abs(found.factor - factor) <= 4 * found.factor_se + OF_CHANGE


@pytest.mark.parametrize("seed", range(20))
def test_what_is_smaller_than_the_noise_is_neither_right_nor_a_fault(seed):
    base, trained, error = planted(seed, change=NOISE / 4)
    served_base = base + error()
    # a large change under the name is a fault nevertheless
    big = {**trained, "c1": base + 0.5 * np.random.default_rng(seed).normal(size=base.shape)}
    for own, served, verdict in (
        (trained, trained["c0"] + error(), TOO_SMALL),
        (trained, trained["c1"] + error(), TOO_SMALL),
        (trained, served_base.copy(), TOO_SMALL),
        (big, big["c1"] + error(), ANOTHERS),
        (trained, big["c1"] + error(), DIFFERS),
    ):
        assert judged(base, own, served, served_base).verdict == verdict
    # two customers with the same rows are both served
    base, trained, error = planted(seed)
    twins = {**trained, "c1": trained["c0"] + NOISE / 10 * error()}
    for name in ("c0", "c1"):
        found = judged(base, twins, twins["c0"] + error(), base + error(), name)
        assert found.verdict == SERVED


def test_an_exact_server_and_an_adapter_that_learnt_nothing_are_no_division_by_zero():
    base, trained, _ = planted(0)
    assert judged(base, trained, trained["c0"], base, noise=0.0).verdict == SERVED
    nothing = {"c0": base.copy()}
    assert judged(base, nothing, base, base, noise=NOISE).verdict == TOO_SMALL


# ---------------------------------------------------------------- the server

ROWS = [
    Example(np.array([5, 6, 7, 8]), np.array([False, False, True, True])),
    Example(np.array([9, 4, 3]), np.array([False, True, False])),
]


def log_p_of(model, tokens):
    """Planted: log p of all tokens but the first."""
    return [-(len(model) + sum(tokens[:t]) + 10 * t) / 7 for t in range(2, len(tokens) + 1)]


@pytest.fixture
def serve():
    """Start a server that answers as `reply(path, body, headers)` says; returns its address."""
    with ExitStack() as started:
        yield lambda reply: started.enter_context(answering(reply))


def reply_of(owner, models=(("base", None), ("ann", "base"))):
    return openai(owner, dict(models), log_p_of)


@pytest.mark.parametrize("owner", ["vllm", "sglang"])
def test_both_ways_to_ask_give_the_answer_tokens_in_order(serve, owner):
    server = Server(serve(reply_of(owner)) + "/v1/")
    assert server.models == {"base": "", "ann": "base"}
    assert server.base_of("ann", ["ann"]) == "base"
    expected = [log_p_of("ann", t)[-1] for t in ([5, 6, 7], [5, 6, 7, 8], [9, 4])]
    assert server.log_p("ann", ROWS) == pytest.approx(expected)


def test_the_base_of_a_server_that_does_not_say_it_is_the_other_model(serve):
    server = Server(serve(reply_of("x", [("base", None), ("ann", None), ("bob", None)])))
    assert server.base_of("ann", ["ann", "bob"]) == "base"
    with pytest.raises(SpecError, match="does not say which model is the base of 'ann'"):
        server.base_of("ann", ["ann"])


LISTED = '{"data": [{"id": "ann"}]}'
NO_NUMBERS = "returns no log-probabilities of given tokens"
WRONG = [  # status and text of the list of models, text of a completion, message
    (404, "nope", "", "/v1/models answers 404: nope"),
    (401, "no", "", f"Set {KEY}"),
    (302, "http://elsewhere/v1", "", "answers 302.* redirects to http://elsewhere/v1"),
    (200, "<html>", "", "no server of the OpenAI API"),
    (200, "[]", "", "no list of models"),
    (200, '{"data": [{}]}', "", "no list of models"),
    (200, LISTED, '{"choices": [{"text": "x"}]}', NO_NUMBERS),
    (200, LISTED, '{"choices": [{"logprobs": null}]}', NO_NUMBERS),
    (200, LISTED, '{"choices": [{"logprobs": {"token_logprobs": [null]}}]}', NO_NUMBERS),
]


@pytest.mark.parametrize("status, listed, completion, message", WRONG)
def test_what_is_no_server_or_cannot_answer_says_so(serve, status, listed, completion, message):
    url = serve(lambda path, body, headers: (status, listed) if body is None else (200, completion))
    with pytest.raises(SpecError, match=message):
        Server(url).log_p("ann", ROWS)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "localhost:8000"])
def test_where_nothing_answers_the_message_says_what_to_type(url):
    with pytest.raises(SpecError, match=r"no server .* answers there .*url=http://localhost:8000"):
        Server(url)


def test_the_key_goes_to_the_given_address_and_to_no_other(serve, monkeypatch):
    seen = []

    def keyed(path, body, headers):
        seen.append(headers["Authorization"])
        return reply_of("x")(path, body, headers)

    monkeypatch.setenv(KEY, "secret")
    there = serve(keyed)
    Server(there)
    other = there.replace("127.0.0.1", "localhost") + "/v1/models"
    with pytest.raises(SpecError, match="redirects"):
        Server(serve(lambda path, body, headers: (302, other)))
    assert seen == ["Bearer secret"]

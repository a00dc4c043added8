"""Rewards of completions, by the verifier of a data set.

A completion is right (1) or wrong (0); one that cannot be read counts as wrong, and separately.
"""

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from lorasweep.data.examples import CHUNK, Data, Example, Rewards, answer_of, prompt_of
from lorasweep.data.synthetic.generators import GENERATORS, generator
from lorasweep.data.verifiers import math_checks
from lorasweep.data.verifiers.reading import boxed, integer
from lorasweep.errors import DataError
from lorasweep.spec.dataset import VERIFIERS, DatasetSpec

TURN = "User:"
"""Text that ends a completion in the form `text.role_colon`."""


def of_text(spec: DatasetSpec, tokenizer: Any) -> Rewards:
    """Reward completions with the result of the gold answer, as `spec.verifier` reads both."""
    ends: list[tuple[int, ...]] = [(tokenizer.eos_token_id,)]
    if spec.render == "role_colon":
        ends.append(tuple(tokenizer(TURN, add_special_tokens=False).input_ids))

    def text(tokens: np.ndarray) -> str:
        ids = tokens.tolist()
        own = next((ids[: -len(e)] for e in ends if tuple(ids[-len(e) :]) == e), ids)
        return tokenizer.decode(own, skip_special_tokens=True).strip()

    # a gold answer that is the whole completion of the row needs no box; a sampled one does
    whole_completion = bool(spec.answer_field)

    def of_texts(texts: Sequence[tuple[str, str]]) -> list[float | None]:
        if spec.verifier == "integer":
            return [_same(integer(gold), integer(answer)) for gold, answer in texts]
        return _of_math(texts, whole_completion)

    def of_all(pairs: Sequence[tuple[Example, np.ndarray]]) -> list[float | None]:
        return of_texts([(text(answer_of(row)), text(answer)) for row, answer in pairs])

    def of_gold(rows: Sequence[Example]) -> list[float | None]:
        own = [text(answer_of(row)) for row in rows]
        in_box = spec.verifier == "math" and whole_completion
        return of_texts([(gold, f"\\boxed{{{gold}}}" if in_box else gold) for gold in own])

    return Rewards(of_all, tuple(ends), of_gold=of_gold)


def _same(gold: Decimal | None, answer: Decimal | None) -> float | None:
    return None if answer is None else float(answer == gold)


def _of_math(texts: Sequence[tuple[str, str]], whole_completion: bool) -> list[float | None]:
    """Compare the last boxes of completions with those of gold answers, or with whole ones."""
    found: list[float | None] = [None] * len(texts)
    readable = {}
    for k, (gold, answer) in enumerate(texts):
        wanted, given = gold if whole_completion else boxed(gold), boxed(answer)
        if wanted is not None and given is not None:
            readable[k] = (wanted, given)
    found_of = math_checks.check(list(readable.values()))
    for k, verdict in zip(readable, found_of, strict=True):
        found[k] = verdict
    return found


def check_available(spec: DatasetSpec) -> None:
    """Check that completions can be rewarded. Needs no rows.

    Raises:
        DataError: the data set has no verifier.
    """
    synthetic = spec.source == "synthetic"
    if not (generator(spec.location).verified if synthetic else spec.verifier):
        generated = ", ".join(name for name, g in GENERATORS.items() if g.verified)
        raise DataError(
            f"dataset {spec.name!r} has no verifier, so completions cannot be rewarded. Choose one "
            f"that has (synthetic: {generated}; text: set verifier, one of "
            f"{', '.join(filter(None, VERIFIERS))}, in its file), or set objective=sft."
        )
    if spec.verifier == "math":
        math_checks.check_installed()
    if spec.mask != "completion":
        raise DataError(
            f"dataset {spec.name!r}: mask={spec.mask} does not say where an answer starts. Set "
            "mask=completion."
        )


def check_rows(spec: DatasetSpec, data: Data, max_new_tokens: int) -> None:
    """Check that every prompt leaves room for a completion, and every gold answer can be read.

    Of unlimited generated rows, the first ones are checked.

    Raises:
        DataError: a prompt is too long, or a gold answer cannot be read.
    """
    assert data.rewards is not None
    first = data.train(0, 0, data.n_train or CHUNK)
    for split, rows in (("held-out", data.test), ("training", first)):
        _check(f"dataset {spec.name!r}, {split} row", spec, rows, data.rewards, max_new_tokens)


def _check(
    where: str, spec: DatasetSpec, rows: Sequence[Example], rewards: Rewards, max_new_tokens: int
) -> None:
    lengths = [len(prompt_of(row)) for row in rows]
    longest = max(lengths, default=0)
    if longest + max_new_tokens > spec.max_length:
        room = spec.max_length - longest
        less = f", or max_new_tokens={room} at most" if room > 0 else ""
        raise DataError(
            f"{where} {lengths.index(longest)}: its prompt, the longest, has {longest} tokens, "
            f"which with max_new_tokens={max_new_tokens} is more than max_length={spec.max_length}."
            f" Set dataset.max_length={longest + max_new_tokens}{less}."
        )
    of_gold = rewards.of_gold or (lambda own: rewards.of([(r, answer_of(r)) for r in own]))
    for k, found in enumerate(of_gold(rows)):
        if found != 1.0:
            raise DataError(
                f"{where} {k}: its own gold answer cannot be read or is not rewarded "
                f"(verifier={spec.verifier or 'exact'}, {len(answer_of(rows[k]))} tokens). Correct "
                "the row, raise dataset.max_length so that it is not cut, or set too_long=skip."
            )

"""Rewards of sampled answers, registered with the data set that knows what is right.

Refuses to know who samples. An answer is right (1) or wrong (0); one that cannot be read is wrong,
and counted apart.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lorasweep.data.examples import CHUNK, Data, Example, Rewards
from lorasweep.errors import DataError
from lorasweep.spec.dataset import DatasetSpec

SYNTHETIC = ("bandit", "words")
"""Generators whose answers can be verified."""
BOX = re.compile(r"\\(?:boxed|fbox)\s*")
NUMBER = re.compile(r"([-+]?\d+)(\.0*)?")


def same_tokens(row: Example, answer: np.ndarray) -> float:
    """Reward exactly the row's own answer, its end token included."""
    return float(answer.tolist() == answer_of(row).tolist())  # of few tokens, the fastest way


def prompt_of(row: Example) -> np.ndarray:
    """Return the tokens before a row's answer."""
    return row.tokens[: int(np.argmax(row.loss))]


def answer_of(row: Example) -> np.ndarray:
    """Return the tokens of a row's own answer."""
    return row.tokens[row.loss]


def integer(text: str) -> int | None:
    """Return the number that a solution ends in, behind its last '####' or in its last box.

    Commas, dollar signs, spaces and a final full stop do not count. None: there is no whole number.
    """
    found = marked(text) or boxed(text) or ""
    number = NUMBER.fullmatch(re.sub(r"[,$\s]|\\\$", "", found).removesuffix("."))
    return int(number[1]) if number else None


def marked(solution: str) -> str | None:
    """Return what stands behind the last '####', without the commas of numbers: GSM8K's form.

    None if there is no mark.
    """
    _, mark, rest = solution.rpartition("####")
    lines = rest.strip().splitlines()
    return lines[0].strip().replace(",", "") if mark and lines else None


def boxed(solution: str) -> str | None:
    r"""Return the content of the last \boxed{...}, or the word behind \boxed: MATH's form.

    None if there is no box, or if its braces do not match.
    """
    found = list(BOX.finditer(solution))
    if not found:
        return None
    rest = solution[found[-1].end() :]
    if not rest.startswith("{"):
        word = re.match(r"[^\s$]+", rest)
        return word.group() if word else None
    depth = 0
    for brace in re.finditer(r"(?<!\\)[{}]", rest):  # not \{ and \}, which are signs of a set
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return rest[1 : brace.start()].strip()
    return None


READERS: dict[str, Callable[[str], Any]] = {"integer": integer}
"""By name, as `verifier` in a dataset file: what reads the result out of a solution."""


def of_text(spec: DatasetSpec, tokenizer: Any) -> Rewards:
    """Reward answers with the result of the row's own, as `spec.verifier` reads both."""
    read = READERS[spec.verifier]

    def result(tokens: np.ndarray) -> Any:
        return read(tokenizer.decode(tokens.tolist(), skip_special_tokens=True))

    def reward(row: Example, answer: np.ndarray) -> float | None:
        found = result(answer)
        return None if found is None else float(found == result(answer_of(row)))

    return Rewards(reward, (tokenizer.eos_token_id,))


def check_available(spec: DatasetSpec) -> None:
    """Check that answers can be rewarded. Needs no rows.

    Raises:
        DataError: nothing verifies the data set's answers.
    """
    known = spec.location in SYNTHETIC if spec.source == "synthetic" else bool(spec.verifier)
    if not known:
        raise DataError(
            f"dataset {spec.name!r} has no verifier, so its answers cannot be rewarded. Choose one "
            f"that has (synthetic: {', '.join(SYNTHETIC)}; text: set verifier, one of "
            f"{', '.join(READERS)}, in its file), or set objective=sft."
        )
    if spec.mask != "completion":
        raise DataError(
            f"dataset {spec.name!r}: mask={spec.mask} does not say where an answer starts. Set "
            "mask=completion."
        )


def check_rows(spec: DatasetSpec, data: Data, max_new_tokens: int) -> None:
    """Check that every prompt leaves room for an answer, and that every gold answer can be read.

    Of generated rows without end the first ones are looked at.

    Raises:
        DataError: one does not, or cannot.
    """
    assert data.rewards is not None
    first = data.train(0, 0, data.n_train or CHUNK)
    for split, rows in (("held-out", data.test), ("training", first)):
        _check(f"dataset {spec.name!r}, {split} row", spec, rows, data.rewards, max_new_tokens)


def _check(
    where: str, spec: DatasetSpec, rows: Sequence[Example], rewards: Rewards, max_new_tokens: int
) -> None:
    for k, row in enumerate(rows):
        length = len(prompt_of(row))
        if length + max_new_tokens > spec.max_length:
            raise DataError(
                f"{where} {k}: its prompt has {length} tokens, which with max_new_tokens="
                f"{max_new_tokens} is more than max_length={spec.max_length}. Raise "
                "dataset.max_length, lower max_new_tokens, or remove the row."
            )
        if rewards.of(row, answer_of(row)) != 1.0:
            raise DataError(
                f"{where} {k}: its own gold answer cannot be read or is not rewarded "
                f"(verifier={spec.verifier or 'exact'}, {len(answer_of(row))} tokens). Correct the "
                "row, raise dataset.max_length so that it is not cut, or set too_long=skip."
            )

"""`skills`: short symbolic tasks: copy, reverse, sort, addition, word problems.

Each character is a token. The base model is pretrained on easier instances in the same format
(difficulty 1), so that fine-tuning (difficulty 2) teaches the skill and not the format.
"""

import dataclasses

import numpy as np

from lorasweep.data.examples import Data, Example, generated
from lorasweep.data.fingerprint import of_generator
from lorasweep.errors import DataError
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.streams import stream

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz0123456789+-*=:>.?"
VOCAB = 48  # the alphabet, rounded up; the extra symbols are never used
DEFAULTS = {"difficulty": 2.0}
_INDEX = {char: i for i, char in enumerate(ALPHABET)}
_NAMES = ("ann", "bob", "eve", "tom", "sue", "max")
_THINGS = ("nuts", "pens", "cups", "hats")


LONGEST = 48
"""Bound on the symbols of an instance (the longest seen has 46). A shorter max_length would cut
answers off."""
DIFFICULTIES = (1, 2, 3)


def check(spec: DatasetSpec) -> None:
    """Check the generator parameters and the row length.

    Raises:
        DataError: one is unknown or out of range.
    """
    for key in spec.generator_params:
        if key not in DEFAULTS:
            raise DataError(
                f"dataset {spec.name!r}: knobs.{key} is unknown. Allowed: {', '.join(DEFAULTS)}."
            )
    difficulty = {**DEFAULTS, **spec.generator_params}["difficulty"]
    if difficulty not in DIFFICULTIES:
        raise DataError(
            f"dataset {spec.name!r}: knobs.difficulty={difficulty:g}. Allowed: 1, 2, 3."
        )
    if spec.max_length < LONGEST:
        raise DataError(
            f"dataset {spec.name!r}: max_length={spec.max_length} would cut answers "
            f"off. Allowed: {LONGEST} or more."
        )


def load(spec: DatasetSpec) -> Data:
    """Make the task.

    The loss covers the answer and its line end, or with mask=all every symbol but the first.
    """
    check(spec)
    difficulty = int({**DEFAULTS, **spec.generator_params}["difficulty"])

    def draw(rng: np.random.Generator, count: int, difficulty: int = difficulty) -> list[Example]:
        return [_example(*instance(rng, difficulty), spec) for _ in range(count)]

    test = draw(stream("data", spec.name, spec.test_split), spec.n_test)
    retain: list[Example] = []
    if spec.n_retain:
        retain = draw(stream("data", spec.name, "retain"), spec.n_retain, DIFFICULTIES[0])
    data = Data(
        train=generated(spec, spec.train_split, draw),
        test=test,
        n_train=spec.n_train,
        retain=retain,
    )
    return dataclasses.replace(data, sha256=of_generator(data, f"difficulty {difficulty}"))


def instance(rng: np.random.Generator, difficulty: int) -> tuple[str, str]:
    """Draw one (prompt, answer). All five skills are equally likely."""
    kind = int(rng.integers(5))
    if kind < 3:
        n = int(rng.integers(2 * difficulty, 2 + 4 * difficulty))
        letters = [chr(97 + int(i)) for i in rng.integers(26, size=n)]
        name = ("copy", "reverse", "sort")[kind]
        answer = (letters, letters[::-1], sorted(letters))[kind]
        return f"{name} {''.join(letters)}>", "".join(answer)
    top = 10**difficulty
    a, b = (int(x) for x in rng.integers(1, top, size=2))
    if kind == 3:
        return f"{a}+{b}>", str(a + b)
    who, thing = _NAMES[int(rng.integers(len(_NAMES)))], _THINGS[int(rng.integers(len(_THINGS)))]
    if rng.integers(2):
        return f"{who} has {a} {thing} and buys {b}. how many?>", str(a + b)
    a, b = max(a, b), min(a, b)
    return f"{who} has {a} {thing} and sells {b}. how many?>", str(a - b)


def encoded(text: str) -> np.ndarray:
    """Return the symbols of a text, int32."""
    return np.array([_INDEX[c] for c in text], dtype=np.int32)


def _example(prompt: str, answer: str, spec: DatasetSpec) -> Example:
    tokens = encoded(f"{prompt}{answer}\n"[: spec.max_length])
    loss = np.arange(len(tokens)) >= (1 if spec.mask == "all" else len(prompt))
    return Example(tokens=tokens, loss=loss, n_bytes=int(loss.sum()))

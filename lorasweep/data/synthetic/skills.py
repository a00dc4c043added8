"""Short symbolic tasks in which each character is a token: `skills`, and `words` for rewards.

skills: copy, reverse, sort, addition, word problems. The base model is pretrained on easier
instances (difficulty 1), so that fine-tuning (difficulty 2) teaches the skill and not the format.

words: new words for three skills, to be learned from rewards. `cort` means sort, `sverse` reverse,
`sopy` copy. The base model knows these skills by the old words, so correct completions are rare at
first but not impossible.
"""

from collections.abc import Callable

import numpy as np

from lorasweep.data.examples import (
    Data,
    Example,
    Parameter,
    Rewards,
    generated,
    parameters,
    same_tokens,
    with_fingerprint,
)
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.streams import stream

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz0123456789+-*=:>.?"
VOCAB = 48  # the alphabet, rounded up; the extra symbols are never used
SKILLS = {"difficulty": Parameter(2, 1, 3, whole=True)}
_INDEX = {char: i for i, char in enumerate(ALPHABET)}
_NAMES = ("ann", "bob", "eve", "tom", "sue", "max")
_THINGS = ("nuts", "pens", "cups", "hats")
LONGEST = 48
"""Upper bound on the number of symbols of an instance of `skills` (the longest seen has 46)."""
WORDS: dict[str, Callable[[list[str]], list[str]]] = {
    "cort": sorted,
    "sverse": lambda letters: letters[::-1],
    "sopy": list,
}
LENGTHS = (4, 5)
"""Possible numbers of letters in an instance of `words`."""
LONGEST_WORDS = len("sverse ") + LENGTHS[-1] + len(">") + LENGTHS[-1] + len("\n")


def load_skills(spec: DatasetSpec) -> Data:
    """Make the task. The loss covers answer and line end; with mask=all, symbols 1 and later."""
    params = parameters(spec.generator_params, SKILLS, f"dataset {spec.name!r}")
    difficulty = int(params["difficulty"])

    def draw(rng: np.random.Generator, count: int, difficulty: int = difficulty) -> list[Example]:
        rows = []
        for _ in range(count):
            prompt, answer = instance(rng, difficulty)
            tokens = encoded(f"{prompt}{answer}\n"[: spec.max_length])
            loss = np.arange(len(tokens)) >= (1 if spec.mask == "all" else len(prompt))
            rows.append(Example(tokens=tokens, loss=loss, n_bytes=int(loss.sum())))
        return rows

    test = draw(stream("data", spec.name, spec.test_split), spec.n_test)
    retain = draw(stream("data", spec.name, "retain"), spec.n_retain, 1)
    data = Data(generated(spec, draw), test, n_train=spec.n_train, retain=retain)
    return with_fingerprint(data, f"difficulty {difficulty}")


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


def load_words(spec: DatasetSpec) -> Data:
    """Make the task of new words. The loss covers the answer and its line end."""
    data = Data(
        train=generated(spec, _draw_words),
        test=_draw_words(stream("data", spec.name, spec.test_split), spec.n_test),
        n_train=spec.n_train,
        rewards=Rewards(same_tokens, ((ALPHABET.index("\n"),),), exact=True),
    )
    return with_fingerprint(data, ", ".join(WORDS))


def _draw_words(rng: np.random.Generator, count: int) -> list[Example]:
    rows = []
    for _ in range(count):
        word = tuple(WORDS)[int(rng.integers(len(WORDS)))]
        size = LENGTHS[int(rng.integers(len(LENGTHS)))]
        letters = [chr(97 + int(i)) for i in rng.integers(26, size=size)]
        prompt, answer = f"{word} {''.join(letters)}>", "".join(WORDS[word](letters))
        tokens = encoded(f"{prompt}{answer}\n")
        rows.append(Example(tokens, np.arange(len(tokens)) >= len(prompt), len(answer) + 1))
    return rows

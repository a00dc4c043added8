"""`words`: new words for old skills, to be learned from whether an answer is right.

`cort` means sort, `sverse` reverse, `sopy` copy. The base model knows the skills under their old
words (data set `skills`), so a right answer is rare at first but not unknown to it.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from lorasweep.data.examples import Data, Example, Rewards, generated
from lorasweep.data.fingerprint import of_generator
from lorasweep.data.rewards import same_tokens
from lorasweep.data.synthetic.skills import ALPHABET, VOCAB, encoded
from lorasweep.errors import DataError
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.streams import stream

__all__ = ["VOCAB", "check", "load"]

WORDS: dict[str, Callable[[list[str]], list[str]]] = {
    "cort": sorted,
    "sverse": lambda letters: letters[::-1],
    "sopy": list,
}
LENGTHS = (4, 5)
"""Letters of an instance."""
LONGEST = len("sverse ") + LENGTHS[-1] + len(">") + LENGTHS[-1] + len("\n")


def check(spec: DatasetSpec) -> None:
    """Check that there are no generator parameters, and the row length.

    Raises:
        DataError: there is one, or rows would be cut.
    """
    where = f"dataset {spec.name!r}"
    for key in spec.generator_params:
        raise DataError(f"{where}: knobs.{key} is unknown. The generator `words` has none.")
    if spec.max_length < LONGEST:
        raise DataError(
            f"{where}: max_length={spec.max_length} would cut answers off. Allowed: {LONGEST} or "
            "more."
        )


def load(spec: DatasetSpec) -> Data:
    """Make the task. The loss covers the answer and its line end."""
    check(spec)
    data = Data(
        train=generated(spec, spec.train_split, _draw),
        test=_draw(stream("data", spec.name, spec.test_split), spec.n_test),
        n_train=spec.n_train,
        rewards=Rewards(same_tokens, ((ALPHABET.index("\n"),),), exact=True),
    )
    return dataclasses.replace(data, sha256=of_generator(data, ", ".join(WORDS)))


def _draw(rng: np.random.Generator, count: int) -> list[Example]:
    rows = []
    for _ in range(count):
        word = tuple(WORDS)[int(rng.integers(len(WORDS)))]
        size = LENGTHS[int(rng.integers(len(LENGTHS)))]
        letters = [chr(97 + int(i)) for i in rng.integers(26, size=size)]
        prompt, answer = f"{word} {''.join(letters)}>", "".join(WORDS[word](letters))
        tokens = encoded(f"{prompt}{answer}\n")
        rows.append(Example(tokens, np.arange(len(tokens)) >= len(prompt), len(answer) + 1))
    return rows

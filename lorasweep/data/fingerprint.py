"""Hash what is trained and tested on, to tell apart data sets of one name."""

import hashlib
from collections.abc import Sequence

import numpy as np

from lorasweep.data.examples import CHUNK, Data, Example


def fingerprint(*parts: str | np.ndarray | Sequence[Example]) -> str:
    """Return the SHA-256 of texts, of arrays, and of examples' token ids and loss masks."""
    digest = hashlib.sha256()
    for part in parts:
        for array in _arrays(part):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def of_generator(data: Data, *distribution: str | np.ndarray) -> str:
    """Return the fingerprint of generated data.

    It covers the distribution, the held-out and pretraining rows, and the first training rows of
    seed 0, which show the code that draws. The draws of other seeds are not looked at.
    `distribution`: parameters and tables. Probabilities are rounded first, with `rounded`.
    """
    drawn = data.train(0, 0, min(CHUNK, data.n_train or CHUNK))
    return fingerprint(*distribution, data.test, data.retain, drawn)


def rounded(probabilities: np.ndarray) -> np.ndarray:
    """Round to 3 digits (float16), because processors differ in the last digits of a product."""
    return probabilities.astype("<f2")


def _arrays(part: str | np.ndarray | Sequence[Example]) -> list[np.ndarray]:
    if isinstance(part, str):
        return [np.frombuffer(part.encode(), dtype=np.uint8)]
    if isinstance(part, np.ndarray):
        return [part]
    lengths = np.array([len(e.tokens) for e in part], dtype="<i8")
    if not len(part):
        return [lengths]
    tokens = np.concatenate([e.tokens for e in part]).astype("<i4")
    return [lengths, tokens, np.concatenate([e.loss for e in part])]

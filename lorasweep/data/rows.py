"""Keep tokenized rows as arrays, in memory or mapped from a file that all processes share.

first 4,096 bytes: {"rows", "tokens", "sha256", "fit"} as JSON, filled up with spaces
ends     int64 [rows]     end of each row in the tokens
n_bytes  int64 [rows]     UTF-8 bytes of the text in the loss
tokens   int32 [tokens]
loss     bool  [tokens]
"""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np

from lorasweep.data.examples import Example, Fit

HEADER = 4096
DTYPES = ("<i8", "<i8", "<i4", "?")


class Rows(Sequence[Example]):
    """Tokenized rows, end to end in four arrays. Examples are views of them."""

    def __init__(self, arrays: Sequence[np.ndarray], fit: Fit | None = None) -> None:
        """Hold `arrays`: ends, n_bytes, tokens, loss."""
        self.arrays, self.fit = arrays, fit
        self.ends, self.n_bytes, self.tokens, self.loss = arrays

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "Rows":
        """Copy text examples into arrays, one by one, because a data set may be large."""
        ends, n_bytes, tokens, loss = [], [], bytearray(), bytearray()
        for e in examples:
            tokens += e.tokens.astype("<i4").tobytes()
            loss += e.loss.tobytes()
            ends.append(len(loss))
            n_bytes.append(e.n_bytes)
        counted = [np.array(ends, "<i8"), np.array(n_bytes, "<i8")]
        return cls([*counted, np.frombuffer(tokens, "<i4"), np.frombuffer(loss, "?")])

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, k: int) -> Example: ...
    @overload
    def __getitem__(self, k: slice) -> list[Example]: ...
    def __getitem__(self, k: int | slice) -> Example | list[Example]:
        if isinstance(k, slice):
            return [self[i] for i in range(len(self))[k]]
        k = range(len(self))[k]  # raises IndexError beyond the end
        row = slice(self.ends[k - 1] if k else 0, self.ends[k])
        return Example(self.tokens[row], self.loss[row], int(self.n_bytes[k]))

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the four arrays."""
        digest = hashlib.sha256()
        for array in self.arrays:
            digest.update(array.data)
        return digest.hexdigest()


def kept(path: Path, make: Callable[[], Rows]) -> Rows:
    """Return the rows of a file; make and write them first if it is missing or damaged.

    Other processes wait for the one that writes. In a read-only folder rows stay in memory.
    """
    if (rows := read(path)) is not None:
        return rows
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("ab")
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return make()
    with lock:
        with suppress(OSError):  # without locks on the file system, processes repeat the work
            fcntl.flock(lock, fcntl.LOCK_EX)
        if (rows := read(path)) is not None:
            return rows
        made = make()
        head = {"rows": len(made), "tokens": len(made.tokens), "sha256": made.sha256}
        partial = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(3).hex()}")
        try:
            with partial.open("wb") as file:
                file.write(json.dumps({**head, "fit": made.fit}).encode().ljust(HEADER))
                file.writelines(array.data for array in made.arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return read(path) or made


def read(path: Path) -> Rows | None:
    """Map a file of rows; None if it is missing, or its size or checksum is wrong."""
    try:
        with path.open("rb") as file:
            head = json.loads(file.read(HEADER))
        counts = [int(head[k]) for k in ("rows", "rows", "tokens", "tokens")]
        whole = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
        sizes = [n * np.dtype(dtype).itemsize for n, dtype in zip(counts, DTYPES)]
        ends = np.cumsum([HEADER, *sizes])
        arrays = [whole[a:b].view(t) for a, b, t in zip(ends, ends[1:], DTYPES)]
        rows = Rows(arrays, head["fit"])
    except (OSError, ValueError, KeyError, TypeError):  # also of a file that is cut
        return None
    return rows if ends[-1] == len(whole) and rows.sha256 == head["sha256"] else None

"""Tokenize rows of text: prompts with completions, or messages.

Every row is checked when the split is loaded, before a run starts. An unreadable row, or one
without a loss token, is an error that names file and line.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorasweep.data import rows, sources
from lorasweep.data.examples import Example
from lorasweep.data.render import RENDERERS, Message, Part
from lorasweep.data.rows import Rows
from lorasweep.data.sources import Row, Source
from lorasweep.errors import DataError
from lorasweep.spec.dataset import DatasetSpec

TOGETHER = 256
"""Rows whose parts are given to the tokenizer in one call, which is faster than one by one."""
VERSION = 1
"""Raised when the same rows are tokenized in another way, so that kept files are made again."""
NOT_IN_ROWS = ("name", "revision", "n_train", "n_test", "n_test_curve")
"""Fields that change no row. What a revision stands for is in the source's identity."""


def examples(
    spec: DatasetSpec, split: str, source: Source, tokenizer: Any, limit: int | None, cache: str
) -> Rows:
    """Tokenize the first `limit` rows of a split, or map them from `cache` if that was done before.

    Without a cache (empty), or for a tokenizer that cannot be named by its content (one not of the
    `tokenizers` library), rows are tokenized in memory.

    Raises:
        DataError: a row cannot be used; the message names file and line.
    """

    def make() -> Rows:
        found = Rows.of(_tokenized(spec, itertools.islice(source.rows(), limit), tokenizer))
        if not found:
            raise DataError(
                f"dataset {spec.name!r}, split {split!r}: no rows. Set train_split and test_split "
                "to splits that have rows."
            )
        return found

    described = _tokenizer_sha256(tokenizer)
    if not cache or described is None:
        return make()
    how = {k: v for k, v in dataclasses.asdict(spec).items() if k not in NOT_IN_ROWS}
    key = json.dumps([VERSION, how, described, source.identity, split, limit])
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    return rows.kept(Path(cache) / f"{name}.rows", make)


def check_jsonl(spec: DatasetSpec, split: str, data_dirs: Sequence[str]) -> None:
    """Read every row of a local split and check its fields.

    Raises:
        DataError: a row cannot be used; the message names file and line.
    """
    path, _ = sources.find_jsonl(spec, split, data_dirs)
    for where, row in sources.jsonl_rows(path):
        _parts(spec, row, where, None)


def _tokenizer_sha256(tokenizer: Any) -> str | None:
    """Hash all that a tokenizer of the `tokenizers` library does; None for any other."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    text = json.dumps([backend.to_str(), tokenizer.bos_token, tokenizer.eos_token_id])
    return hashlib.sha256(text.encode()).hexdigest()


def _tokenized(spec: DatasetSpec, given: Iterable[Row], tokenizer: Any) -> Iterator[Example]:
    """Tokenize rows part by part, so that the loss mask falls on token borders."""
    left = iter(given)
    while together := list(itertools.islice(left, TOGETHER)):
        of_rows = [_parts(spec, row, where, tokenizer.bos_token) for where, row in together]
        texts = [part.text for parts in of_rows for part in parts]
        pieces = iter(tokenizer(texts, add_special_tokens=False).input_ids)
        for (where, _), parts in zip(together, of_rows):
            own = list(itertools.islice(pieces, len(parts)))
            yield _example(spec, parts, own, tokenizer, where)


def _example(
    spec: DatasetSpec, parts: Sequence[Part], pieces: list[list[int]], tokenizer: Any, where: str
) -> Example:
    """Join the token ids of a row's parts, and cut it to max_length."""
    ids: list[int] = []
    loss: list[bool] = []
    for part, piece in zip(parts, pieces):
        ids += [*piece, tokenizer.eos_token_id] if part.eos else piece
        loss += [part.in_loss] * (len(ids) - len(loss))
    n_bytes = sum(len(part.text.encode()) for part in parts if part.in_loss)
    cut = len(ids) > spec.max_length
    tokens = np.array(ids[: spec.max_length], dtype=np.int32)
    mask = np.array(loss[: spec.max_length], dtype=bool)
    if len(mask):
        mask[0] = False  # nothing predicts the first token
    if not mask.any():
        raise DataError(
            f"{where}: no token counts in the loss (mask={spec.mask}, {len(ids)} tokens, "
            f"max_length={spec.max_length}). "
            "Remove the row, raise max_length, or change the mask."
        )
    if cut:  # count the bytes of the part that was kept, so that bits per byte are right
        kept = [t for t, m in zip(tokens, mask) if m]
        n_bytes = len(tokenizer.decode(kept, skip_special_tokens=True).encode())
    return Example(tokens=tokens, loss=mask, n_bytes=n_bytes)


def _parts(spec: DatasetSpec, row: Any, where: str, bos: str | None) -> list[Part]:
    """Render a row as text."""
    if spec.format == "messages":
        return RENDERERS[spec.render](_messages(row, where), spec.mask, bos)
    prompt = spec.template.replace("{prompt}", _field(row, spec.prompt_field, where))
    completion = _field(row, spec.completion_field, where)
    return [Part(prompt, spec.mask == "all"), Part(completion, True, eos=True)]


def _messages(row: Any, where: str) -> list[Message]:
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DataError(
            f"{where}: format=messages expects a list 'messages' of {{role, content}}. Correct the "
            "row, or set format=prompt_completion."
        )
    return [(_field(m, "role", where), _field(m, "content", where)) for m in messages]


def _field(row: Any, name: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(name), str):
        keys = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(
            f"{where}: no text field {name!r}. The row has: {keys}. Set prompt_field and "
            "completion_field in the dataset file."
        )
    return row[name]

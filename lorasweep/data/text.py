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

from lorasweep.data import fields, rows, sources
from lorasweep.data.examples import Example
from lorasweep.data.render import RENDERERS, Message, Part, chat_template
from lorasweep.data.rows import Rows
from lorasweep.data.sources import Row, Source
from lorasweep.errors import DataError
from lorasweep.spec.dataset import FIRST_RENDER, DatasetSpec

TOGETHER = 256
"""Rows whose parts are given to the tokenizer in one call, which is faster than one by one."""
VERSION = 2
"""Raised when the same rows are tokenized in another way, so that kept files are made again."""
NOT_IN_ROWS = (
    "name",
    "revision",
    "test_revision",
    "n_train",
    "n_test",
    "n_test_curve",
    "n_validation",
    "unseen_rows",
    "answer_field",
    "verifier",
)
"""Fields that change no row, or do so in the source: its identity says what a revision stands for
and which rows are left out."""
DATE = "26 Jul 2024"
"""Told to chat templates that write a date. Llama's write this one where they cannot know the day;
else the rows would change with it."""


def examples(
    spec: DatasetSpec, split: str, source: Source, tokenizer: Any, limit: int | None, cache: str
) -> Rows:
    """Tokenize the first `limit` rows of a split, or map them from `cache` if that was done before.

    Rows that `too_long` leaves out do not count.

    Without a cache (empty), or for a tokenizer that cannot be named by its content (one not of the
    `tokenizers` library), rows are tokenized in memory.

    Raises:
        DataError: a row cannot be used; the message names file and line.
    """

    def make() -> Rows:
        given = source.rows()
        if spec.too_long == "cut":
            given = itertools.islice(given, limit)  # rows beyond need not be readable
        first = list(itertools.islice(given, 1))
        given = itertools.chain(first, given)
        usable = (e for e in _tokenized(spec, given, tokenizer) if e is not None)
        found = Rows.of(itertools.islice(usable, limit))
        if not found and first:
            raise DataError(
                f"dataset {spec.name!r}, split {split!r}: no rows (too_long={spec.too_long}, "
                f"max_length={spec.max_length}) that can be used: all are longer. Raise "
                "max_length."
            )
        if not found:
            raise DataError(
                f"dataset {spec.name!r}, split {split!r}: no rows (unseen_prompts="
                f"{spec.unseen_prompts}). Set train_split and test_split to splits that have rows."
            )
        return found

    described = _tokenizer_sha256(tokenizer)
    if not cache or described is None:
        return make()
    how = {k: v for k, v in dataclasses.asdict(spec).items() if k not in NOT_IN_ROWS}
    if spec.render == "chat_template":
        how["chat_template"] = tokenizer.chat_template
    key = json.dumps([VERSION, how, described, source.identity, split, limit])
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    return rows.kept(Path(cache) / f"{name}.rows", make)


def check_jsonl(spec: DatasetSpec, split: str, data_dirs: Sequence[str]) -> None:
    """Read every row of a local split and check its fields.

    Raises:
        DataError: a row cannot be used; the message names file and line.
    """
    path, _ = sources.find_jsonl(spec, split, data_dirs)
    checked = (fields.messages_of(spec, row, where) for where, row in sources.jsonl_rows(path))
    sources.check_holdout(spec, path, sum(1 for _ in checked))


def _tokenizer_sha256(tokenizer: Any) -> str | None:
    """Hash all that a tokenizer of the `tokenizers` library does; None for any other."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    text = json.dumps([backend.to_str(), tokenizer.bos_token, tokenizer.eos_token_id])
    return hashlib.sha256(text.encode()).hexdigest()


def _tokenized(spec: DatasetSpec, given: Iterable[Row], tokenizer: Any) -> Iterator[Example | None]:
    """Tokenize rows part by part, so that the loss mask falls on token borders.

    None for a row that `too_long` leaves out.
    """
    left = iter(given)
    while together := list(itertools.islice(left, TOGETHER)):
        of_rows = [parts_of(spec, row, where, tokenizer) for where, row in together]
        texts = [part.text for parts in of_rows for part in parts]
        pieces = iter(tokenizer(texts, add_special_tokens=False).input_ids)
        for (where, _), parts in zip(together, of_rows):
            own = list(itertools.islice(pieces, len(parts)))
            yield _example(spec, parts, own, tokenizer, where)


def _example(
    spec: DatasetSpec, parts: Sequence[Part], pieces: list[list[int]], tokenizer: Any, where: str
) -> Example | None:
    """Join the token ids of a row's parts, and cut it to max_length or leave it out (None)."""
    ids: list[int] = []
    loss: list[bool] = []
    for part, piece in zip(parts, pieces):
        ids += [*piece, tokenizer.eos_token_id] if part.eos else piece
        loss += [part.in_loss] * (len(ids) - len(loss))
    n_bytes = sum(len(part.text.encode()) for part in parts if part.in_loss)
    cut = len(ids) > spec.max_length
    if cut and spec.too_long == "skip":
        return None
    tokens = np.array(ids[: spec.max_length], dtype=np.int32)
    mask = np.array(loss[: spec.max_length], dtype=bool)
    if len(mask):
        mask[0] = False  # nothing predicts the first token
    if not mask.any():
        if cut and spec.too_long == "cut_or_skip":
            return None
        remedy = "raise max_length, change the mask, or set too_long=cut_or_skip"
        raise DataError(
            f"{where}: no token counts in the loss (mask={spec.mask}, {len(ids)} tokens"
            + (
                f", max_length={spec.max_length}). Remove the row, {remedy}."
                if cut
                else "). Remove the row, add an answer, change the mask, or set the weight of an "
                "answer to 1."
            )
        )
    if cut:  # count the bytes of the part that was kept, so that bits per byte are right
        kept = [t for t, m in zip(tokens, mask) if m]
        n_bytes = len(tokenizer.decode(kept, skip_special_tokens=True).encode())
    return Example(tokens=tokens, loss=mask, n_bytes=n_bytes)


def parts_of(spec: DatasetSpec, row: Any, where: str, tokenizer: Any) -> list[Part]:
    """Render a row as text.

    Raises:
        DataError: the row has not the columns of its format, or the tokenizer's chat template does
            not take it.
    """
    if spec.format == "prompt_completion" and spec.render == FIRST_RENDER:
        prompt, completion = fields.prompt_and_completion(spec, row, where)
        return [Part(prompt, spec.mask == "all"), Part(completion, True, eos=True)]
    messages, heads = fields.messages_of(spec, row, where), spec.mask == "all"
    in_loss = fields.in_loss(spec, row, where)
    if spec.render != "chat_template":
        return RENDERERS[spec.render](messages, in_loss, heads, tokenizer.bos_token)
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"dataset {spec.name!r}: render=chat_template, but the tokenizer has none. Choose an "
            "instruct model, or set render=role_colon."
        )

    def apply(messages: Sequence[Message], open_: bool) -> str:
        given = [{"role": role, "content": content} for role, content in messages]
        return tokenizer.apply_chat_template(
            given, tokenize=False, add_generation_prompt=open_, date_string=DATE
        )

    try:
        return chat_template(messages, in_loss, heads, apply, tokenizer.eos_token or "")
    except Exception as error:  # templates raise what they like
        raise DataError(
            f"{where}: the tokenizer's chat template does not take the row with mask={spec.mask} "
            f"({error}). Remove the row, set mask=last_assistant, or set render=role_colon."
        ) from error

"""Render rows of text, prompts with completions or messages, and tokenize them.

Every row is checked when the split is loaded, before a run starts. An unreadable row, or one
without a loss token, is an error that names file and line.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorasweep.data import fields, rows
from lorasweep.data.examples import Example
from lorasweep.data.fields import Message
from lorasweep.data.rows import Rows
from lorasweep.data.sources import Row, Source
from lorasweep.errors import DataError
from lorasweep.spec.dataset import FIRST_RENDER, DatasetSpec

TOGETHER = 256
"""Rows whose parts are given to the tokenizer in one call, which is faster than one by one."""
VERSION = 2
"""Raised when the same rows are tokenized in another way, so that kept files are made again."""
NOT_IN_ROWS = (
    *("name", "revision", "test_revision", "n_train", "n_test", "n_test_curve"),
    *("n_validation", "unseen_rows", "answer_field", "verifier"),
)
"""Fields that change no row, or that the source's identity covers (revisions, left-out rows)."""
DATE = "26 Jul 2024"
"""Date for chat templates that write one, so that rows do not depend on the day. Llama's templates
use this date by default."""


class Part(NamedTuple):
    """A piece of text that is tokenized separately, without special tokens.

    Parts end where the loss starts or ends, so that the loss mask falls on token borders.
    """

    text: str
    in_loss: bool
    eos: bool = False
    """Whether the end-of-sequence token follows, in the loss or not as the text."""


def examples(
    spec: DatasetSpec, split: str, source: Source, tokenizer: Any, limit: int | None, cache: str
) -> Rows:
    """Tokenize the first `limit` usable rows of a split, or map them from the folder `cache`.

    Rows are tokenized in memory if `cache` is empty, or if the tokenizer is not of the `tokenizers`
    library, so that its content cannot be hashed.

    Raises:
        DataError: a row cannot be used; the message names file and line.
    """

    def make() -> Rows:
        given = source.rows()
        if spec.too_long == "cut":
            given = itertools.islice(given, limit)  # rows beyond need not be readable
        first = list(itertools.islice(given, 1))
        usable = _tokenized(spec, itertools.chain(first, given), tokenizer)
        found = Rows.of(itertools.islice(usable, limit))
        if not found:
            if first:
                why = (
                    f"can be used (too_long={spec.too_long}, max_length={spec.max_length}): all "
                    "are longer. Raise max_length."
                )
            else:
                why = (
                    f"(unseen_prompts={spec.unseen_prompts}). Set train_split and test_split to "
                    "splits that have rows."
                )
            raise DataError(f"dataset {spec.name!r}, split {split!r}: no rows {why}")
        return found

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not cache or backend is None:
        return make()
    content = json.dumps([backend.to_str(), tokenizer.bos_token, tokenizer.eos_token_id])
    described = hashlib.sha256(content.encode()).hexdigest()
    how = {k: v for k, v in dataclasses.asdict(spec).items() if k not in NOT_IN_ROWS}
    if spec.render == "chat_template":
        how["chat_template"] = tokenizer.chat_template
    key = json.dumps([VERSION, how, described, source.identity, split, limit])
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    return rows.kept(Path(cache) / f"{name}.rows", make)


def _tokenized(spec: DatasetSpec, given: Iterator[Row], tokenizer: Any) -> Iterator[Example]:
    """Tokenize rows part by part, except those that `too_long` leaves out."""
    while together := list(itertools.islice(given, TOGETHER)):
        of_rows = [parts_of(spec, row, where, tokenizer) for where, row in together]
        texts = [part.text for parts in of_rows for part in parts]
        pieces = iter(tokenizer(texts, add_special_tokens=False).input_ids)
        for (where, _), parts in zip(together, of_rows):
            ids: list[int] = []
            loss: list[bool] = []
            for part, piece in zip(parts, pieces):
                ids += [*piece, tokenizer.eos_token_id] if part.eos else piece
                loss += [part.in_loss] * (len(ids) - len(loss))
            n_bytes = sum(len(part.text.encode()) for part in parts if part.in_loss)
            cut = len(ids) > spec.max_length
            if cut and spec.too_long == "skip":
                continue
            tokens = np.array(ids[: spec.max_length], dtype=np.int32)
            mask = np.array(loss[: spec.max_length], dtype=bool)
            mask[:1] = False  # nothing predicts the first token
            if not mask.any():
                if cut and spec.too_long == "cut_or_skip":
                    continue
                length, remedy = "", "add an answer, or set the weight of an answer to 1"
                if cut:
                    length = f", max_length={spec.max_length}"
                    remedy = "raise max_length, change the mask, or set too_long=cut_or_skip"
                raise DataError(
                    f"{where}: no token counts in the loss (mask={spec.mask}, {len(ids)} tokens"
                    f"{length}). Remove the row, {remedy}."
                )
            if cut:  # count the bytes that were kept, so that bits per byte are right
                n_bytes = len(tokenizer.decode(tokens[mask], skip_special_tokens=True).encode())
            yield Example(tokens=tokens, loss=mask, n_bytes=n_bytes)


def parts_of(spec: DatasetSpec, row: Any, where: str, tokenizer: Any) -> list[Part]:
    """Render a row as text, in the form `spec.render`.

    With mask=all, the text between messages is learned, too.

    role_colon: 'Role:' and ' content' with a blank line, the form of the study's base models, as
    `RoleColonRenderer` in github.com/thinking-machines-lab/tinker-cookbook. An answer is learned
    with its space and its blank line; if it is the last message, so is the 'User:' that ends
    sampling. The beginning-of-sequence token comes first if the tokenizer has one.

    role_eos: 'Role: ' and 'content'. The end-of-sequence token ends an answer, and a blank line
    other messages. There is no beginning-of-sequence token.

    chat_template: as the tokenizer's chat template does, for instruct models. An answer is the text
    that the template adds for it, without line ends behind the end-of-sequence token. Text after
    the last answer in the loss is left out, unless mask=all.

    Raises:
        DataError: a column of the format is missing, or the tokenizer's chat template refuses the
            row.
    """
    heads = spec.mask == "all"
    if spec.format == "prompt_completion" and spec.render == FIRST_RENDER:
        prompt, completion = fields.prompt_and_completion(spec, row, where)
        return [Part(prompt, heads), Part(completion, True, eos=True)]
    messages, in_loss = fields.messages_of(spec, row, where), fields.in_loss(spec, row, where)
    if spec.render == "chat_template":
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"dataset {spec.name!r}: render=chat_template, but the tokenizer has none. Choose "
                "an instruct model, or set render=role_colon."
            )
        try:
            return _chat_parts(messages, in_loss, heads, tokenizer)
        except Exception as error:  # templates raise what they like
            raise DataError(
                f"{where}: the tokenizer's chat template does not take the row with mask="
                f"{spec.mask} ({error}). Remove the row, set mask=last_assistant, or set "
                "render=role_colon."
            ) from error
    colon = spec.render == "role_colon"
    parts = [Part(tokenizer.bos_token, False)] if colon and tokenizer.bos_token else []
    for (role, content), learned in zip(messages, in_loss, strict=True):
        head, answer = f"{role.capitalize()}:", role == "assistant"
        if colon:
            parts += [Part(head, heads), Part(f" {content}\n\n", learned)]
        else:
            parts += [Part(f"{head} ", heads), Part(content, learned, eos=answer)]
            parts += [] if answer else [Part("\n\n", heads and learned)]
    if colon and messages and messages[-1][0] == "assistant":
        parts.append(Part("User:", in_loss[-1]))
    return parts


def _chat_parts(
    messages: Sequence[Message], in_loss: Sequence[bool], heads: bool, tokenizer: Any
) -> list[Part]:
    """Render by the chat template. `heads`: whether the text between messages is learned, too."""

    def apply(messages: Sequence[Message], is_open: bool) -> str:
        given = [{"role": role, "content": content} for role, content in messages]
        return tokenizer.apply_chat_template(
            given, tokenize=False, add_generation_prompt=is_open, date_string=DATE
        )

    parts: list[Part] = []
    done, eos = "", tokenizer.eos_token or ""
    for i, learned in enumerate(in_loss):
        if learned == heads:  # the text around it is in the loss as it is: there is no border
            continue
        before = apply(messages[:i], messages[i][0] == "assistant")
        after = apply(messages[: i + 1], False)
        if not before.startswith(done) or not after.startswith(before):
            raise ValueError(f"message {i + 1} changes the text before it")
        answer = after[len(before) :]
        ended = bool(eos) and answer.rstrip("\n").endswith(eos)
        said = answer.rstrip("\n").removesuffix(eos) if ended else answer
        parts += [Part(before[len(done) :], heads), Part(said, learned, eos=ended)]
        done = before + said + (eos if ended else "")
    if heads:
        whole = apply(messages, False)
        if not whole.startswith(done):
            raise ValueError("a message that is not learned is changed by what follows")
        parts.append(Part(whole[len(done) :], True))
    return parts

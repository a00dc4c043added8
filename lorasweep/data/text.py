"""Tokenize rows of text from JSON Lines files and hub data sets: prompts or messages.

Every row is checked when the split is loaded, before a run starts. An unreadable row, or one
without a loss token, is an error that names file and line.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorasweep.data.examples import Example
from lorasweep.errors import DataError
from lorasweep.spec.dataset import DatasetSpec


def examples(
    spec: DatasetSpec, split: str, data_dirs: Sequence[str], tokenizer: Any, limit: int | None
) -> list[Example]:
    """Tokenize the first `limit` rows of a split.

    Raises:
        DataError: a row cannot be used; the message names file and line.
    """
    found: list[Example] = []
    for where, row in _rows(spec, split, data_dirs):
        if limit is not None and len(found) >= limit:
            break
        found.append(_example(spec, row, tokenizer, where))
    if not found:
        raise DataError(
            f"dataset {spec.name!r}, split {split!r}: no rows. Set train_split and test_split to "
            "splits that have rows."
        )
    return found


def find_jsonl(spec: DatasetSpec, split: str, data_dirs: Sequence[str]) -> Path:
    """Find <data_dir>/<location>/<split>.jsonl and check it against the pinned revision.

    Raises:
        DataError: the file is missing, or it is not the pinned one.
    """
    tried = [Path(folder).expanduser() / spec.location / f"{split}.jsonl" for folder in data_dirs]
    path = next((p for p in tried if p.is_file()), None)
    if path is None:
        raise DataError(
            f"dataset {spec.name!r}: no file {' or '.join(map(str, tried))}. Put it there, or set "
            f"exec.data_dir=[FOLDER] for FOLDER/{spec.location}/{split}.jsonl."
        )
    if spec.revision.startswith("sha256:"):
        wanted = dict(part.split("=") for part in spec.revision[7:].split(",")).get(split)
        got = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        if wanted and wanted != got:
            raise DataError(
                f"dataset {spec.name!r}: {path} has sha256 {got}..., but the revision in "
                f"conf/dataset pins {wanted}. Get the pinned file, or write your own dataset file "
                "with another name and revision."
            )
    return path


def check_jsonl(spec: DatasetSpec, split: str, data_dirs: Sequence[str]) -> None:
    """Read every row of a local split and check its fields.

    Raises:
        DataError: a row cannot be used; the message names file and line.
    """
    for where, row in _rows(spec, split, data_dirs):
        if spec.format == "messages":
            _message_parts(spec, row, where)
        else:
            _field(row, spec.prompt_field, where)
            _field(row, spec.completion_field, where)


def _rows(
    spec: DatasetSpec, split: str, data_dirs: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    if spec.source == "jsonl":
        path = find_jsonl(spec, split, data_dirs)
        with path.open(encoding="utf-8", errors="strict") as lines:
            number = 0
            try:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield f"{path}:{number}", json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise DataError(
                    f"{path}:{number}: not a JSON row ({error}). Correct or remove the line."
                ) from None
        return
    import datasets

    try:
        rows = datasets.load_dataset(
            spec.location,
            spec.config or None,
            split=spec.train_split if spec.holdout else split,
            revision=spec.revision or None,
        )
        if spec.holdout:
            # mixtures are sorted by source: without a shuffle all held-out rows share a source
            rows = rows.shuffle(seed=0)
            test = range(min(spec.holdout, len(rows)))
            rows = rows.select(test if split == spec.test_split else range(len(test), len(rows)))
    except Exception as error:
        raise DataError(
            f"dataset {spec.name!r}: cannot load {spec.location!r} from the hub "
            f"({type(error).__name__}: {error}). Check the network, log in if access is "
            "restricted, or use local files: a dataset with source=jsonl."
        ) from error
    for number, row in enumerate(rows):
        yield f"{spec.location}[{split}] row {number}", row


def _field(row: Any, name: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(name), str):
        keys = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(
            f"{where}: no text field {name!r}. The row has: {keys}. Set prompt_field and "
            "completion_field in the dataset file."
        )
    return row[name]


def _example(spec: DatasetSpec, row: dict[str, Any], tokenizer: Any, where: str) -> Example:
    """Tokenize one row, part by part, so that the loss mask falls on token borders."""
    if spec.format == "messages":
        parts = _message_parts(spec, row, where)
    else:
        prompt = spec.template.replace("{prompt}", _field(row, spec.prompt_field, where))
        completion = _field(row, spec.completion_field, where)
        parts = [(prompt, spec.mask == "all", False), (completion, True, True)]
    ids: list[int] = []
    loss: list[bool] = []
    n_bytes = 0
    for text, counts, ends in parts:
        piece = tokenizer(text, add_special_tokens=False).input_ids
        if ends:
            piece = [*piece, tokenizer.eos_token_id]
        ids += piece
        loss += [counts] * len(piece)
        n_bytes += len(text.encode()) if counts else 0
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


def _message_parts(
    spec: DatasetSpec, row: dict[str, Any], where: str
) -> list[tuple[str, bool, bool]]:
    """Render messages as 'Role: text', the form that the study's authors used for base models."""
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DataError(
            f"{where}: format=messages expects a list 'messages' of {{role, content}}. Correct the "
            "row, or set format=prompt_completion."
        )
    last = max((i for i, m in enumerate(messages) if m.get("role") == "assistant"), default=None)
    parts: list[tuple[str, bool, bool]] = []
    for i, message in enumerate(messages):
        role, content = _field(message, "role", where), _field(message, "content", where)
        answer = role == "assistant"
        counts = spec.mask == "all" or (answer and (spec.mask == "completion" or i == last))
        parts.append((f"{role.capitalize()}: ", spec.mask == "all", False))
        parts.append((content, counts, answer))
        if not answer:
            parts.append(("\n\n", spec.mask == "all", False))
    return parts

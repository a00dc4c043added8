"""Write the rows that a foreign trainer gets: training and validation rows, never test rows."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorasweep.data import text
from lorasweep.data.examples import Data, Example
from lorasweep.data.load import sources_of
from lorasweep.data.messages import read
from lorasweep.data.sources import Source
from lorasweep.errors import DataError
from lorasweep.spec.run import RunSpec

IGNORED = -100
"""Label of a token that does not count in the loss, as in PyTorch's cross-entropy."""


def write_rows(folder: Path, run: RunSpec, data: Data, tokenizer: Any, dirs: list[str]) -> None:
    """Write train.jsonl, and validation.jsonl if there are validation rows, in the run's form.

    With trainer.in_order the training rows are those of all updates in their order, repeated over
    epochs; so they are without `n_train`, where rows are endless.

    Args:
        folder: is created.
        dirs: folders in which the rows of local files are found.

    Raises:
        DataError: a row has no such form.
    """
    folder.mkdir()
    parts: dict[str, Iterator[Any]] = {}
    if run.trainer.rows == "tokens":
        n = run.steps * run.batch_size
        if not run.trainer.in_order and data.n_train is not None:
            n = data.n_train
        parts["train"] = map(_tokens, data.train(run.seed, 0, n))
        parts["validation"] = map(_tokens, data.validation)
    else:
        train, held_out = sources_of(run.dataset, dirs)
        counts = {"train": (train, data.n_train), "validation": (held_out, len(data.validation))}
        for name, (source, count) in counts.items():
            parts[name] = _texts(run, source, count or 0, tokenizer)
    for name, rows in parts.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        if lines:
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _tokens(row: Example) -> dict[str, list[int]]:
    pairs = zip(row.tokens.tolist(), row.loss.tolist())
    labels = [token if in_loss else IGNORED for token, in_loss in pairs]
    return {"input_ids": row.tokens.tolist(), "labels": labels}


def _texts(run: RunSpec, source: Source, count: int, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Yield the first `count` rows that are trained on, as messages or pairs."""
    spec, eos = run.dataset, tokenizer.eos_token or ""
    usable = (row for row in source.rows() if text.fits(spec, row, tokenizer))
    for where, row in itertools.islice(usable, count):
        if run.trainer.rows == "messages":
            found = read(spec, row, where)
            turns = [
                turn
                if learned == (turn["role"] == "assistant")
                else {**turn, "weight": int(learned)}
                for turn, learned in zip(found.turns, found.learned, strict=True)
            ]
            yield {"messages": turns, **({"tools": found.tools} if found.tools else {})}
            continue
        pieces = text.rendered(spec, row, where, tokenizer)
        if [in_loss for _, in_loss in pieces] not in ([True], [False, True]):
            raise DataError(
                f"{where}: trainer.rows=pairs takes rows of a prompt and one answer in the loss. "
                "Set trainer.rows=messages or tokens."
            )
        prompt = pieces[0][0] if len(pieces) > 1 else ""
        yield {"prompt": prompt, "completion": pieces[-1][0].removesuffix(eos)}

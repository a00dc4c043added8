"""Write the rows that a foreign trainer gets: training and validation rows, never test rows."""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorasweep.data import tokenizing
from lorasweep.data.examples import Data, Example
from lorasweep.data.messages import read
from lorasweep.data.sources import Source
from lorasweep.data.splits import sources_of
from lorasweep.errors import DataError
from lorasweep.spec.run import RunSpec

Row = dict[str, Any]
IGNORED = -100
"""Label of a token that does not count in the loss, as in PyTorch's cross-entropy."""


def write_rows(folder: Path, run: RunSpec, data: Data, tokenizer: Any, dirs: list[str]) -> None:
    """Write train.jsonl, and validation.jsonl if there are validation rows, in the run's form.

    With trainer.in_order, or of endless rows, they are those of all updates, in their order.
    `folder` is created; `dirs` have the rows of local files. DataError: a row has no such form.
    """
    folder.mkdir()
    both: Sequence[Iterator[Row]]
    if run.trainer.rows == "tokens":
        every = run.trainer.in_order or data.n_train is None
        n = run.steps * run.batch_size if every else data.n_train
        both = [map(_tokens, rows) for rows in (data.train(run.seed, 0, n or 0), data.validation)]
    else:
        counts = (data.n_train or 0, len(data.validation))
        sources = zip(sources_of(run.dataset, dirs), counts)
        both = [_texts(run, source, count, tokenizer) for source, count in sources]
    for name, rows in zip(("train", "validation"), both):
        if lines := [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]:
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _tokens(row: Example) -> Row:
    labels = [t if in_loss else IGNORED for t, in_loss in zip(row.tokens.tolist(), row.loss)]
    return {"input_ids": row.tokens.tolist(), "labels": labels}


def _texts(run: RunSpec, source: Source, count: int, tokenizer: Any) -> Iterator[Row]:
    """Yield the first `count` rows that are trained on, as messages or pairs."""
    spec, eos = run.dataset, tokenizer.eos_token or ""
    usable = (row for row in source.rows() if tokenizing.fits(spec, row, tokenizer))
    for where, row in itertools.islice(usable, count):
        if run.trainer.rows == "messages":
            found, turns = read(spec, row, where), []
            for turn, learned in zip(found.turns, found.learned, strict=True):
                same = learned == (turn["role"] == "assistant")
                turns.append(turn if same else {**turn, "weight": int(learned)})
            yield {"messages": turns, **({"tools": found.tools} if found.tools else {})}
            continue
        pieces = tokenizing.rendered(spec, row, where, tokenizer)
        if [in_loss for _, in_loss in pieces] not in ([True], [False, True]):
            raise DataError(
                f"{where}: trainer.rows=pairs takes rows of a prompt and one answer in the loss. "
                "Set trainer.rows=messages or tokens."
            )
        prompt = "".join(piece for piece, in_loss in pieces if not in_loss)
        yield {"prompt": prompt, "completion": pieces[-1][0].removesuffix(eos)}

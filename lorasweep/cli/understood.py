"""Say what was understood of models and data sets that no configuration file describes."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from lorasweep.data import chat, fields, load, sources, text
from lorasweep.errors import LorasweepError
from lorasweep.models.describe import config_at
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.sweep.request import Request

SAMPLE = 256
"""First training rows whose tokens are counted."""
SHOWN = 300
"""Characters of an example."""


def lines(request: Request) -> list[str]:
    """Return a line for each such model; for each data set one, and a rendered example.

    Text is rendered by the first base of a data set; no example if its tokenizer is not here.
    """
    from lorasweep.models import find, hub

    specs = [p.spec for p in request.points]
    bases = {s.model.name: s.model for s in specs}
    pairs = {s.dataset.name: (s.dataset, s.model) for s in reversed(specs)}
    dirs, found = request.exec.models_dir, []
    for name in request.described:
        if name in bases:
            m, on_hub = bases[name], bases[name].source == "hub"
            path = hub.cached_config(m) if on_hub else find.pinned_path(m, dirs)
            experts = f", {m.n_experts} experts ({m.n_active_experts} active)"
            context = f", context {m.context_length:,}" if m.context_length else ""
            found.append(
                f"model {m.name}: {config_at(m, path).model_type}, {m.n_params / 1e6:,.2f}M "
                f"parameters, {m.n_layers} layers{experts if m.n_experts else ''}, "
                f"{m.weights_dtype}{context}"
            )
        if name in pairs:
            from lorasweep.models import load  # only here: it imports torch

            dataset, model = pairs[name]
            try:
                tokenizer = load.tokenizer_of(model, dirs, fetched=True)
            except (LorasweepError, OSError, ValueError):
                tokenizer = None
            found += _data_lines(dataset, tokenizer, request.exec.data_dir)
    return found


def _data_lines(spec: DatasetSpec, tokenizer: Any, data_dirs: Sequence[str]) -> Iterator[str]:
    train, held_out = load.sources_of(spec, data_dirs)
    rows = list(train.rows())
    n_test = min(sum(1 for _ in held_out.rows()) - spec.n_validation, spec.n_test)
    where, row = rows[0]
    columns = fields.columns(spec)
    read = (*columns, chat.TOOLS) if spec.format == "messages" else columns
    others = ", ".join(str(name) for name in row if name not in read)
    pair = (spec.prompt_field, spec.completion_field)
    used = columns if spec.format in chat.LISTS else pair
    about = (
        f"data {spec.name}: {spec.source}, {spec.format}, columns {' -> '.join(used)}"
        f"{f' (not read: {others})' if others else ''}, {len(rows):,} training, "
        f"{spec.n_validation:,} validation and {n_test:,} test rows"
    )
    # all rows of the files, also those that are left out of training and held-out rows
    whole = dataclasses.replace(spec, holdout=0, held_out_by="")
    of_files = load.sources_of(whole, data_dirs)[: 1 if spec.test_split == spec.train_split else 2]
    given = chain.from_iterable(source.rows() for source in of_files)

    def kinds(row: Any, where: str) -> list[str]:
        found = chat.kinds_of(spec.format, row)
        if tokenizer is not None and chat.WITH_TOOLS in found:
            text.parts_of(spec, row, where, tokenizer)  # refused if the chat template has no tools
        return found

    understood = chat.rows_line(Counter(chain.from_iterable(sources.each(given, kinds))))
    if tokenizer is None:
        yield f"{about}; {understood}"
        return
    tokens = text.examples(spec, spec.train_split, train, tokenizer, SAMPLE, "")
    yield f"{about}, {len(tokens.tokens) / len(tokens):.0f} tokens a row; {understood}"
    pieces = text.rendered(spec, row, where, tokenizer)
    shown = "".join(f"[[{piece}]]" if in_loss else piece for piece, in_loss in pieces)
    shown = shown.replace("\n", "\\n")
    if len(shown) > SHOWN:
        shown = f"{shown[: SHOWN // 2]} ... {shown[-SHOWN // 2 :]}"
    yield f"example, [[in the loss]]: {shown}"

"""Say what was understood of models and data sets that no configuration file describes."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from lorasweep.data import load, messages, sources, text
from lorasweep.errors import LorasweepError
from lorasweep.launch.trainer import TOKENS
from lorasweep.models.describe import config_at
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.execution import Exec
from lorasweep.sweep.request import Request

SHOWN = 300
"""Characters of an example."""


def lines(request: Request) -> list[str]:
    """Return a line for each such model; for each data set and base a line, and a rendered example.

    Raises DataError if max_length leaves out or cuts more than half of the training rows.
    """
    from lorasweep.models import find

    specs = [p.spec for p in request.points]
    bases = {s.model.name: s.model for s in specs}
    pairs = dict.fromkeys((s.dataset, s.model) for s in specs)
    on_nodes = request.action == "plan" or request.cluster.kind == "slurm"
    exec_, found = request.exec, list[str]()
    for name in request.described:
        if name in bases:
            m, on_hub = bases[name], bases[name].source == "hub"
            path = find.cached_config(m) if on_hub else find.pinned_path(m, exec_.models_dir)
            experts = f", {m.n_experts} experts ({m.n_active_experts} active)"
            context = f", context {m.context_length:,}" if m.context_length else ""
            found.append(
                f"model {m.name}: {config_at(m, path).model_type}, {m.n_params / 1e6:,.2f}M "
                f"parameters, {m.n_layers} layers{experts if m.n_experts else ''}, "
                f"{m.weights_dtype}{context}"
            )
        for dataset, model in pairs:
            if dataset.name == name:
                from lorasweep.models.load import tokenizer_of  # only here: it imports torch

                try:
                    tokenizer = tokenizer_of(model, exec_.models_dir, fetched=on_nodes)
                except (LorasweepError, OSError, ValueError):
                    tokenizer = None
                found += _data_lines(dataset, model.name, tokenizer, exec_)
    return list(dict.fromkeys(found))


def _data_lines(spec: DatasetSpec, base: str, tokenizer: Any, exec_: Exec) -> Iterator[str]:
    train, _ = load.sources_of(spec, exec_.data_dir)
    where, row = next(train.rows())
    columns = messages.columns(spec)
    read = (*columns, messages.TOOLS) if spec.format == "messages" else columns
    others = ", ".join(str(name) for name in row if name not in read)
    pair = (spec.prompt_field, spec.completion_field)
    used = columns if spec.format in messages.LISTS else pair
    # all rows of the files, also those that are left out of training and held-out rows
    whole = dataclasses.replace(spec, holdout=0, held_out_by="")
    of_files = load.sources_of(whole, exec_.data_dir)
    given = chain(*(s.rows() for s in of_files[: 1 + (spec.test_split != spec.train_split)]))
    kinds = sources.each(given, lambda row, where: messages.read(spec, row, where).kinds)
    understood = messages.rows_line(Counter(chain.from_iterable(kinds)))
    about = (
        f"data {spec.name}: {spec.source}, {spec.format}, columns {' -> '.join(used)}"
        f"{f' (not read: {others})' if others else ''}"
    )
    if tokenizer is None:
        yield f"{about}; {understood}; tokens are not counted: no tokenizer of {base} is here"
        return
    kept = Path(exec_.runs_dir, TOKENS)
    data = load.load(spec, exec_.data_dir, tokenizer, str(kept) if kept.is_dir() else "")
    n_train = data.n_train or 0
    tokens = sum(len(e.tokens) for e in data.train(0, 0, n_train)) / n_train
    yield (
        f"{about}, {n_train:,} training, {len(data.validation):,} validation and "
        f"{len(data.test):,} test rows, {tokens:.0f} tokens a row; {understood}"
    )
    if warning := text.check_fit(spec, data.fits, "dataset.max_length="):
        yield f"warning ({base}): {warning}"
    pieces = text.rendered(spec, row, where, tokenizer)
    shown = "".join(f"[[{piece}]]" if in_loss else piece for piece, in_loss in pieces)
    shown = shown.replace("\n", "\\n")
    if len(shown) > SHOWN:
        shown = f"{shown[: SHOWN // 2]} ... {shown[-SHOWN // 2 :]}"
    yield f"example, [[in the loss]]: {shown}"

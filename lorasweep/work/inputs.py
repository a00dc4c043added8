"""What was understood of the user's files, and whether all that the runs need is here."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from lorasweep.data import messages, rewards, sources, splits, tokenizing
from lorasweep.data.synthetic.generators import generator
from lorasweep.errors import DataError, LorasweepError, ModelError, SpecError
from lorasweep.launch.torch_trainer import TOKENS
from lorasweep.models.describe import config_at
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.execution import Exec
from lorasweep.spec.metric import METRICS
from lorasweep.spec.run import RunSpec
from lorasweep.sweep.request import Request

EXAMPLE = 300
"""Characters of an example."""


def check_available(request: Request) -> None:
    """Check that the weights and data of all runs are on this machine, and fit together.

    The first run that needs a file of the hub downloads it. On a cluster a missing file is an
    error, because jobs would hold GPUs during the download.

    Raises:
        ModelError, DataError: weights or data are missing; the message says how to get them.
        SpecError: a data set does not fit the model's vocabulary or tokenizer.
    """
    from lorasweep.models import find

    specs, exec_ = [p.spec for p in request.points], request.exec
    fetched, reads_text = request.cluster.kind == "slurm", {}
    for one in {s.model.name: s for s in specs}.values():
        check_tokenizer(one, exec_)
        model = one.model
        reads_text[model.name] = find.check_available(model, exec_.models_dir, fetched)
    for spec in {(s.dataset.name, s.objective): s for s in specs}.values():
        if METRICS[spec.objective].higher_is_better:
            rewards.check_available(spec.dataset)
        if not exec_.skip_broken_data:  # else bad data fails only its own runs
            splits.check_available(spec.dataset, exec_.data_dir)
    for spec in {(s.model.name, s.dataset.name): s for s in specs}.values():
        is_text, model = spec.dataset.source != "synthetic", spec.model
        vocab = None if is_text else generator(spec.dataset.location).vocab
        if (vocab or 0) > model.vocab_size or (vocab is None and not reads_text[model.name]):
            few = f"only {model.vocab_size} of {vocab} symbols"
            raise SpecError(
                f"model {model.name!r} has {few if vocab else 'no tokenizer'} for dataset "
                f"{spec.dataset.name!r}. Choose a model made for it (conf/model), or put the "
                "tokenizer's files beside the weights."
            )


def check_tokenizer(run: RunSpec, exec_: Exec) -> None:
    """Raise SpecError if the run's program is TRL's, and its base is here without a tokenizer."""
    from lorasweep.models import find

    # TRL loads the tokenizer, also for rows of token ids
    trl = any(Path(w).name == "trl" or "trl/scripts/" in w for w in run.trainer.command)
    with suppress(ModelError):  # not here: reported before training
        if trl and not find.check_available(run.model, exec_.models_dir):
            raise SpecError(
                f"model {run.model.name!r} has no tokenizer, and trainer={run.trainer.name} (TRL) "
                "loads one. Put the tokenizer's files beside the weights, or use trainer=hf."
            )


def understood(request: Request) -> list[str]:
    """Describe the models and data sets that no configuration file describes.

    A line for each such model; for each data set and base a line, and a rendered example.

    Raises DataError if max_length leaves out or cuts more than half of the training rows.
    """
    from lorasweep.models import find

    exec_, mine, found = request.exec, {*request.described}, list[str]()
    specs = [p.spec for p in request.points]
    for m in {s.model.name: s.model for s in specs if s.model.name in mine}.values():
        path = find.cached_config(m) if m.source == "hub" else find.pinned_path(m, exec_.models_dir)
        found.append(
            f"model {m.name}: {config_at(m, path).model_type}, {m.n_params / 1e6:,.2f}M "
            f"parameters, {m.n_layers} layers, {m.weights_dtype}, context {m.context_length}"
        )
    on_nodes = request.action == "plan" or request.cluster.kind == "slurm"
    for data, base in dict.fromkeys((s.dataset, s.model) for s in specs if s.dataset.name in mine):
        from lorasweep.models.load import tokenizer_of  # only here: it imports torch

        tokenizer = None
        with suppress(LorasweepError, OSError, ValueError):
            tokenizer = tokenizer_of(base, exec_.models_dir, fetched=on_nodes)
        found += _data_lines(data, base.name, tokenizer, exec_)
    return list(dict.fromkeys(found))


def _data_lines(spec: DatasetSpec, base: str, tokenizer: Any, exec_: Exec) -> Iterator[str]:
    train, _ = splits.sources_of(spec, exec_.data_dir)
    where, row = next(train.rows(), ("", None))
    if row is None:
        raise DataError(f"dataset {spec.name!r}: no row is left for training. Hold fewer out.")
    columns = messages.columns(spec)
    read = (*columns, messages.TOOLS) if spec.format == "messages" else columns
    others = ", ".join(str(name) for name in row if name not in read)
    pair = (spec.prompt_field, spec.completion_field)
    used = columns if spec.format in messages.LISTS else pair
    # all rows of the files, also those that are left out of training and held-out rows
    whole = dataclasses.replace(spec, holdout=0, held_out_by="")
    of_files = splits.sources_of(whole, exec_.data_dir)
    given = chain(*(s.rows() for s in of_files[: 1 + (spec.test_split != spec.train_split)]))
    kinds = sources.each(given, lambda row, where: messages.read(spec, row, where).kinds)
    counted = messages.rows_line(Counter(chain.from_iterable(kinds)))
    about = (
        f"data {spec.name}: {spec.source}, {spec.format}, columns {' -> '.join(used)}"
        f"{f' (not read: {others})' if others else ''}"
    )
    if tokenizer is None:
        yield f"{about}; {counted}; tokens are not counted: no tokenizer of {base} is here"
        return
    kept = Path(exec_.runs_dir, TOKENS)
    data = splits.load(spec, exec_.data_dir, tokenizer, str(kept) if kept.is_dir() else "")
    n_train = data.n_train or 0
    tokens = sum(len(e.tokens) for e in data.train(0, 0, n_train)) / n_train
    yield (
        f"{about}, {n_train:,} training, {len(data.validation):,} validation and "
        f"{len(data.test):,} test rows, {tokens:.0f} tokens a row; {counted}"
    )
    if warning := tokenizing.check_fit(spec, data.fits, "dataset.max_length="):
        yield f"warning ({base}): {warning}"
    pieces = tokenizing.rendered(spec, row, where, tokenizer)
    shown = "".join(f"[[{piece}]]" if in_loss else piece for piece, in_loss in pieces)
    shown = shown.replace("\n", "\\n")
    if len(shown) > EXAMPLE:
        shown = f"{shown[: EXAMPLE // 2]} ... {shown[-EXAMPLE // 2 :]}"
    yield f"example, [[in the loss]]: {shown}"

"""Say what was understood of models and data sets that no configuration file describes."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from lorasweep.data import fields, load, text
from lorasweep.errors import LorasweepError
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.model import ModelSpec
from lorasweep.sweep.request import Request

SAMPLE = 256
"""First training rows whose tokens are counted."""
SHOWN = 300
"""Characters of an example."""


def lines(request: Request) -> list[str]:
    """Return a line for each such model, and for each data set one and a rendered example.

    Text is rendered by the first base of a data set; no example if its tokenizer is not here.
    """
    specs = [p.spec for p in request.points]
    models = {s.model.name: s.model for s in specs}
    pairs = {s.dataset.name: (s.dataset, s.model) for s in reversed(specs)}
    dirs, found = request.exec.models_dir, []
    for name in request.described:
        if name in models:
            found.append(_model_line(models[name], dirs))
        if name in pairs:
            dataset, model = pairs[name]
            found += _data_lines(dataset, _tokenizer(model, dirs), request.exec.data_dir)
    return found


def _model_line(model: ModelSpec, models_dirs: Sequence[str]) -> str:
    from lorasweep.models import hub
    from lorasweep.models import load as models
    from lorasweep.models.describe import config_at

    on_hub = model.source == "hub"
    path = hub.cached_config(model) if on_hub else models.find_pinned(model, models_dirs)
    experts = f", {model.n_experts} experts ({model.n_active_experts} active)"
    context = f", context {model.context_length:,}" if model.context_length else ""
    return (
        f"model {model.name}: {config_at(model, path).model_type}, {model.n_params / 1e6:,.2f}M "
        f"parameters, {model.n_layers} layers{experts if model.n_experts else ''}, "
        f"{model.weights_dtype}{context}"
    )


def _tokenizer(model: ModelSpec, models_dirs: Sequence[str]) -> Any:
    """Return the tokenizer of a base; None if it is not on this machine."""
    from lorasweep.models import load as models

    try:
        return models.tokenizer_of(model, models_dirs, fetched=True)
    except (LorasweepError, OSError, ValueError):
        return None


def _data_lines(spec: DatasetSpec, tokenizer: Any, data_dirs: Sequence[str]) -> Iterator[str]:
    train, held_out = load.sources_of(spec, data_dirs)
    rows = train.rows()
    sample = list(itertools.islice(rows, SAMPLE))
    n_train = len(sample) + sum(1 for _ in rows)
    n_test = min(sum(1 for _ in held_out.rows()) - spec.n_validation, spec.n_test)
    where, row = sample[0]
    columns = fields.columns(spec)
    others = ", ".join(str(name) for name in row if name not in columns)
    mean = ""
    if tokenizer is not None:
        tokens = text.examples(spec, spec.train_split, train, tokenizer, SAMPLE, "")
        mean = f", {len(tokens.tokens) / len(tokens):.0f} tokens a row"
    yield (
        f"data {spec.name}: {spec.source}, {spec.format}, columns {' -> '.join(columns)}"
        f"{f' (not read: {others})' if others else ''}, {n_train:,} training, "
        f"{spec.n_validation:,} validation and {n_test:,} test rows{mean}"
    )
    if tokenizer is not None:
        pieces = text.rendered(spec, row, where, tokenizer)
        shown = "".join(f"[[{piece}]]" if in_loss else piece for piece, in_loss in pieces)
        shown = shown.replace("\n", "\\n")
        if len(shown) > SHOWN:
            shown = f"{shown[: SHOWN // 2]} ... {shown[-SHOWN // 2 :]}"
        yield f"example, [[in the loss]]: {shown}"

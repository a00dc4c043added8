"""How much information a data set holds under a model: the summed log-loss of a first pass.

Under the base model, and online during training: each batch is coded before the update on it, a
prequential code (Dawid 1984), whose length is what the training itself records.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.customers.pages import render
from lorasweep.data import own, sources
from lorasweep.data.examples import Data
from lorasweep.errors import SpecError, TrainingError
from lorasweep.spec.run import RunSpec
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.aligned import aligned
from lorasweep.sweep.request import Request

APART = 3.0
"""Factor between the learning rates that are tried. The shortest code is taken, and its length
includes naming the learning rate."""
MOST_RATES = 9
HELD_OUT, CURVE = 32, 8
"""Held-out rows of the runs at their end and before: they are not what is measured."""
TOGETHER = 1024
"""Rows whose loss tokens are counted at once."""
CodeLength = Callable[..., list[dict[str, float | None]]]
"""(nats under the base model, nats online, tokens, tokens left) -> the nats of all rows of each."""


@dataclass(frozen=True)
class Code:
    """One run's code."""

    run: str
    lr: float
    nats: list[float]
    """Of each batch, before the update on it."""


def run_of(request: Request) -> RunSpec:
    """Return the run whose training is the code: the request's, with few held-out rows.

    Raises:
        SpecError: it is not one that can be a code.
    """
    spec = request.points[0].spec
    if not 1 <= request.rates <= MOST_RATES:
        raise SpecError(
            f"rates={request.rates}: expected 1 to {MOST_RATES} learning rates, a factor "
            f"{APART:g} apart."
        )
    if request.cluster.kind == "slurm":
        raise SpecError(
            "action=measure trains where it runs. On a cluster, run it inside a job, with "
            "cluster=local: srun python -m lorasweep action=measure ..."
        )
    if spec.objective != "sft":
        raise SpecError(
            f"action=measure with objective={spec.objective}: rewards tell at most one bit an "
            "episode, so there is nothing to measure. Leave objective out."
        )
    dataset = own.dataset_of(request.data) if request.data else spec.dataset
    dataset = dataclasses.replace(dataset, n_retain=0, n_validation=0)
    if dataset.source != "synthetic":  # held-out rows of generated data give the entropy
        held_out = min(dataset.n_test, HELD_OUT)
        curve = min(dataset.n_test_curve, held_out, CURVE)
        dataset = dataclasses.replace(dataset, n_test=held_out, n_test_curve=curve)
    return dataclasses.replace(spec, dataset=dataset)


def one_pass(spec: RunSpec, data: Data) -> RunSpec:
    """Return the run with no more updates than one pass over the rows.

    Raises:
        SpecError: they do not fill one batch.
    """
    if data.n_train is None or spec.steps * spec.batch_size <= data.n_train:
        return spec
    steps = data.n_train // spec.batch_size
    if not steps:
        raise SpecError(
            f"batch_size={spec.batch_size}: {spec.dataset.name} has {data.n_train} rows. Set a "
            f"batch_size of at most {data.n_train}."
        )
    return dataclasses.replace(spec, steps=steps)


def codes_of(specs: Sequence[RunSpec], base: Sequence[Any], store: RunStore) -> list[Code]:
    """Return the codes of the runs that did not diverge.

    Args:
        specs: the runs.
        base: each batch under the base model, with its tokens and nats.
        store: has their records: the mean over each batch's tokens.

    Raises:
        TrainingError: a run failed, or all diverged.
    """
    codes = []
    for spec in specs:
        result = store.result(spec.id)
        if result is None:
            raise TrainingError(f"run {spec.id} failed: {store.failure(spec.id)}.")
        if result["state"] == "done":
            by_step = {record["step"]: record["train_nll"] for record in store.records(spec.id)}
            nats = [by_step[k] * batch.tokens for k, batch in enumerate(base, 1)]
            codes.append(Code(spec.id, spec.lr, nats))
    if not codes:
        raise TrainingError(f"all {len(specs)} runs diverged. Set lr below {specs[0].lr:g}.")
    return codes


def information(
    spec: RunSpec,
    data: Data,
    codes: Sequence[Code],
    base: Sequence[Any],
    tried: int,
    code_length: CodeLength,
) -> dict[str, Any]:
    """Return what was measured, and what follows for all rows, as JSON values.

    Args:
        spec: the run, at the middle learning rate.
        data: its rows.
        codes: those of the runs that did not diverge.
        base: each batch under the base model.
        tried: number of learning rates.
        code_length: extrapolates to all rows.
    """
    best = min(codes, key=lambda code: sum(code.nats))
    rows, tokens = spec.steps * spec.batch_size, sum(b.tokens for b in base)
    all_tokens = _loss_tokens(spec, data)
    which = math.log(tried)
    left = None if all_tokens is None else all_tokens - tokens
    as_is = [b.nats for b in base]
    plain, online = code_length(as_is, best.nats, [b.tokens for b in base], left)
    online = {k: v if v is None else v + which for k, v in online.items()}
    sums = sum(as_is), sum(best.nats) + which
    return {
        "model": spec.model.name,
        "dataset": spec.dataset.name,
        "rows": {"measured": rows, "all": data.n_train},
        "loss_tokens": {"measured": tokens, "all": all_tokens},
        "as_is": _units(sums[0], plain, rows, tokens),
        "prequential": _units(sums[1], online, rows, tokens),
        "known": _known(data, tokens, sums),
        "settings": {
            "method": spec.method.plain(),
            "batch_size": spec.batch_size,
            "precision": spec.precision,
            "lr": best.lr,
        },
        "runs": [{"run": c.run, "lr": c.lr, "nats": sum(c.nats)} for c in codes],
        "diverged": tried - len(codes),
    }


def rows_sha256(spec: RunSpec, data_dirs: list[str]) -> str | None:
    """Return the digits that name the file of rows; None for data that are not a whole file."""
    if spec.dataset.source != "jsonl" or spec.dataset.n_train is not None:
        return None
    return sources.find_jsonl(spec.dataset, spec.dataset.train_split, data_dirs)[1][: own.DIGITS]


def _loss_tokens(spec: RunSpec, data: Data) -> int | None:
    """Count the loss tokens of all rows; None for a generator without end."""
    if data.n_train is None:
        return None
    total = 0
    for start in range(0, data.n_train, TOGETHER):
        rows = data.train(spec.seed, start, min(TOGETHER, data.n_train - start))
        total += sum(int(row.loss.sum()) for row in rows)
    return total


def _units(nats: float, length: dict[str, float | None], rows: int, tokens: int) -> dict[str, Any]:
    """Return a summed loss in nats and bits: a token, an example, in all, and of all rows."""
    return {
        name: {
            "per_token": nats / tokens * factor,
            "per_example": nats / rows * factor,
            "measured": nats * factor,
            "all": {k: None if v is None else v * factor for k, v in length.items()},
        }
        for name, factor in (("nats", 1.0), ("bits", 1 / math.log(2)))
    }


def _known(data: Data, tokens: int, sums: tuple[float, float]) -> dict[str, Any] | None:
    """Compare the code with what is known of generated data; None for others.

    Its length above the entropy of the rows is the cost of learning them.
    """
    if data.bits is None or data.entropy_floor_nats is None:
        return None
    known = data.bits(tokens)
    above = [(nats - tokens * data.entropy_floor_nats) / math.log(2) for nats in sums]
    return {
        "bits": known,
        "as_is_above_entropy": above[0],
        "prequential_above_entropy": above[1],
        "ratio": above[1] / known["generator"] if known["generator"] else None,
    }


# ---------------------------------------------------------------- text

NAMES = {"as_is": "under the base model", "prequential": "online, during training"}


def text_of(found: dict[str, Any], path: Path) -> str:
    """Return the result for the terminal; `path`: the file that keeps it."""
    head = ["", "", "a token", "an example", "these rows", "all rows [95%]"]
    rows = [_row(found, name, unit) for name in NAMES for unit in ("bits", "nats")]
    table = "\n".join(aligned([head, *rows]))
    return render("measured.txt", found=found, table=table, ln2=math.log(2), path=path)


def _row(found: dict[str, Any], name: str, unit: str) -> list[str]:
    values = found[name][unit]
    whole, text = values["all"], "-"
    if whole["value"] is not None:
        text = f"{whole['value']:,.0f}"
        if whole["low"] != whole["high"]:
            text += f" [{whole['low']:,.0f}, {whole['high']:,.0f}]"
    per_token, per_example = f"{values['per_token']:.3f}", f"{values['per_example']:,.1f}"
    return [NAMES[name], unit, per_token, per_example, f"{values['measured']:,.0f}", text]

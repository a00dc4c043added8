"""Measure the information in a data set: its code length, the summed log-loss of a first pass.

Two models code the data. One is the base. The other is the model in training, which codes each
batch just before the update on it (a prequential code, Dawid 1984). So this code length is the sum
of the recorded training losses.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorasweep.advise.pages import render
from lorasweep.advise.rules.rates import APART, MOST_RATES
from lorasweep.data import own, sources
from lorasweep.data.examples import Data
from lorasweep.errors import SpecError, TrainingError
from lorasweep.spec.dataset import FILES
from lorasweep.spec.run import RunSpec
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.names import aligned
from lorasweep.sweep.request import Request

HELD_OUT, CURVE = 32, 8
"""Held-out rows in the last evaluation and in earlier ones: few, as only training is measured."""
TOGETHER = 1024
"""Rows whose loss tokens are counted at once."""
CodeLength = Callable[..., list[dict[str, float | None]]]
"""(nats under the base and online, loss tokens, each by batch; tokens left) -> nats of all rows."""


def run_of(request: Request) -> RunSpec:
    """Return the request's run with few held-out rows; its training loss is the code length.

    Raises:
        SpecError: nothing can be measured with the settings of the request.
    """
    spec = request.points[0].spec
    if not 1 <= request.rates <= MOST_RATES:
        raise SpecError(
            f"rates={request.rates}: expected 1 to {MOST_RATES}, a factor {APART:g} apart."
        )
    if request.cluster.kind == "slurm":
        raise SpecError(
            "action=measure trains here. In a job: cluster=local, by srun python -m ..."
        )
    if spec.objective != "sft":
        raise SpecError(f"objective={spec.objective}: a reward has one bit. Leave objective out.")
    dataset = spec.dataset
    if request.data:
        named = ("format", "prompt_field", "completion_field")
        stated = {n: getattr(dataset, n) for n in named if f"dataset.{n}" in request.given}
        dataset = own.dataset_of(request.data, named=stated)
    elif dataset.name in request.described:  # all rows are measured, as with data=FILE
        dataset = dataclasses.replace(dataset, holdout=0, held_out_by="")
    n_test, n_curve = dataset.n_test, dataset.n_test_curve
    if dataset.source != "synthetic":  # held-out rows of generated data give the entropy
        n_test, n_curve = min(n_test, HELD_OUT), min(n_curve, n_test, CURVE)
    few: dict[str, Any] = {
        "n_retain": 0,
        "n_validation": 0,
        "n_test": n_test,
        "n_test_curve": n_curve,
    }
    return dataclasses.replace(spec, dataset=dataclasses.replace(dataset, **few))


def information(
    specs: Sequence[RunSpec],
    data: Data,
    base: Sequence[Any],
    request: Request,
    store: RunStore,
    code_length: CodeLength,
) -> dict[str, Any]:
    """Return the information in the measured rows and in all rows, as JSON values.

    Args:
        specs: the finished runs, which differ in their learning rate.
        base: loss tokens and nats of each batch under the base model.
        code_length: function that extrapolates the code length to all rows.

    Raises:
        TrainingError: a run failed, or all diverged.
    """
    spec, codes = specs[0], []
    for run in specs:
        result = store.result(run.id)
        if result is None:
            raise TrainingError(f"run {run.id} failed: {store.failure(run.id)}.")
        if result["state"] == "done":
            by_step = {record["step"]: record["train_nll"] for record in store.records(run.id)}
            codes.append((run, [by_step[k] * batch.tokens for k, batch in enumerate(base, 1)]))
    if not codes:
        raise TrainingError(f"all {len(specs)} runs diverged. Set lr below {spec.lr:g}.")
    shortest, nats = min(codes, key=lambda code: sum(code[1]))
    rows, tokens = spec.steps * spec.batch_size, sum(b.tokens for b in base)
    settings = {key: getattr(spec, key) for key in ("batch_size", "precision")}
    all_tokens = None  # endless generated data
    if data.n_train is not None:
        starts = range(0, data.n_train, TOGETHER)
        parts = (data.train(spec.seed, k, min(TOGETHER, data.n_train - k)) for k in starts)
        all_tokens = sum(int(row.loss.sum()) for part in parts for row in part)
    left = None if all_tokens is None else all_tokens - tokens
    which = math.log(len(specs))  # the shortest code also has to name the learning rate
    as_is = [b.nats for b in base]
    plain, online = code_length(as_is, nats, [b.tokens for b in base], left)
    online = {k: v if v is None else v + which for k, v in online.items()}
    sums = {"as_is": sum(as_is), "prequential": sum(nats) + which}
    known: dict[str, Any] | None = None
    if data.bits is not None and data.entropy_floor_nats is not None:
        # the length of the code above the entropy of the rows is the cost of learning them
        bits, entropy = data.bits(tokens), tokens * data.entropy_floor_nats
        above = {k: (length - entropy) / math.log(2) for k, length in sums.items()}
        ratio = above["prequential"] / bits["generator"] if bits["generator"] else None
        costs = {f"{k}_above_entropy": v for k, v in above.items()}
        known = {"bits": bits, **costs, "ratio": ratio}
    rows_sha256, dataset = None, spec.dataset  # set if the rows are a whole file
    if dataset.source in FILES and dataset.n_train is None:
        found = sources.find_file(dataset, dataset.train_split, request.exec.data_dir)
        rows_sha256 = found[1][: own.DIGITS]
    return {
        "model": spec.model.name,
        "dataset": spec.dataset.name,
        "rows": {"measured": rows, "all": data.n_train},
        "loss_tokens": {"measured": tokens, "all": all_tokens},
        "as_is": _units(sums["as_is"], plain, rows, tokens),
        "prequential": _units(sums["prequential"], online, rows, tokens),
        "known": known,
        "settings": {"method": spec.method.plain(), **settings, "lr": shortest.lr},
        "runs": [{"run": run.id, "lr": run.lr, "nats": sum(code)} for run, code in codes],
        "diverged": len(specs) - len(codes),
        "rows_sha256": rows_sha256,
    }


def _units(nats: float, length: dict[str, float | None], rows: int, tokens: int) -> dict[str, Any]:
    """Return a summed loss in nats and bits: per token, per row, of measured and of all rows."""
    return {
        name: {
            "per_token": nats / tokens * factor,
            "per_example": nats / rows * factor,
            "measured": nats * factor,
            "all": {k: None if v is None else v * factor for k, v in length.items()},
        }
        for name, factor in (("nats", 1.0), ("bits", 1 / math.log(2)))
    }


NAMES = {"as_is": "under the base model", "prequential": "online, during training"}


def text_of(found: dict[str, Any], path: Path) -> str:
    """Return the result as text; `path`: the file that keeps it."""
    rows = [["", "", "per token", "per row", "measured rows", "all rows [95%]"]]
    for key, unit in itertools.product(NAMES, ("bits", "nats")):
        values = found[key][unit]
        whole, text = values["all"], "-"
        if whole["value"] is not None:
            text = f"{whole['value']:,.0f}"
            if whole["low"] != whole["high"]:
                text += f" [{whole['low']:,.0f}, {whole['high']:,.0f}]"
        each = f"{values['per_token']:.3f}", f"{values['per_example']:,.1f}"
        rows.append([NAMES[key], unit, *each, f"{values['measured']:,.0f}", text])
    table = "\n".join(aligned(rows))
    return render("measured.txt", found=found, table=table, ln2=math.log(2), path=path)

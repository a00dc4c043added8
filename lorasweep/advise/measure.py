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
from lorasweep.advise.rules import MOST_RATES
from lorasweep.data import sources
from lorasweep.data.examples import Data
from lorasweep.errors import SpecError, TrainingError
from lorasweep.spec.dataset import FILES
from lorasweep.spec.run import RunSpec
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import aligned
from lorasweep.sweep.request import Request

HELD_OUT, CURVE = 32, 8
"""Held-out rows in the last evaluation and in earlier ones: few, as only training is measured."""
NAMES = {"as_is": "under the base model", "prequential": "online, during training"}
UNITS = {"bits": math.log(2), "nats": 1.0}
"""Unit -> nats in it."""
CodeLength = Callable[..., list[dict[str, float | None]]]
"""(nats under the base and online, loss tokens, each by batch; tokens left) -> nats of all rows."""


def run_of(request: Request) -> RunSpec:
    """Return the request's run with few held-out rows; its training loss is the code length.

    Raises:
        SpecError: nothing can be measured with the settings of the request.
    """
    spec, dataset = request.points[0].spec, request.points[0].spec.dataset
    if not 1 <= request.rates <= MOST_RATES or request.cluster.kind == "slurm":
        raise SpecError(
            f"rates={request.rates} cluster={request.cluster.kind}: expected 1 to {MOST_RATES} "
            "learning rates, and cluster=local (in a job: srun python -m ...)."
        )
    if spec.objective != "sft":
        raise SpecError(f"objective={spec.objective}: a reward has one bit. Leave objective out.")
    if request.data:
        named = ("format", "prompt_field", "completion_field")
        stated = {n: getattr(dataset, n) for n in named if f"dataset.{n}" in request.given}
        dataset = sources.dataset_of(request.data, named=stated)
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
    spec, dataset, codes = specs[0], specs[0].dataset, []
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
    all_tokens = None  # endless generated data
    if data.n_train is not None:
        all_tokens = sum(int(r.loss.sum()) for r in data.train(spec.seed, 0, data.n_train))
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
    rows_sha256 = None  # set if the rows are a whole file
    if dataset.source in FILES and dataset.n_train is None:
        found = sources.find_file(dataset, dataset.train_split, request.exec.data_dir)
        rows_sha256 = found[1][: sources.DIGITS]
    settings = {key: getattr(spec, key) for key in ("batch_size", "precision")}
    lengths = {
        key: {
            unit: {
                "per_token": sums[key] / tokens / size,
                "per_example": sums[key] / rows / size,
                "measured": sums[key] / size,
                "all": {k: None if v is None else v / size for k, v in whole.items()},
            }
            for unit, size in UNITS.items()
        }
        for key, whole in (("as_is", plain), ("prequential", online))
    }
    return {
        "model": spec.model.name,
        "dataset": dataset.name,
        "rows": {"measured": rows, "all": data.n_train},
        "loss_tokens": {"measured": tokens, "all": all_tokens},
        **lengths,
        "known": known,
        "settings": {"method": spec.method.plain(), **settings, "lr": shortest.lr},
        "runs": [{"run": run.id, "lr": run.lr, "nats": sum(code)} for run, code in codes],
        "diverged": len(specs) - len(codes),
        "rows_sha256": rows_sha256,
    }


def text_of(found: dict[str, Any], path: Path) -> str:
    """Return the result as text; `path`: the file that keeps it."""
    rows = [["", "", "per token", "per row", "measured rows", "all rows [95%]"]]
    for key, unit in itertools.product(NAMES, UNITS):
        values = found[key][unit]
        whole, text = values["all"], "-"
        if whole["value"] is not None:
            text = "{value:,.0f} [{low:,.0f}, {high:,.0f}]".format(**whole)
        each = f"{values['per_token']:.3f}", f"{values['per_example']:,.1f}"
        rows.append([NAMES[key], unit, *each, f"{values['measured']:,.0f}", text])
    table = "\n".join(aligned(rows))
    return render("measured.txt", found=found, table=table, ln2=math.log(2), path=path)

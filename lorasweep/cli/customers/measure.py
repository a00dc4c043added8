"""How much information a data set holds under a model: the summed log-loss of a first pass.

As the base is, and along a run that learns each batch after its loss is taken: a prequential code
(Dawid 1984), whose length is what the training itself records.
"""

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.advise import information
from lorasweep.cli import answer
from lorasweep.cli.progress import Display
from lorasweep.config.preflight import check_available
from lorasweep.data import own, sources
from lorasweep.data.examples import Data
from lorasweep.errors import SpecError, TrainingError
from lorasweep.launch import local
from lorasweep.launch.trainer import TorchTrainer
from lorasweep.spec.run import RunSpec
from lorasweep.store import files
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.aligned import aligned
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import Request

APART = 3.0
"""Factor between the rates that are tried. The shortest code is taken, and pays for saying which.
"""
MOST_RATES = 9
HELD_OUT, CURVE = 32, 8
"""Held-out rows of the runs at their end and before: they are not what is measured."""
TOGETHER = 1024
"""Rows whose loss tokens are counted at once."""


@dataclass(frozen=True)
class Code:
    """One run's code."""

    run: str
    lr: float
    nats: list[float]
    """Of each batch, before it was learned."""


def show(request: Request) -> int:
    """Measure, print, and keep what was found for action=advise."""
    store, spec = RunStore(request.exec.runs_dir), _spec(request)
    check_available(dataclasses.replace(request, points=[Point(spec.method.name, spec)]))
    store.prepare()
    trainer = TorchTrainer()
    data = trainer.data(spec, request.exec)
    spec = _one_pass(spec, data)
    powers = [k - (request.rates - 1) / 2 for k in range(request.rates)]
    specs = [dataclasses.replace(spec, lr=APART**k * spec.lr) for k in powers]
    points = [Point(s.method.name, s) for s in specs]
    with Display(points, request.format == "json") as display:
        local.run_points(points, store, request.exec, display.event, trainer)
    codes = [code for s in specs if (code := _code(s, store)) is not None]
    if not codes:
        raise TrainingError(f"all {len(specs)} runs around lr={spec.lr} diverged. Set a lower lr.")
    base = trainer.first_pass(spec, request.exec)
    for code in codes:  # a record has the mean over the batch's tokens
        code.nats[:] = [mean * b.tokens for mean, b in zip(code.nats, base, strict=True)]
    found = _found(spec, data, codes, base, len(specs))
    found["rows_sha256"] = _rows_sha256(spec, request.exec.data_dir)
    folder = Path(request.exec.reports_dir) / information.FOLDER
    path = folder / f"{spec.dataset.name}-{spec.model.name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, json.dumps(found, indent=1).encode())
    print(json.dumps(found) if request.format == "json" else "\n".join(_lines(found, path)))
    return 0


def _spec(request: Request) -> RunSpec:
    """Return the run whose training is the code: the request's, with few held-out rows.

    Raises:
        SpecError: it is not one that can be a code.
    """
    spec = request.points[0].spec
    if not 1 <= request.rates <= MOST_RATES:
        raise SpecError(
            f"rates={request.rates}: expected 1 to {MOST_RATES} rates, a factor {APART:g} apart."
        )
    if request.cluster.kind == "slurm":
        raise SpecError(
            "action=measure trains where it runs. On a cluster, run it inside a job, with "
            "cluster=local: srun python -m lorasweep action=measure ..."
        )
    if spec.objective != "sft":
        raise SpecError(
            f"action=measure with objective={spec.objective}: rewards tell at most one bit an "
            "episode, and nothing is to be measured. Leave objective out."
        )
    dataset = own.dataset_of(request.data) if request.data else spec.dataset
    dataset = dataclasses.replace(dataset, n_retain=0, n_validation=0)
    if dataset.source != "synthetic":  # of generated rows the held-out ones say the entropy
        held_out = min(dataset.n_test, HELD_OUT)
        curve = min(dataset.n_test_curve, held_out, CURVE)
        dataset = dataclasses.replace(dataset, n_test=held_out, n_test_curve=curve)
    return dataclasses.replace(spec, dataset=dataset)


def _one_pass(spec: RunSpec, data: Data) -> RunSpec:
    """Return the run with no more updates than the rows last: none may come twice.

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
    text = f"{data.n_train:,} rows last for {steps} updates of {spec.batch_size}: steps={steps}"
    print(text, file=sys.stderr)
    return dataclasses.replace(spec, steps=steps)


def _code(spec: RunSpec, store: RunStore) -> Code | None:
    """Return the mean losses of a run's batches; None for one that did not reach its end."""
    result = store.result(spec.id)
    if result is None:
        raise TrainingError(f"run {spec.id} failed: {store.failure(spec.id)}.")
    if result["state"] != "done":
        return None
    by_step = {record["step"]: record["train_nll"] for record in store.records(spec.id)}
    return Code(spec.id, spec.lr, [by_step[step + 1] for step in range(spec.steps)])


def _found(
    spec: RunSpec, data: Data, codes: list[Code], base: list[Any], tried: int
) -> dict[str, Any]:
    """Return what was measured, and what follows for all rows, as JSON values.

    Args:
        spec: the run, at the middle rate.
        data: its rows.
        codes: those of the runs that did not diverge.
        base: each batch as the base is.
        tried: number of rates.
    """
    best = min(codes, key=lambda code: sum(code.nats))
    rows, tokens = spec.steps * spec.batch_size, sum(b.tokens for b in base)
    all_rows, all_tokens = data.n_train, _loss_tokens(spec, data)
    which = math.log(tried)
    left = None if all_tokens is None else all_tokens - tokens
    as_is, prequential = [b.nats for b in base], best.nats
    lengths = answer.code_length(as_is, prequential, [b.tokens for b in base], left)
    lengths = [lengths[0], {k: v if v is None else v + which for k, v in lengths[1].items()}]
    sums = (sum(as_is), sum(prequential) + which)
    names = ("as_is", "prequential")
    return {
        "model": spec.model.name,
        "dataset": spec.dataset.name,
        "rows": {"measured": rows, "all": all_rows},
        "loss_tokens": {"measured": tokens, "all": all_tokens},
        **{
            name: _units(total, length, rows, tokens)
            for name, total, length in zip(names, sums, lengths, strict=True)
        },
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


def _rows_sha256(spec: RunSpec, data_dirs: list[str]) -> str | None:
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

    def unit(factor: float) -> dict[str, Any]:
        return {
            "per_token": nats / tokens * factor,
            "per_example": nats / rows * factor,
            "measured": nats * factor,
            "all": {k: None if v is None else v * factor for k, v in length.items()},
        }

    return {"nats": unit(1.0), "bits": unit(1 / math.log(2))}


def _known(data: Data, tokens: int, sums: tuple[float, float]) -> dict[str, Any] | None:
    """Hold the code to what is known of generated data; None for others.

    Above the entropy of the rows lies what learning them cost.
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


def _lines(found: dict[str, Any], path: Path) -> list[str]:
    rows, tokens, known = found["rows"], found["loss_tokens"], found["known"]
    of = "" if rows["all"] is None else f" of {rows['all']:,}"
    of_tokens = "" if tokens["all"] is None else f" of {tokens['all']:,}"
    head = ["", "", "a token", "an example", "these rows", "all rows [95%]"]
    table = [head, *(_row(found, name, unit) for name in NAMES for unit in ("bits", "nats"))]
    settings = found["settings"]
    tried = ", ".join(f"{run['lr']:.3g} {run['nats'] / math.log(2):,.0f}" for run in found["runs"])
    lines = [
        f"{found['dataset']} under {found['model']}: {rows['measured']:,}{of} rows, "
        f"{tokens['measured']:,}{of_tokens} tokens that bear loss",
        "",
        *aligned(table),
        "",
        f"learned along: {settings['method']['name']} at {settings['lr']:.3g}, batches of "
        f"{settings['batch_size']}. Bits at each rate: {tried}"
        + (f"; {found['diverged']} diverged" if found["diverged"] else ""),
    ]
    if known:
        said = ", ".join(f"{name} {value:,.0f}" for name, value in known["bits"].items())
        ratio = "" if known["ratio"] is None else f", {known['ratio']:.2f} times the generator's"
        lines.append(
            f"known bits: {said}. Above the entropy of the rows: "
            f"{known['prequential_above_entropy']:,.0f}{ratio}"
        )
    return [*lines, f"kept: {path}"]


NAMES = {"as_is": "as the base is", "prequential": "learned along"}


def _row(found: dict[str, Any], name: str, unit: str) -> list[str]:
    values = found[name][unit]
    whole = values["all"]
    text = "-"
    if whole["value"] is not None:
        text = f"{whole['value']:,.0f}"
        if whole["low"] != whole["high"]:
            text += f" [{whole['low']:,.0f}, {whole['high']:,.0f}]"
    return [
        NAMES[name],
        unit,
        f"{values['per_token']:.3f}",
        f"{values['per_example']:,.1f}",
        f"{values['measured']:,.0f}",
        text,
    ]

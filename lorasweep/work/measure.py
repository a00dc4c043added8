"""Measure the information in a data set: the code length of its rows, before and in training."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from lorasweep.advise import pages
from lorasweep.advise.rules import APART, INFORMATION, MOST_RATES
from lorasweep.data import column_names, sources
from lorasweep.errors import SpecError, TrainingError
from lorasweep.launch import local
from lorasweep.launch.torch_trainer import TorchTrainer
from lorasweep.spec.dataset import FILES
from lorasweep.spec.run import RunSpec
from lorasweep.store import files
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point, around
from lorasweep.sweep.request import Request
from lorasweep.work import answer
from lorasweep.work.inputs import check_available, understood
from lorasweep.work.printed import Answer, Display, notifier, table

CODES = {"as_is": "under the base model", "prequential": "online, during training"}
HELD_OUT, CURVE = 32, 8
"""Held-out rows in the last evaluation and in earlier ones: few, as only training is measured."""


def _run_to_measure(request: Request) -> RunSpec:
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
        dataset = column_names.dataset_of(request.data, named=stated)
    elif dataset.name in request.described:  # all rows are measured, as with data=FILE
        dataset = dataclasses.replace(dataset, holdout=0, held_out_by="")
    n_test = min(dataset.n_test, HELD_OUT)
    few: dict[str, Any] = dict.fromkeys(("n_retain", "n_validation"), 0)
    few |= {"n_test": n_test, "n_test_curve": min(dataset.n_test_curve, n_test, CURVE)}
    return dataclasses.replace(spec, dataset=dataclasses.replace(dataset, **few))


def measure(request: Request, store: RunStore) -> Answer:
    """Measure the information in a data set, and save it for action=advise.

    It is a code length, the summed log-loss of a first pass, of two models. One is the base. The
    other is the model in training, which codes each batch just before the update on it (a
    prequential code, Dawid 1984). So this code length is the sum of the recorded training losses.

    Raises:
        TrainingError: a run failed, or all diverged.
    """
    from lorasweep.train.objectives.sft import first_pass

    folder, notify = Path(request.exec.reports_dir) / INFORMATION, notifier(request)
    files.check_writable(folder, "exec.reports_dir")
    spec = _run_to_measure(request)
    one = dataclasses.replace(request, points=[Point(spec.method.name, spec)])
    check_available(one)
    for line in understood(one):  # also refuses rows
        notify(line)
    store.prepare()
    trainer, dataset = TorchTrainer(), spec.dataset
    data = trainer.data(spec, request.exec)
    if data.n_train is not None:
        if data.n_train < spec.batch_size:
            raise SpecError(
                f"batch_size={spec.batch_size}: {dataset.name} has {data.n_train} rows."
            )
        most = data.n_train // spec.batch_size  # one pass over the rows
        spec = dataclasses.replace(spec, steps=min(spec.steps, most))
    rates = around(spec.lr, request.rates, APART)
    points = [Point(spec.method.name, dataclasses.replace(spec, lr=lr)) for lr in rates]
    local.run_points(points, store, request.exec, Display(points, request).event, trainer)
    base = trainer.base(spec, request.exec)
    at_once = request.exec.micro_batch_size or 4  # few, as logits take much memory
    losses = first_pass(spec, base, trainer.data(spec, request.exec, base), at_once)
    codes = []  # run, nats of each batch
    for run in (p.spec for p in points):
        result = store.result(run.id)
        if result is None:
            raise TrainingError(f"run {run.id} failed: {store.failure(run.id)}.")
        if result["state"] == "done":
            by_step = {record["step"]: record["train_nll"] for record in store.records(run.id)}
            codes.append((run, [by_step[k] * batch.tokens for k, batch in enumerate(losses, 1)]))
    if not codes:
        raise TrainingError(f"all {len(points)} runs diverged. Set lr below {rates[0]:g}.")
    shortest, nats = min(codes, key=lambda code: sum(code[1]))
    rows, tokens = spec.steps * spec.batch_size, sum(b.tokens for b in losses)
    all_tokens = None  # endless generated data
    if data.n_train is not None:
        all_tokens = sum(int(r.loss.sum()) for r in data.train(spec.seed, 0, data.n_train))
    left = None if all_tokens is None else all_tokens - tokens
    as_is = [b.nats for b in losses]
    whole = answer.code_length(as_is, nats, [b.tokens for b in losses], left)
    lengths, shown = dict[str, Any](), list[dict[str, Any]]()
    # the shortest code also has to name the learning rate
    which = (0.0, math.log(len(points)))
    for key, coded, extra, ends in zip(CODES, (as_is, nats), which, whole, strict=True):
        bits = (sum(coded) + extra) / math.log(2)
        total = {k: None if v is None else (v + extra) / math.log(2) for k, v in ends.items()}
        each = {"per_token": bits / tokens, "per_example": bits / rows, "measured": bits}
        lengths[key] = {"bits": {**each, "all": total}}
        text = None if total["value"] is None else "{value:,.0f} [{low:,.0f}, {high:,.0f}]"
        more = {"measured": f"{bits:,.0f}", "all rows [95%]": text and text.format(**total)}
        shown.append({"bits": CODES[key], **each, **more})
    rows_sha256 = None  # set if the rows are a whole file
    if dataset.source in FILES and dataset.n_train is None:
        place = sources.find_file(dataset, dataset.train_split, request.exec.data_dir)
        rows_sha256 = place[1][: column_names.DIGITS]
    settings = {key: getattr(spec, key) for key in ("batch_size", "precision")}
    found = {
        "model": spec.model.name,
        "dataset": dataset.name,
        "rows": {"measured": rows, "all": data.n_train},
        "loss_tokens": {"measured": tokens, "all": all_tokens},
        **lengths,
        "settings": {"method": spec.method.plain(), **settings, "lr": shortest.lr},
        "runs": [{"run": run.id, "lr": run.lr, "nats": sum(code)} for run, code in codes],
        "diverged": len(points) - len(codes),
        "rows_sha256": rows_sha256,
    }
    path = folder / f"{dataset.name}-{spec.model.name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomic(path, json.dumps(found, indent=1).encode())
    columns = ("bits", "per_token", "per_example", "measured", "all rows [95%]")
    words = {"table": "\n".join(table(shown, *columns)), "ln2": math.log(2), "path": path}
    return Answer(found, pages.render("measured.txt", found=found, **words).rstrip())

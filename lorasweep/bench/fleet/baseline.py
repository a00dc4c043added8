"""Train customers' adapters as a user would today: with TRL's SFTTrainer, or a plain PEFT loop.

    python -m lorasweep.bench.fleet.baseline trl|loop JOB.json    {"customers": [[spec, ...], ...],
                                                                   "exec": {...}, "out": FOLDER}

One process trains the customers of the job one after another, each at all its rates, keeps the
adapter with the lowest loss on validation rows, measures test rows before and after, and saves it.
It prints a JSON line for each. Weights, rows and their order, batch, updates, optimizer, precision
and loss are those of the fleet; evaluations are no more than are needed.
"""

import json
import sys
import time

START = time.perf_counter()

import warnings  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402

from lorasweep.bench.baseline import adapted, loop, padded_batch, sft, symbols  # noqa: E402
from lorasweep.data.examples import Data, Example  # noqa: E402
from lorasweep.data.load import load as load_data  # noqa: E402
from lorasweep.methods.registry import spec_from  # noqa: E402
from lorasweep.models.load import load as load_model  # noqa: E402
from lorasweep.spec.execution import Exec  # noqa: E402
from lorasweep.spec.run import RunSpec  # noqa: E402

ROWS = 8
"""Rows of a forward pass without gradients; sorted by length, so that few tokens are padding."""


@torch.no_grad()
def nll(model: Any, examples: Sequence[Example], precision: str) -> float:
    """Return the loss of rows in nats per loss token."""
    rows = sorted(examples, key=lambda e: len(e.tokens))
    total, count = 0.0, 0
    for k in range(0, len(rows), ROWS):
        batch = padded_batch(rows[k : k + ROWS])
        n = int((batch["labels"][:, 1:] != -100).sum())
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            total += float(model(**batch).loss) * n
        count += n
    return total / count


def again(model: Any) -> None:
    """Make the adapter new: a module's matrices are drawn again, which is faster than new modules.

    The gradients of the last updates are dropped.
    """
    for module in model.modules():
        if hasattr(module, "reset_lora_parameters"):
            module.reset_lora_parameters("default", True)
    model.zero_grad()


def customer(
    model: Any, runs: Sequence[RunSpec], data: Data, kind: str, tokenizer: Any
) -> dict[str, Any]:
    """Train one customer's adapter at all its rates, and load the best into the model."""
    test = data.test
    at, spent = time.perf_counter(), {"train_s": 0.0, "eval_s": 0.0}

    def since(part: str) -> None:
        nonlocal at
        now = time.perf_counter()
        spent[part] += now - at
        at = now

    best, kept = float("inf"), {}
    trained = [p for p in model.parameters() if p.requires_grad]
    for k, spec in enumerate(runs):
        again(model)
        if k == 0:
            before = nll(model, test, spec.precision)  # as the base: its second matrices are 0
            since("eval_s")
        if kind == "trl":
            sft(model, data, spec, tokenizer)
        else:
            loop(model, data, spec, fused=True)
        since("train_s")
        loss = nll(model, data.validation, spec.precision) if data.validation else 0.0
        if loss < best:
            best, kept = loss, {i: p.detach().clone() for i, p in enumerate(trained)}
        since("eval_s")
    for i, p in enumerate(trained):
        p.data.copy_(kept[i])
    after = nll(model, test, runs[0].precision)
    since("eval_s")
    return {**spent, "before": before, "after": after}


def main(kind: str, job_path: str) -> None:
    """Train the customers of a job; print a JSON line for each."""
    warnings.filterwarnings("ignore")
    import peft  # noqa: F401  # here, so that it counts as import and not as training

    if kind == "trl":
        from trl import SFTTrainer  # noqa: F401
    job = json.loads(Path(job_path).read_bytes())
    exec_ = Exec(**job["exec"])
    customers = [[spec_from(plain) for plain in runs] for runs in job["customers"]]
    first = customers[0][0]
    base = load_model(first.model, exec_.models_dir, first.precision)
    tokenizer = base.tokenizer or symbols(first.model.vocab_size)
    model: Any = None
    method = None
    start_s, start_cpu_s = time.perf_counter() - START, time.process_time()
    for runs in customers:
        started, cpu = time.perf_counter(), time.process_time()
        data = load_data(runs[0].dataset, exec_.data_dir, base.tokenizer)
        if runs[0].method != method:
            plain = base.model if model is None else model.unload()
            model, method = adapted(plain, runs[0], kind), runs[0].method
        row = customer(model, runs, data, kind, tokenizer)
        model.save_pretrained(f"{job['out']}/{runs[0].dataset.name}")
        row |= {"start_s": start_s, "customer_s": time.perf_counter() - started}
        row |= {"start_cpu_s": start_cpu_s, "customer_cpu_s": time.process_time() - cpu}
        print(json.dumps(row), flush=True)
        start_s = start_cpu_s = 0.0


if __name__ == "__main__":
    main(*sys.argv[1:])

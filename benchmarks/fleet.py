"""Time fleets against one TRL process a customer and a warm PEFT loop, and measure their memory.

    python -m benchmarks fleet [--out FILE] [case[:customers] ...]

Needs the extra `bench`; `smollm2` also needs the weights and GSM8K. The fleet is timed whole, from
process start to the page. The baselines train a sample of the customers. The time for all customers
is extrapolated: start-up by the number of processes, the rest by the tokens trained on and
evaluated.
"""

import csv
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from analysis.report.text import markdown
from benchmarks import harness
from benchmarks.harness import BENCH, Figures, Log, Page, command, cpu_s, packages_of, render
from benchmarks.trl_baseline import symbol_tokenizer
from lorasweep.config.compose import compose_request
from lorasweep.data.splits import load as load_data
from lorasweep.data.synthetic import dialect, generators
from lorasweep.fleet.runs import Member, planned
from lorasweep.launch.process import WAIT_POLICY
from lorasweep.models.load import load as load_model
from lorasweep.models.load import tokenizer_of
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.streams import stream
from lorasweep.store.run_store import RunStore
from lorasweep.train import pretrain
from lorasweep.work.fleet import plan_fleet

WORKER = "lorasweep.launch.worker"
WATCH_S = 0.5


class Case(NamedTuple):
    """A fleet to time."""

    model: str
    customers: int
    updates: tuple[int, int]
    """Fewest and most updates of a run."""
    options: tuple[str, ...]
    """Further options of the command `action=fleet`."""
    processes: int
    """Number of customers timed with one TRL process each."""
    looped: int
    """Number of customers timed in the warm loop, after one that warms the process up."""


CASES = {
    "tiny128": Case("tiny128", 200, (8, 32), ('dataset.template="{prompt}"',), 6, 24),
    "smollm2": Case("smollm2-135m-instruct", 100, (2, 4), ("dataset.render=role_eos",), 3, 8),
}


@contextmanager
def watched_workers() -> Iterator[dict[str, int]]:
    """Yield process id -> peak resident bytes of each worker that runs during the block."""
    peaks: dict[str, int] = {}
    over = threading.Event()

    def look() -> None:
        while not over.wait(WATCH_S):
            for folder in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):  # a process may end meanwhile
                    is_worker = WORKER.encode() in (folder / "cmdline").read_bytes()
                    if is_worker and _parent(Path("/proc") / _parent(folder)) == str(os.getpid()):
                        lines = (folder / "status").read_text().splitlines()
                        peak = next((x for x in lines if x.startswith("VmHWM")), "VmHWM 0")
                        peaks[folder.name] = int(peak.split()[1]) * 1024

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield peaks
    over.set()
    thread.join()


def _parent(folder: Path) -> str:
    return (folder / "stat").read_text().rpartition(")")[2].split()[1]


def measure(case: Case, log: Log, customers: int = 0) -> Figures:
    """Time a fleet of `customers` (0: as in `case`) and the baselines; memory is in bytes."""
    case = case._replace(customers=customers or case.customers)
    values = harness.exec_values()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        asked = _asked(case, values, folder)
        request = plan_fleet(compose_request(["action=plan", *asked]))
        every = planned(request.members, request.points)
        members = [m for m in every if not m.problem]
        if len(members) < len(every):
            raise RuntimeError(f"customers that cannot be planned: {len(every) - len(members)}")
        tokens = [_tokens(m, values) for m in members]

        def timed(kind: str, chosen: Sequence[int]) -> list[Figures]:
            """Train customers in one process; the first row has the start-up time."""
            job = {
                "jobs": [[p.spec.plain() for p in members[k].points] for k in chosen],
                "exec": {**values, "models_dir": [*values["models_dir"], "/"]},
                "out": str(folder / kind),
            }
            wall_s, rows = harness.baseline(kind, job, folder, **WAIT_POLICY)
            rows[0]["start_s"] = wall_s - sum(r["job_s"] for r in rows)
            return rows

        chosen = spread(tokens, case.processes)
        rows = [row for k in chosen for row in timed("trl", [k])]
        processes = extrapolate(rows, [tokens[k] for k in chosen], tokens, len(members))
        log(f"one TRL process a customer: {processes}")
        chosen = spread(tokens, case.looped)
        first, *rows = timed("loop", [chosen[0], *chosen])
        rows[0] |= {k: first[k] for k in ("start_s", "start_cpu_s")}
        warm = extrapolate(rows, [tokens[k] for k in chosen], tokens, 1)
        log(f"a warm PEFT loop: {warm}")
        found = _fleet(asked, folder, log)
    return found | {"tokens": sum(tokens), "process_a_customer": processes, "warm_peft": warm}


def _asked(case: Case, values: dict[str, Any], folder: Path) -> list[str]:
    """Write rows, table and, for a recipe base, the base; return the command's options."""
    model, rows = case.model, None
    spec = compose_request([f"model={model}"]).points[0].spec.model
    if spec.source == "recipe":
        model = str(write_base(spec, values["models_dir"], folder / case.model))
    else:
        rows = gsm8k(values["data_dir"])
    table = write_table(folder, model, case.customers, case.updates, rows)
    dirs = ",".join([*values["models_dir"], "/"])
    return [f"customers={table}", f"exec.models_dir=[{dirs}]", "rates=3", *case.options]


def _fleet(asked: Sequence[str], folder: Path, log: Log) -> Figures:
    """Train the fleet with `action=fleet`; exit status 1 (an adapter is missing) is no error."""
    runs, options = folder / "runs", ["action=fleet", *asked, f"out={folder / 'fleet'}"]
    _, plan = command("action=plan", *asked, runs_dir=runs)
    before = cpu_s()
    with watched_workers() as peaks:
        whole_s, found = command(*options, runs_dir=runs, most_status=1)
    spent_s = cpu_s() - before
    again_s, _ = command(*options, runs_dir=runs, most_status=1)
    store = RunStore(runs)
    packs = {tuple(store.env(i)["pack"]) for i in store.existing()}
    log(f"the fleet: {whole_s:.0f} s in {len(packs)} packs, asked again {again_s:.1f} s")
    return {
        "customers": len(found),
        "adapters": sum(c["error"] is None for c in found),
        "gained": sum((c.get("gain") or 0.0) > 0 for c in found),
        "runs": sum(len(c.get("tried", ())) for c in found),
        "whole_s": whole_s,
        "cpu_s": spent_s,
        "again_s": again_s,
        "packs": sorted(map(len, packs), reverse=True),
        "peak_bytes": sum(peaks.values()),
        "planned_bytes": round(plan["cost"]["memory_gib"] * 2**30),
    }


def _tokens(member: Member, values: dict[str, Any]) -> int:
    """Return the tokens that a baseline processes for a customer; an update counts three times."""
    spec = member.points[0].spec
    tokenizer = tokenizer_of(spec.model, [*values["models_dir"], "/"])
    data = load_data(spec.dataset, values["data_dir"], tokenizer)

    parts = (data.train(spec.seed, 0, spec.steps * spec.batch_size), data.validation, data.test)
    trained, validation, test = (sum(len(e.tokens) for e in rows) for rows in parts)
    return len(member.points) * (3 * trained + validation) + 2 * test


def spread(tokens: Sequence[int], count: int) -> list[int]:
    """Choose `count` customers at evenly spaced quantiles of the number of tokens."""
    order = sorted(range(len(tokens)), key=lambda k: tokens[k])
    return [order[int((i + 0.5) * len(order) / count)] for i in range(count)]


def extrapolate(
    rows: Sequence[dict[str, Any]], own: Sequence[int], tokens: Sequence[int], starts: int
) -> dict[str, Any]:
    """Extrapolate a sample's seconds: start-up to `starts` processes, the rest by tokens."""
    n, share = len(rows), sum(tokens) / sum(own)
    begun = sum(r["start_s"] > 0 for r in rows)
    found: dict[str, Any] = {"sampled": n}
    keys = (("whole_s", "start_s", "job_s"), ("cpu_s", "start_cpu_s", "job_cpu_s"))
    for whole, start, each in keys:
        found[start] = sum(r[start] for r in rows) / begun
        found[whole] = starts * found[start] + sum(r[each] for r in rows) * share
    means = {k: sum(r[k] for r in rows) / n for k in ("train_s", "eval_s", "job_s")}
    return found | {"customer_s": means.pop("job_s"), **means}


# ---------------------------------------------------------------- customers

FEWEST, MOST = 20, 400
"""Rows of a customer, log-uniform between them."""
BATCHES = (1, 2, 4)
LONGEST_TEXT = 300
"""Rows of GSM8K with more characters are left out, so that an update takes a second or less."""
SYMBOLS = "abcdefghijklmnopqrstuvwxyz012345"
DIALECTS = 8
DIALECT = {"rule_shift": 0.25, "shift_rank": 2.0}
"""Generator parameters, as at scale tiny."""
Row = dict[str, str]


def write_table(
    folder: Path, model: str, count: int, updates: tuple[int, int], rows: Sequence[Row] | None
) -> Path:
    """Write `count` customers' table, and their rows into data/ beside it; return its path.

    Args:
        updates: fewest and most updates of a run.
        rows: every second customer gets some of them; None: all customers get rows of dialects.
    """
    (folder / "data").mkdir(parents=True)
    path = folder / "customers.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["name", "model", "task", "data", "batch_size", "steps"])
        for k in range(count):
            rng = stream("bench", "customer", k)
            n = round(float(np.exp(rng.uniform(np.log(FEWEST), np.log(MOST)))))
            if rows is None:
                mine = _dialect(rng, n, k)
            elif k % 2:
                pairs = (generators.instance(rng, 1 + k % 3) for _ in range(n))
                mine = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
            else:
                mine = [rows[int(i)] for i in rng.choice(len(rows), n, replace=False)]
            data = folder / "data" / f"customer-{k:03d}.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in mine))
            steps = int(rng.integers(updates[0], updates[1] + 1))
            size = BATCHES[int(rng.integers(len(BATCHES)))]
            table.writerow([data.stem, model, "sft", str(data), size, steps])
    return path


def gsm8k(data_dirs: Sequence[str]) -> list[Row]:
    """Return the short rows of GSM8K's training split.

    Raises:
        FileNotFoundError: it is in none of `data_dirs`.
    """
    tried = [Path(d) / "gsm8k" / "train.jsonl" for d in data_dirs]
    found = next((p for p in tried if p.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"no GSM8K at {' or '.join(map(str, tried))}. Type `make data/gsm8k/train.jsonl`."
        )
    rows = [json.loads(line) for line in found.read_text().splitlines()]
    return [r for r in rows if len(r["question"]) + len(r["answer"]) <= LONGEST_TEXT]


def write_base(spec: ModelSpec, models_dirs: Sequence[str], folder: Path) -> Path:
    """Write a base model with a tokenizer of SYMBOLS (the first is EOS); return its config.json."""
    pretrain.ensure(spec, list(models_dirs))
    model: Any = load_model(spec, models_dirs).model
    tokenizer = symbol_tokenizer(SYMBOLS, SYMBOLS[0], eos_token=SYMBOLS[0])
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder / "config.json"


def _dialect(rng: np.random.Generator, count: int, k: int) -> list[Row]:
    """Draw sequences of dialect k; lengths differ between customers and between rows."""
    longest = int(rng.integers(24, 65))
    table = dialect.transition(DIALECT, k % DIALECTS)
    tokens = dialect.sample(table, rng, count, longest)
    texts = ["".join(SYMBOLS[t] for t in row) for row in tokens]
    lengths = rng.integers(longest // 2, longest + 1, size=count)
    return [{"prompt": t[:3], "completion": t[3:n]} for t, n in zip(texts, lengths)]


# ---------------------------------------------------------------- the page

MODELS = {"smollm2": "SmolLM2-135M, fp32", "tiny128": "tiny128, fp32"}
NOTES = (
    "On SmolLM2-135M, half of the customers have short rows of GSM8K, the others copying, sorting "
    "and sums as text; runs have 2 to 4 updates. On tiny128, the rows are sequences of eight "
    "dialects, of 12 to 64 symbols; runs have 8 to 32 updates."
)


def summary(content: dict[str, Any]) -> list[str]:
    """Render the table of whole fleets and baselines, in wall seconds and processor seconds."""
    head = "customers|runs|time|lorasweep|TRL process per customer|warm PEFT loop|repeated command"
    rows = []
    for c, says in _cases(content):
        alone, warm = c["process_a_customer"], c["warm_peft"]
        for key, what in (("whole_s", "wall"), ("cpu_s", "processor")):
            others = [f"{b[key]:.0f} s: **{b[key] / c[key]:.1f}x**" for b in (alone, warm)]
            first = [f"{c['adapters']} on {says}", str(c["runs"])] if key == "whole_s" else ["", ""]
            again = f"{c['again_s']:.0f} s" if key == "whole_s" else ""
            rows.append([*first, what, f"{c[key]:.0f} s", *others, again])
    return markdown([head.split("|"), *rows])


def page(content: dict[str, Any]) -> str:
    """Render the page."""
    parts = [["customers", "baseline", "timed", "start", "updates", "evaluations", "in all"]]
    memory = [["customers", "pack size", "sum of the workers' peaks", "planned"]]
    for c, says in _cases(content):
        for key, how in (("process_a_customer", "TRL process"), ("warm_peft", "warm PEFT loop")):
            b = c[key]
            seconds = (f"{b[k]:.1f} s" for k in ("start_s", "train_s", "eval_s", "customer_s"))
            parts.append([says, how, str(b["sampled"]), *seconds])
        sizes = f"{min(c['packs'])} to {max(c['packs'])} runs"
        memory.append(
            [says, sizes, *(f"{c[k] / 2**30:.2f} GiB" for k in ("peak_bytes", "planned_bytes"))]
        )
    return render(
        "fleet",
        machine=content["machine"],
        packages=packages_of(content),
        notes=NOTES,
        summary="\n".join(summary(content)),
        baselines=parts,
        memory=memory,
    )


def _cases(content: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    return [(content[key], says) for key, says in MODELS.items() if key in content]


PAGE = Page(BENCH / "fleet.json", "fleet.md", page)


def main(arguments: Sequence[str]) -> None:
    """Measure the named cases, or all, and write the page."""
    parts = {name: partial(measure, case) for name, case in CASES.items()}
    harness.measure(PAGE, parts, arguments, "torch", "transformers", "peft", "trl")

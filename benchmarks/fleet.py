"""Time fleets against one TRL process a customer and a warm PEFT loop, and measure their memory.

    python -m benchmarks fleet [--out FILE] [case[:customers] ...]

Needs the extra `bench`; `smollm2` also needs the weights and GSM8K. Writes
analysis/results/bench/fleet.json, and the page from it. The fleet is timed whole, from process
start to the page. The baselines train a sample of the customers. The time for all customers is
extrapolated: start-up by the number of processes, the rest by the tokens trained on and evaluated.
"""

import json
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from analysis.report.text import markdown, with_block
from benchmarks import fleet_table, harness
from benchmarks.harness import FIGURES, ROOT, Figures, Log, command, cpu_s, render
from lorasweep.cli.customers import plan_fleet
from lorasweep.config.compose import compose_request
from lorasweep.data.load import load as load_data
from lorasweep.fleet.runs import Member, planned
from lorasweep.launch.process import WAIT_POLICY
from lorasweep.models.load import tokenizer_of
from lorasweep.store.run_store import RunStore

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
        chosen = spread(tokens, case.processes)
        alone = [_baseline("trl", [members[k]], values, folder) for k in chosen]
        processes = extrapolate(
            [r for rows in alone for r in rows], [tokens[k] for k in chosen], tokens, len(members)
        )
        log(f"one TRL process a customer: {processes['whole_s']:.0f} s, from {len(chosen)}")
        chosen = spread(tokens, case.looped)
        rows = _baseline(
            "loop", [members[chosen[0]], *(members[k] for k in chosen)], values, folder
        )
        rows[1] |= {k: rows[0][k] for k in ("start_s", "start_cpu_s")}
        warm = extrapolate(rows[1:], [tokens[k] for k in chosen], tokens, 1)
        log(f"a warm PEFT loop: {warm['whole_s']:.0f} s, from {len(chosen)}")
        found = _fleet(asked, folder, log)
    whole = found["whole_s"]
    found |= {
        "tokens": sum(tokens),
        "process_a_customer": processes,
        "warm_peft": warm,
        "vs_process_a_customer": processes["whole_s"] / whole,
        "vs_warm_peft": warm["whole_s"] / whole,
        "cpu_vs_process_a_customer": processes["cpu_s"] / found["cpu_s"],
        "cpu_vs_warm_peft": warm["cpu_s"] / found["cpu_s"],
    }
    log(
        f"{case.customers} customers on {case.model}: {whole:.0f} s, "
        f"{found['vs_process_a_customer']:.1f} times faster than one process a customer, "
        f"{found['vs_warm_peft']:.2f} times than a warm loop"
    )
    return found


def _asked(case: Case, values: dict[str, Any], folder: Path) -> list[str]:
    """Write rows, table and, for a recipe base, the base; return the command's options."""
    model, rows = case.model, None
    spec = compose_request([f"model={model}"]).points[0].spec.model
    if spec.source == "recipe":
        model = str(fleet_table.write_base(spec, values["models_dir"], folder / case.model))
    else:
        rows = fleet_table.gsm8k(values["data_dir"])
    table = fleet_table.write_table(folder, model, case.customers, case.updates, rows)
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


def _baseline(
    kind: str, members: Sequence[Member], values: dict[str, Any], folder: Path
) -> list[Figures]:
    """Train customers in one baseline process; return rows, the first with the start-up time."""
    job = {
        "jobs": [[p.spec.plain() for p in m.points] for m in members],
        "exec": {**values, "models_dir": [*values["models_dir"], "/"]},
        "out": str(folder / kind),
    }
    wall_s, rows = harness.baseline(kind, job, folder, **WAIT_POLICY)
    rows[0]["start_s"] = wall_s - sum(r["job_s"] for r in rows)
    return rows


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


# ---------------------------------------------------------------- the page

MODELS = {"smollm2": "SmolLM2-135M, fp32", "tiny128": "tiny128, fp32"}
ROWS = {
    "smollm2": "On SmolLM2-135M, half of the customers have short rows of GSM8K, the others "
    "copying, sorting and sums as text; runs have 2 to 4 updates.",
    "tiny128": "On tiny128, the rows are sequences of eight dialects, of 12 to 64 symbols; runs "
    "have 8 to 32 updates.",
}


def summary(content: dict[str, Any]) -> list[str]:
    """Render the table of whole fleets and baselines, in wall seconds and processor seconds."""
    head = "customers|runs|time|lorasweep|TRL process per customer|warm PEFT loop|repeated command"
    rows = []
    for c, says in _cases(content):
        alone, warm = c["process_a_customer"], c["warm_peft"]
        for seconds, ratio, what in (("whole_s", "", "wall"), ("cpu_s", "cpu_", "processor")):
            rows.append(
                [
                    f"{c['adapters']} on {says}" if not ratio else "",
                    str(c["runs"]) if not ratio else "",
                    what,
                    f"{c[seconds]:.0f} s",
                    f"{alone[seconds]:.0f} s: **{c[f'{ratio}vs_process_a_customer']:.1f}x**",
                    f"{warm[seconds]:.0f} s: **{c[f'{ratio}vs_warm_peft']:.1f}x**",
                    f"{c['again_s']:.0f} s" if not ratio else "",
                ]
            )
    return markdown([head.split("|"), *rows])


def page(content: dict[str, Any]) -> str:
    """Render the page."""
    here = content["machine"]
    packages = ", ".join(f"{k} {v}" for k, v in here["packages"].items())
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
        machine=here,
        packages=packages,
        notes=" ".join(says for key, says in ROWS.items() if key in content),
        summary="\n".join(summary(content)),
        baselines=parts,
        memory=memory,
    )


def _cases(content: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    return [(content[key], says) for key, says in MODELS.items() if key in content]


def write() -> None:
    """Write fleet.md next to fleet.json, and the summary in docs/fleet.md."""
    content = json.loads((FIGURES / "fleet.json").read_text())
    (FIGURES / "fleet.md").write_text(page(content))
    document = ROOT / "docs" / "fleet.md"
    document.write_text(with_block(document.read_text(), "fleet", summary(content)))


def main(arguments: Sequence[str]) -> None:
    """Measure the named cases, or all, and write the page."""

    def record(content: Figures, part: str, figures: Any) -> None:
        machine = harness.machine("torch", "transformers", "peft", "trl")
        content |= {part: figures, "machine": machine}

    parts = {name: partial(measure, case) for name, case in CASES.items()}
    harness.measure_parts("fleet.json", parts, arguments, record)
    if "--out" not in arguments:
        write()

"""Render fleet.json of the benchmark as a page, and the summary in docs/fleet.md.

Measures nothing: every number comes from the file that `python -m benchmarks fleet` wrote.
"""

import json
from typing import Any

from analysis.report.text import markdown
from benchmarks.harness import FIGURES, ROOT, render, table, with_block

MODELS = {"smollm2": "SmolLM2-135M, fp32", "tiny128": "tiny128, fp32"}
ROWS = {
    "smollm2": "On SmolLM2-135M every second customer has short rows of GSM8K, the others copying, "
    "sorting and sums as text, with 2 to 4 updates.",
    "tiny128": "On tiny128 they are sequences of eight dialects, of 12 to 64 symbols, with 8 to 32 "
    "updates.",
}


def summary(content: dict[str, Any]) -> list[str]:
    """Render the table of whole fleets against the baselines, by the clock and the processor."""
    head = "customers|runs||lorasweep|a TRL process a customer|a warm PEFT loop|asked again"
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
    parts = [["customers", "how", "customers timed", "start", "updates", "evaluations", "in all"]]
    memory = [["customers", "packs of", "workers' peaks together", "planned"]]
    for c, says in _cases(content):
        for key, how in (("process_a_customer", "TRL, a process"), ("warm_peft", "PEFT, warm")):
            b = c[key]
            seconds = (f"{b[k]:.1f} s" for k in ("start_s", "train_s", "eval_s", "customer_s"))
            parts.append([says, how, str(b["sampled"]), *seconds])
        sizes = f"{min(c['packs'])} to {max(c['packs'])} runs"
        memory.append([says, sizes, *(_gib(c[k]) for k in ("peak_bytes", "planned_bytes"))])
    return render(
        "fleet",
        machine=here,
        packages=packages,
        notes=" ".join(says for key, says in ROWS.items() if key in content),
        summary="\n".join(summary(content)),
        baselines=table(parts),
        memory=table(memory),
    )


def _cases(content: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    return [(content[key], says) for key, says in MODELS.items() if key in content]


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"


def with_summary(text: str, content: dict[str, Any]) -> str:
    """Replace the summary in a page."""
    return with_block(text, "fleet", summary(content))


def write() -> None:
    """Write fleet.md next to fleet.json, and the summary in docs/fleet.md."""
    content = json.loads((FIGURES / "fleet.json").read_text())
    (FIGURES / "fleet.md").write_text(page(content))
    document = ROOT / "docs" / "fleet.md"
    document.write_text(with_summary(document.read_text(), content))

"""The page of kept answers: analysis/results/README.md and the same block in the project's README.

    python -m analysis.page

Rendered from each kept results.json and nothing else, so that no number in either page is typed by hand.
"""

import json
from pathlib import Path
from typing import Any

from analysis.results import Estimate, number, rate, with_interval

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- answers: made by `python -m analysis.page` -->", "<!-- end of answers -->"


def block(root: str) -> str:
    """Write the answers as Markdown; `root` is the path from the page to analysis/results."""
    out: list[str] = []
    for path in sorted(RESULTS.glob("*/results.json")):
        told = json.loads(path.read_text())
        question = json.loads((path.parent / "question.json").read_text())["question"]
        out += _answer(told, question, f"{root}{path.parent.name}")
    return "\n".join(out).rstrip()


def _answer(told: dict[str, Any], question: str, folder: str) -> list[str]:
    out = [f"### {question} (`scale={told['scale']}`)", ""]
    out += ["| curve | best LR [95%] | best NLL | flags |", "|---|---|---|---|"]
    for c in told["curves"]:
        name = c["method"] + (f" r{int(c['rank'])}" if c["rank"] else "")
        best = Estimate(c["best_lr"], c["low"], c["high"])
        out.append(f"| {name} | {with_interval(best, rate)} | {number(c['best_nll'], 4)} "
                   f"| {', '.join(c['flags']) or '-'} |")  # fmt: skip
    out += ["", f"| claim | verdict | measured [{_percent(told)}] | expected | margin |", "|---|---|---|---|---|"]
    for v in told["verdicts"]:
        e = Estimate(**{**v["estimate"], "flags": ()})
        out.append(f"| {v['claim']} | **{v['outcome']}** | {with_interval(e)} | {v['expected']:g} "
                   f"| {v['margin'][0]:g} to {v['margin'][1]:g} |")  # fmt: skip
    model = told["verdicts"][0]["group"] if told["verdicts"] else ""
    out += ["", f"{model}. [Report]({folder}/report.md), [table]({folder}/table.csv); "
            f"`python -m lorasweep +sweep={told['sweep']} scale={told['scale']}`.", "",
            f"![LR against NLL, {told['scale']}]({folder}/lr_nll.png)", ""]  # fmt: skip
    return out


def _percent(told: dict[str, Any]) -> str:
    return f"{100 * next((v['estimate']['level'] for v in told['verdicts']), 0.95):.3g}%"


def readme(text: str) -> str:
    """Return the project's README with its block of answers made anew."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{block('analysis/results/')}\n{END}{tail}"


def main() -> None:
    """Write both pages."""
    head = "# Answers kept\n\nEach folder holds the table of runs (importable into a store), the report and figures.\n"
    (RESULTS / "README.md").write_text(f"{head}\n{block('')}\n")
    path = Path(__file__).parent.parent / "README.md"
    path.write_text(readme(path.read_text()))


if __name__ == "__main__":
    main()

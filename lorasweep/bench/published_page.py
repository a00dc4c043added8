"""Write the page and the table of the plan against published measurements."""

import csv
import io
import statistics
from pathlib import Path

import yaml

from lorasweep.bench.published import TABLE, TOLERANCE, Comparison, comparisons
from lorasweep.plan.time import TRAINING_SHARE

FOLDER = Path(__file__).resolve().parents[2] / "analysis" / "results" / "plan"
UNITS = {"memory": "GiB a GPU", "speed": "tokens a second and GPU"}
COLUMNS = ("source", "model", "method", "card", "gpus", "length", "rows", "checkpointing")


def table() -> str:
    """Return all rows as CSV: settings, published, predicted, error, why not covered."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*COLUMNS, "figure", "published", "predicted", "error", "not_covered"])
    for c in comparisons():
        predicted = "" if c.predicted is None else f"{c.predicted:.4g}"
        error = "" if c.error is None else f"{c.error:.3f}"
        settings = [getattr(c.row, name) for name in COLUMNS]
        values = [c.figure, f"{c.published:.4g}", predicted, error, c.why_not or ""]
        writer.writerow([*settings, *values])
    return out.getvalue()


def page() -> str:
    """Return the page in Markdown."""
    lines = [
        "# The plan against published measurements",
        "",
        "Peak memory and speed that others measured, and what the plan says for the same "
        "settings. Which rows it covers was decided by their settings and committed before "
        "anything was predicted. All constants are from formulas, data sheets or assumptions "
        "named in the code, but one: the share of the attainable speed that the products of a "
        "step reach, which is for every row the one that fits the *other* sources. The plan uses "
        f"the one that fits all, {TRAINING_SHARE}. No covered row has the memory of full "
        "fine-tuning, and one that of a sharded run: these rest on the formulas.",
        "",
    ]
    for figure in TOLERANCE:
        lines += _summary(figure)
    lines += ["## All rows", "", "[table.csv](table.csv) has them, the rows not covered too.", ""]
    for figure in TOLERANCE:
        lines += _rows(figure)
    return "\n".join([*lines, *_not_covered(), *_sources()])


def _summary(figure: str) -> list[str]:
    found = _covered(figure)
    errors = sorted(abs(c.error) for c in found if c.error is not None)
    within = sum(c.within for c in found)
    nine = nine_in_ten(figure)
    sources = len({c.row.source for c in found})
    lines = [
        f"## {figure.capitalize()}",
        "",
        f"{within} of {len(found)} covered rows ({within / len(found):.0%}) of {sources} sources "
        f"are within {TOLERANCE[figure]:.0%}; median error {statistics.median(errors):.0%}, nine "
        f"in ten within {nine:.0%}.",
        "",
        f"| source | rows | within {TOLERANCE[figure]:.0%} | median | smallest | largest |",
        "|---|---|---|---|---|---|",
    ]
    for source in dict.fromkeys(c.row.source for c in found):
        own = [c for c in found if c.row.source == source]
        signed = [c.error for c in own if c.error is not None]
        values = (statistics.median(signed), min(signed), max(signed))
        ends = " | ".join(f"{value:+.0%}" for value in values)
        lines.append(f"| {source} | {len(own)} | {sum(c.within for c in own)} | {ends} |")
    return [*lines, ""]


def nine_in_ten(figure: str) -> float:
    """Return the error that nine in ten covered rows stay below."""
    errors = sorted(abs(c.error) for c in _covered(figure) if c.error is not None)
    return errors[min(len(errors) - 1, round(0.9 * len(errors)))]


def _covered(figure: str) -> list[Comparison]:
    return [c for c in comparisons() if c.figure == figure and c.predicted is not None]


def _rows(figure: str) -> list[str]:
    lines = [
        f"### {figure.capitalize()}, {UNITS[figure]}",
        "",
        "| source | run | published | plan | error |",
        "|---|---|---|---|---|",
    ]
    for c in _covered(figure):
        r = c.row
        mark = "" if c.within else " **fails**"
        lines.append(
            f"| {r.source} | {r.model}, {r.method}, {r.gpus} x {r.card}, {r.rows} x {r.length:,} "
            f"tokens, checkpointing {r.checkpointing} | {c.published:,.4g} | {c.predicted:,.4g} | "
            f"{c.error:+.0%}{mark} |"
        )
    return [*lines, ""]


def _not_covered() -> list[str]:
    counts: dict[tuple[str, str], int] = {}
    for c in comparisons():
        if c.why_not:
            key = (c.why_not, c.figure)
            counts[key] = counts.get(key, 0) + 1
    lines = ["## Not covered", "", "| why | figure | rows |", "|---|---|---|"]
    return [*lines, *(f"| {why} | {figure} | {n} |" for (why, figure), n in counts.items()), ""]


def _sources() -> list[str]:
    sources = yaml.safe_load(TABLE.read_text())["sources"]
    lines = [f"- {name}: {entry['where']}" for name, entry in sources.items()]
    return ["## Sources", "", *lines, ""]


def main() -> None:
    """Write the page and the table."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "README.md").write_text(page())
    (FOLDER / "table.csv").write_text(table())


if __name__ == "__main__":
    main()

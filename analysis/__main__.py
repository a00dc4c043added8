"""Judge a sweep again, or analyse any table of runs. Trains nothing and needs no torch."""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "analysis" / "results"
EPILOG = """commands
  fit FILE      best learning rate of every curve, with interval or bound and low-regret band;
                with --ratio, --drift or --law what follows from these
  html FILE     interactive page of curves, fits and runs, in one file (--out page.html)
  SWEEP         report of a sweep, from its kept table or from --table
  study         all claims in one table, from kept results and your own reports
                (--write: render all kept results again)
  suggest SWEEP the runs most likely to decide the open claims (action=extend adds them)

examples
  python -m analysis lr_ratio --scale small
  python -m analysis fit runs.csv --map learning_rate=lr --map lora_r=rank --out fits.json
  python -m analysis fit runs.csv --ratio --higher accuracy --json
"""

OF_FITS = {
    "ratio": "LoRA's best learning rate divided by full fine-tuning's",
    "drift": "how the best learning rate changes with the rank",
    "law": "the best learning rate as a power law of the hidden size, and the ratio as one of "
    "hidden size and alpha",
}
"""Flag of `fit` -> what it prints instead of the fits."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0 for success, 2 for a wrong request."""
    argv = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if importlib.util.find_spec("pandas") is None:
        where = "Activate the environment in which lorasweep is installed"
        print(f"analysis: {sys.executable} has no pandas. {where}.", file=sys.stderr)
        return 2
    from analysis.runs.table import TableError

    try:
        if argv[0] in ("fit", "html"):
            return _run_table_command(argv)
        if argv[:1] == ["study"]:
            return _study(argv[1:])
        return _sweep(argv[1:], suggest=True) if argv[:1] == ["suggest"] else _sweep(argv)
    except TableError as error:
        print(f"analysis: {error}", file=sys.stderr)
    except OSError as error:
        what = f"{error.filename} cannot be written or read: {error.strerror}"
        print(f"analysis: {what}", file=sys.stderr)
    return 2


def _parser(command: str, out: str, reports: bool = True, **look: Any) -> argparse.ArgumentParser:
    """Return a parser with the options that all commands share; `out` is the help of --out."""
    look = {"formatter_class": argparse.RawDescriptionHelpFormatter, **look}
    parser = argparse.ArgumentParser(prog=f"lorasweep-analysis {command}".strip(), **look)
    if reports:
        where = os.environ.get("LORASWEEP_REPORTS", "reports")
        parser.add_argument("--reports-dir", default=where, type=Path)
    parser.add_argument("--out", type=Path, help=out)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def _run_table_command(argv: Sequence[str]) -> int:
    """Run `fit` or `html` on a file."""
    parser = _parser(argv[0], "write the JSON (or the page) here", reports=False, epilog=EPILOG)
    add = parser.add_argument
    add(
        "file",
        type=Path,
        help="table with one run per row: .csv, .parquet, .json or .jsonl, such as a W&B export. "
        "Columns: model, lr, test_nll, and method or rank; optionally status, dataset, batch_size, "
        "seed, hidden_size, layers, alpha, steps. Without a method, a run with a rank is lora and "
        "one with an empty rank is full fine-tuning",
    )
    a_name = "use the file's column THEIRS as our column OURS; repeatable"
    pairs: dict[str, Any] = {"action": "append", "type": _renaming, "default": []}
    add("--map", metavar="THEIRS=OURS", help=a_name, **pairs)
    add("--higher", metavar="COLUMN", help="use this column as the metric; higher is better")
    add("--broken", type=float, help="a metric at least as bad as this counts as diverged")
    within = "extra loss allowed in the low-regret band, in units of the metric; default: 0.01"
    add("--within", type=_above_0, default=0.01, help=within)
    share = "use a model's other ranks as a prior for the shape of each curve"
    add("--share", action="store_true", help=share)
    what = parser.add_mutually_exclusive_group()
    for name, about in OF_FITS.items() if argv[0] == "fit" else ():
        what.add_argument(f"--{name}", dest="command", action="store_const", const=name, help=about)
    parser.set_defaults(command=argv[0])
    args = parser.parse_args(argv[1:])

    from analysis.runs import reading
    from analysis.tables import commands

    table = reading.read(args.file, dict(args.map), args.higher, args.broken)
    for note in table.notes:
        print(f"note: {note}", file=sys.stderr)
    if args.command == "html":
        out = args.out or args.file.with_suffix(".html")
        commands.html(table, out, args.within, args.share)
        print(f"page: {out}")
        return 0
    extra = (args.within,) if args.command == "fit" else ()
    result: Any = commands.COMMANDS[args.command](table, args.share, *extra)
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")
    print(text if args.json else "\n".join(commands.lines(result, args.command, args.within)))
    return 0


def _renaming(pair: str) -> tuple[str, str]:
    theirs, _, name = pair.rpartition("=")
    if not theirs or not name:
        raise argparse.ArgumentTypeError(f"{pair}: write THEIR_COLUMN=OURS, e.g. learning_rate=lr")
    return theirs, name


def _above_0(text: str) -> float:
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text}: give a loss above 0, e.g. 0.01")
    return float(text)


def _study(argv: Sequence[str]) -> int:
    """Print one table of all claims, or render all kept results again."""
    out = "write study.md, the pages beside it and their figures into this folder"
    parser = _parser("study", out, description="One table of all claims.")
    parser.add_argument(
        "--write",
        action="store_true",
        help="render all kept answers, the pages in analysis/results and the findings in README.md "
        "again, from the kept tables (three minutes)",
    )
    args = parser.parse_args(argv)

    from analysis.report.study import answers
    from analysis.report.text import aligned, check_installed

    if args.write or args.out:
        check_installed("the page of all answers", "matplotlib", "jinja2")
        from analysis.report.study import page
    if args.write:
        page.render_all(KEPT, ROOT / "README.md")
        return 0
    found = answers.read_answers([args.reports_dir, KEPT])
    head, *rows = answers.claims_table(found)
    if args.out:
        page.write(found, args.out / "study.md")
    objects = [dict(zip(head, row)) for row in rows]
    print(json.dumps(objects, indent=1) if args.json else "\n".join(aligned([head, *rows])))
    return 0


def _sweep(argv: Sequence[str], suggest: bool = False) -> int:
    """Judge a sweep again and report it, or suggest runs for it."""
    out = "folder to write to; default: the report's folder (a kept report is only printed)"
    parser = _parser("", out, description=__doc__, epilog=EPILOG)
    parser.add_argument("sweep", help="name of the sweep, e.g. lr_ratio; or a command, see below")
    scale = "end of the report folder's name: scale and hash, if any; default: newest report"
    parser.add_argument("--scale", help=scale)
    parser.add_argument(
        "--table", type=Path, help=".parquet or .csv, one run per row; default: the report's table"
    )
    args = parser.parse_args(argv)
    if args.table and not args.out and not suggest:
        parser.error("--table needs --out FOLDER, so that no other report is overwritten")

    from analysis.measures import next_runs
    from analysis.questions.registry import analyse, read_question
    from analysis.report.report import judge_and_report
    from analysis.runs.table import read

    folder = find_report(args.reports_dir, args.sweep, args.scale)
    question = read_question(folder)
    table = read(args.table or folder / "table.parquet")
    is_kept = folder.parent == KEPT
    if is_kept:
        page = f"its report is {folder / 'report.md'}"
        print(f"kept answer, as {args.reports_dir} has none of your own; {page}", file=sys.stderr)
    if not suggest:
        to = args.out or (None if is_kept else folder)  # kept reports: study --write
        print(judge_and_report(table, question, to, args.json, KEPT))
        return 0
    wanted = next_runs.suggest(analyse(table, question, KEPT))
    nothing = "nothing to add: every claim is decided, or more runs cannot help"
    text = "\n".join(next_runs.lines(wanted)) or nothing
    print(json.dumps(next_runs.plain(wanted), indent=1) if args.json else text)
    return 0


def find_report(reports: Path, sweep: str, scale: str | None) -> Path:
    """Find a sweep's report at the given scale, else the newest; else a kept one, tiny first.

    Raises:
        TableError: there is no such report.
    """
    from analysis.runs.table import TableError

    found = [p.parent for root in (reports, KEPT) for p in root.glob("*/question.json")]
    names = sorted({p.name for p in found})
    known = f"{sweep}-{scale or ''}"
    wanted = [p for p in found if p.name == known or (not scale and p.name.startswith(known))]
    if not wanted:
        at = f" at scale {scale!r}" if scale else ""
        raise TableError(
            f"no report of sweep {sweep!r}{at} in {reports.absolute()}. "
            f"There are: {', '.join(names) or '(none)'}. "
            f"Run it first: python -m lorasweep +sweep={sweep}. "
            "For a table of runs: python -m analysis fit FILE"
        )
    if own := [p for p in wanted if p.parent != KEPT]:
        return max(own, key=lambda p: (p / "question.json").stat().st_mtime)
    # The times of kept files are those of the checkout and say nothing.
    return min(wanted, key=lambda p: (p.name != f"{sweep}-tiny", p.name))


if __name__ == "__main__":
    sys.exit(main())

"""`python -m analysis lr_ratio`: render a sweep's report again, from its kept table or from any table of runs."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 done, 2 the request was wrong."""
    parser = argparse.ArgumentParser(
        prog="lorasweep-analysis",
        description="Judge a sweep's runs again and write its report. Trains nothing and needs no torch.",
        epilog="Examples: python -m analysis lr_ratio    python -m analysis lr_ratio --scale small    "
        "python -m analysis lr_ratio --table runs.parquet --out report/",
    )
    parser.add_argument("sweep", help="name of the sweep, e.g. lr_ratio")
    parser.add_argument("--scale", help="scale of the sweep; default: the report written last")
    parser.add_argument("--reports-dir", default=os.environ.get("LORASWEEP_REPORTS", "reports"), type=Path)
    parser.add_argument("--table", type=Path, help=".parquet or .csv with one run a row; default: the report's own")
    parser.add_argument("--out", type=Path, help="folder to write to; default: the report's folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args(argv)
    if args.table and not args.out:
        parser.error("--table needs --out FOLDER, so that no other report is overwritten")

    from analysis.report import judge_and_report
    from analysis.table import TableError, read

    try:
        folder = find_report(args.reports_dir, args.sweep, args.scale)
        question: dict[str, Any] = json.loads((folder / "question.json").read_text())
        table = read(args.table or folder / "table.parquet")
        print(judge_and_report(table, question, args.out or folder, args.json))
    except TableError as error:
        print(f"analysis: {error}", file=sys.stderr)
        return 2
    return 0


def find_report(reports: Path, sweep: str, scale: str | None) -> Path:
    """Find the folder of a sweep's report: of the scale, or the one written last. Kept results count too."""
    from analysis.table import TableError

    kept = Path(__file__).parent / "results"
    found = [p.parent for root in (reports, kept) for p in root.glob("*/question.json")]
    names = {p.name for p in found}
    wanted = [p for p in found if (p.name == f"{sweep}-{scale}" if scale else p.name.rpartition("-")[0] == sweep)]
    if not wanted:
        raise TableError(
            f"no report of sweep {sweep!r}{f' at scale {scale!r}' if scale else ''} in {reports.absolute()}. "
            f"There are: {', '.join(sorted(names)) or '(none)'}. Run it first: python -m lorasweep +sweep={sweep}"
        )
    own = [p for p in wanted if p.parent != kept] or wanted
    return max(own, key=lambda p: (p / "question.json").stat().st_mtime)


if __name__ == "__main__":
    sys.exit(main())

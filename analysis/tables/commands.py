"""The command line: fit any table of runs, judge a sweep again, list all claims.

A command on a table returns plain values; they are printed as JSON or as tables.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis.inference.estimate import Estimate, number, with_interval
from analysis.measures.at_best import is_finite, losses_at_best, mean_of
from analysis.measures.ratio import MIN_RANK, lr_drift, pool_ratios, ratio_of
from analysis.optimum.fit import WITHIN, Optimum, fit_all, lowest_loss, rate_means
from analysis.questions.base import by_group, by_variant, lora_of
from analysis.questions.registry import read_question
from analysis.report.report import judge_and_report, write_html
from analysis.report.study import answers
from analysis.report.text import aligned, check_installed, plain
from analysis.runs import table as runs_table
from analysis.runs.curves import lr_curves
from analysis.runs.table import CURVE_KEYS, LOSS, NLL, Reading, Shown, TableError, read, read_any

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "analysis" / "results"
EPILOG = """commands
  fit FILE      best learning rate of every curve, with interval or bound and low-regret band;
                with --ratio or --drift what follows from these. FILE: one run per row, as
                .csv, .parquet, .json or .jsonl, such as a W&B export. Columns: model, lr, test_nll,
                and method or rank; optionally status, dataset, batch_size, seed, hidden_size,
                layers, alpha, steps. Without a method, a run with a rank is lora and one with an
                empty rank is full fine-tuning
  html FILE     interactive page of curves, fits and runs, in one file (--out page.html)
  SWEEP         report of a sweep, from its kept table or from --table
  study         all claims in one table, from kept results and your own reports
                (--write: render all kept results again; --out FOLDER: write the page)
"""
OPTIONS = {
    "fit": ("map", "higher", "within", "out", "json", "of"),
    "html": ("map", "higher", "within", "out"),
    "study": ("reports_dir", "write", "out", "json"),
    "SWEEP": ("scale", "table", "reports_dir", "out", "json"),
}
"""Command -> its options; all others are refused."""


def run(argv: Sequence[str]) -> None:
    """Run a command and print its result.

    Raises TableError: a table cannot be used, or there is no such report.
    """
    look: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": EPILOG}
    about = "Judge a sweep again, or analyse any table of runs. Trains nothing."
    parser = argparse.ArgumentParser("lorasweep-analysis", description=about, **look)
    parser.add_argument("command", help="fit, html, study, or the name of a sweep")
    parser.add_argument("name", nargs="?", help="the FILE of the command", type=Path)
    switch: Any = {"action": "store_true"}
    add = parser.add_argument
    a_name = "use the file's column THEIRS as our column OURS; repeatable"
    add("--map", metavar="THEIRS=OURS", action="append", default=[], help=a_name)
    add("--higher", metavar="COLUMN", help="use this column as the metric; higher is better")
    band = "extra loss allowed in the low-regret band, in units of the metric; default: 0.01"
    add("--within", type=float, default=WITHIN, help=band)
    add("--scale", help="SWEEP: end of the report folder's name; default: the newest report")
    add("--table", type=Path, help="SWEEP: judge this .parquet or .csv instead (needs --out)")
    reports = Path(os.environ.get("LORASWEEP_REPORTS", "reports"))
    add("--reports-dir", type=Path, default=reports, help="default: %(default)s")
    add("--write", help="study: render all kept answers and pages again", **switch)
    add("--out", type=Path, help="file (fit, html) or folder (SWEEP, study) to write to")
    add("--json", help="print JSON instead of text", **switch)
    flags = parser.add_mutually_exclusive_group()
    for flag, command in COMMANDS.items():
        about = str(command.__doc__).splitlines()[0]
        flags.add_argument(f"--{flag}", dest="of", action="store_const", const=flag, help=about)
    args = parser.parse_intermixed_args(argv)
    named = args.command in ("fit", "html")
    if named != bool(args.name):
        parser.error(f"{args.command} {'needs' if named else 'takes no'} FILE: see --help")
    options = OPTIONS.get(args.command, OPTIONS["SWEEP"])
    for name in vars(args).keys() - {"command", "name", *options}:
        if getattr(args, name) != parser.get_default(name):
            flag = args.of if name == "of" else name.replace("_", "-")
            parser.error(f"{args.command} takes no --{flag}: see --help")
    if not args.within > 0:
        parser.error(f"--within {args.within:g}: give a loss above 0, e.g. 0.01")
    pairs = dict(pair.rpartition("=")[::2] for pair in args.map)
    if not all(pairs) or not all(pairs.values()):
        parser.error("--map: write THEIR_COLUMN=OURS, e.g. learning_rate=lr")
    if named:
        _of_table(args, pairs)
    elif args.command == "study":
        _study(args)
    elif args.table and not args.out:
        parser.error("--table needs --out FOLDER, so that no other report is overwritten")
    else:
        folder = find_report(args.reports_dir, args.command, args.scale)
        question, is_kept = read_question(folder), folder.parent == KEPT
        runs = read(args.table or folder / "table.parquet")
        if is_kept:
            page = f"its report is {folder / 'report.md'}"
            what = f"kept answer, as {args.reports_dir} has none of your own"
            print(f"{what}; {page}", file=sys.stderr)
        to = args.out or (None if is_kept else folder)  # kept reports: study --write
        _check_free(args.out)
        print(judge_and_report(runs, question, to, args.json, KEPT))


def _of_table(args: argparse.Namespace, mapping: dict[str, str]) -> None:
    """Run `fit` or `html` on a file."""
    reading = read_any(args.name, mapping, args.higher)
    for note in reading.notes:
        print(f"note: {note}", file=sys.stderr)
    out = args.out or (args.name.with_suffix(".html") if args.command == "html" else None)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.command == "html":
        optima = optima_of(reading)
        ratios = [
            (group, o.curve.name, ratio_of([o], full))
            for group, lora, full in arms_of(optima)
            for o in lora
        ]
        title = f"{out.stem}: {len(reading.table)} runs"
        write_html(out, title, reading.table, optima, ratios, (), args.within)
        print(f"page: {out}")
        return
    result = COMMANDS[args.of](reading) if args.of else fit(reading, args.within)
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.write_bytes(runs_table.own(args.out, text, comment=""))
    print(text if args.json else "\n".join(lines(result)))


def _study(args: argparse.Namespace) -> None:
    """Print one table of all claims, or render all kept results again."""
    if args.write or args.out:
        check_installed("the page of all answers", "matplotlib", "jinja2")
        from analysis.report.study import page
    if args.write:
        return page.render_all(KEPT, ROOT / "README.md")
    _check_free(args.out)
    found = answers.read_answers([args.reports_dir, KEPT])
    if not found:
        raise TableError(f"no answers in {args.reports_dir}, and an installed package keeps none.")
    head, *rows = answers.claims_table(found)
    if args.out:
        page.write(found, args.out / "study.md")
    objects = [dict(zip(head, row)) for row in rows]
    print(json.dumps(objects, indent=1) if args.json else "\n".join(aligned([head, *rows])))


def _check_free(folder: Path | None) -> None:
    """Raise TableError if a folder has files: they may be somebody's, or ours that were changed."""
    if folder and folder.is_dir() and any(folder.iterdir()):
        raise TableError(f"{folder} has files. Name a new folder with --out, or empty this one.")


def find_report(reports: Path, sweep: str, scale: str | None) -> Path:
    """Find a sweep's report at the given scale, else the newest; else a kept one, tiny first.

    Raises TableError: there is no such report.
    """
    found = [p.parent for root in (reports, KEPT) for p in root.glob("*/question.json")]
    known = f"{sweep}-{scale or ''}"
    wanted = [p for p in found if p.name == known or (not scale and p.name.startswith(known))]
    if not wanted:
        raise TableError(
            f"no report {known.rstrip('-')!r} in {reports.absolute()}. There are: "
            f"{', '.join(sorted({p.name for p in found})) or '(none)'}. Run it first: python -m "
            f"lorasweep +sweep={sweep}. For a table of runs: python -m analysis fit FILE"
        )
    if own := [p for p in wanted if p.parent != KEPT]:
        return max(own, key=lambda p: (p / "question.json").stat().st_mtime)
    # The times of kept files are those of the checkout and say nothing.
    return min(wanted, key=lambda p: (p.name != f"{sweep}-tiny", p.name))


def optima_of(reading: Reading) -> list[Optimum]:
    """Fit every curve of a table, with noise and misfit pooled over the table."""
    name = reading.metric
    shown = NLL if name == LOSS else Shown(name, reading.sign, name, "")
    return fit_all([replace(c, shown=shown) for c in lr_curves(reading.table)])


def fit(reading: Reading, within: float = WITHIN) -> list[dict[str, Any]]:
    """Return one object per curve: the optimum with interval or bound, and the low-regret band.

    `within`: extra loss allowed in the band, in units of the metric.
    """
    optima, rows = optima_of(reading), []
    of = {k: {(o.curve.key["method"], str(o.curve.key.get(k))) for o in optima} for k in CURVE_KEYS}
    apart = [k for k, values in of.items() if len(values) > len(of["method"])]
    keys = ("model", "method", "dataset", "rank", "batch_size", "steps", "layers", "alpha", *apart)
    for o in optima:
        e, band, nll = o.best_lr, o.band(within), o.best_nll
        rows.append(
            {
                **{k: _value(o, k) for k in keys},
                **{"n": len(o.curve.x), "n_usable": int(o.curve.usable.sum())},
                **{"best_lr": e.value, "low": e.low, "high": e.high},
                "best_nll": None if nll is None else nll * reading.sign,
                **{"metric": reading.metric, "flags": list(o.flags), "band": band and list(band)},
            }
        )
    return rows


def _value(o: Optimum, key: str) -> Any:
    """Return a setting of a curve as a plain value; ranks and batch sizes are whole numbers."""
    value = plain(o.curve.key.get(key))
    return int(value) if value is not None and key in ("rank", "batch_size", "steps") else value


def ratio(reading: Reading) -> dict[str, Any]:
    """Return LoRA's best LR / full fine-tuning's, by group and rank, and pooled over groups.

    Pooled are the ranks of MIN_RANK and more; of groups without these, all ranks. `spread`: the
    standard deviation between groups, a factor.

    Raises TableError: the table lacks an arm.
    """
    rows, overall = [], []
    optima = optima_of(reading)
    for arm, how in (("fullft", "rows with an empty rank"), ("lora", "rows with a rank")):
        if arm not in {o.curve.key["method"] for o in optima}:
            raise TableError(f"the table has no {arm} run ({how}), which a ratio needs. Use `fit`.")
    groups = arms_of(optima)
    for group, lora, full in groups:
        of_full, *of_lora = losses_at_best([full, *lora])
        for o, losses in zip(lora, of_lora):
            e, pairs = ratio_of([o], full), losses.minus(of_full)
            gap = None if None in (ends := (o.best_nll, full.best_nll)) else ends[0] - ends[1]
            if len(pairs.best) > 1 and is_finite(pairs):  # seeds may differ more than methods do
                gap = mean_of(pairs)
            rows.append(
                {
                    **{"group": group, "rank": _value(o, "rank"), "alpha": _value(o, "alpha")},
                    **{"ratio": e.value, "low": e.low, "high": e.high},
                    "gap": None if gap is None else gap * reading.sign,
                    "flags": sorted({*o.flags, *full.flags}),
                }
            )
        overall.append(ratio_of(lora_of(lora, MIN_RANK) or lora, full))
    # Variants share full fine-tuning's curve, so their ratios are not independent.
    independent = len({id(full) for _, _, full in groups}) == len(overall)
    p = pool_ratios(overall) if independent else None
    pooled = p and {
        **{"ratio": p[0].value, "low": p[0].low, "high": p[0].high},
        **{"groups": p[0].n, "spread": p[1]},
    }
    return {"ratios": rows, "pooled": pooled, "metric": reading.metric}


def arms_of(optima: Sequence[Optimum]) -> list[tuple[str, list[Optimum], Optimum]]:
    """Return (group, LoRA's curves, full fine-tuning's curve) for each group and variant of LoRA.

    TableError if a group has more than one curve of full fine-tuning.
    """
    out = []
    for group, members in by_group(optima).items():
        full = [o for o in members if o.curve.key["method"] == "fullft"]
        if len(full) > 1:
            raise TableError(
                f"{group}: {len(full)} full fine-tuning curves (they differ in scope, schedule or "
                "precision), but a ratio needs one. Keep one per table."
            )
        lora = by_variant(lora_of(members), group) if full else {}
        out += [(name, curves, full[0]) for name, curves in lora.items()]
    return out


def drifts(reading: Reading) -> list[dict[str, Any]]:
    """Return each group's slope of ln(best LR) over log2(rank), and the best LR tried by rank.

    TableError if the table has no lora run.
    """
    rows = []
    for whole, mine in by_group(lora_of(optima_of(reading))).items():
        for group, members in by_variant(mine, whole).items():
            members = sorted(members, key=lambda o: o.curve.key["rank"])
            known = [o for o in members if o.best_lr.draws is not None]
            slope = lr_drift(known)
            tried = {int(o.curve.key["rank"]): rate_means(o.curve) for o in members}
            best = [math.exp(x[lowest_loss(y)]) if len(x) else None for x, y in tried.values()]
            left_out = ["ranks at an edge left out"] if 2 <= len(known) < len(members) else []
            rows.append(
                {
                    **{"group": group, "slope": slope.value, "low": slope.low, "high": slope.high},
                    **{"ranks": list(tried), "best_tried": best},
                    "flags": [*slope.flags, *left_out],
                }
            )
    if not rows:
        raise TableError("the table has no lora run (rows with a rank), which a drift needs.")
    return rows


COMMANDS: dict[str, Callable[[Reading], Any]] = {"ratio": ratio, "drift": drifts}
"""Flag of `fit` -> what it prints instead of the fits."""


def lines(result: Any) -> list[str]:
    """Format a command's result: rows in columns, other values by name."""
    if not isinstance(result, dict):
        return aligned(table(result))
    out = []
    for name, value in result.items():
        rows = isinstance(value, list) and bool(value) and isinstance(value[0], dict)
        out += [f"{name}:", *aligned(table(value))] if rows else [f"{name}: {_cell(value)}"]
    return out


def table(rows: Sequence[dict[str, Any]], *names: str) -> list[list[str]]:
    """Return the named values of rows as text (default: those that any row has), after a head.

    The keys `low` and `high` join the key before them.
    """
    cells = list(map(_cells, rows))
    names = names or tuple(k for k in (cells or [{}])[0] if any(row[k] != "-" for row in cells))
    head = [name.replace("_", " ") for name in names]
    return [head, *([row[k] for k in names] for row in cells)]


def _cells(row: dict[str, Any]) -> dict[str, str]:
    """Format the values of a row."""
    valued = dict(zip(list(row)[1:], row)).get("low")
    cells = {k: _cell(v) for k, v in row.items() if k not in ("low", "high")}
    if valued is not None:
        cells[valued] = with_interval(Estimate(row[valued], row["low"], row["high"]))
    return cells


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        cells = _cells(value)
        if "value" in value or len(cells) == 1:
            return cells["value" if "value" in value else next(iter(cells))]
        return ", ".join(f"{k} {v}" for k, v in cells.items())
    if isinstance(value, list):
        return ", ".join(map(_cell, value)) or "-"
    return number(value, 4) if isinstance(value, float) or value is None else str(value)

"""What is said about a table that any program made, and about a report or all of them.

Results are plain values; `lines` formats them for a terminal.
"""

import math
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
from analysis.runs.curves import lr_curves
from analysis.runs.table import CURVE_KEYS, LOSS, NLL, Reading, Shown, TableError, read

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "analysis" / "results"


def answer(
    name: str, reports: Path, table: Path | None, out: Path | None, as_json: bool
) -> tuple[str, str]:
    """Judge a report again from its table; return the answer, and a note on what was judged.

    Args:
        name: a question, or the folder of one of its reports.
        reports: where reports are. Of several the newest is judged, without any the kept one.
        table: judge these runs in place of the report's.
        out: a new folder for the report. None: the report's own, if it is not kept.

    Raises TableError: there is no such report, it cannot be judged, or `out` has files.
    """
    folder = find_report(reports, name)
    is_kept = folder.parent == KEPT
    runs, note = read(table or folder / "table.parquet"), ""
    if is_kept and table is None:
        note = f"kept answer, as {reports} has none of your own: {folder / 'report.md'}"
    _check_free(out)
    to = out or (None if is_kept else folder)  # kept reports are rendered together
    return judge_and_report(runs, read_question(folder), to, as_json, KEPT), note


def study(reports: Path, out: Path | None) -> list[list[str]]:
    """Return the table of all claims, with a head; write the pages of all answers into `out`.

    The folder of the kept answers as `out` renders all of these again, and the README.

    Raises TableError: there are no answers, or `out` has other files.
    """
    if out:
        check_installed("the page of all answers", "matplotlib", "jinja2")
        from analysis.report.study import page

        if KEPT.is_dir() and out.resolve() == KEPT:
            page.render_all(KEPT, ROOT / "README.md")
            return answers.claims_table(answers.read_answers([KEPT]))
    _check_free(out)
    found = answers.read_answers([reports, KEPT])
    if not found:
        raise TableError(f"no answers in {reports}, and an installed package keeps none.")
    if out:
        page.write(found, out / "study.md")
    return answers.claims_table(found)


def write_page(reading: Reading, path: Path, within: float) -> None:
    """Write the interactive page of curves, fits, ratios and runs of a table, in one file."""
    optima = optima_of(reading)
    ratios = [
        (group, o.curve.name, ratio_of([o], full))
        for group, lora, full in arms_of(optima)
        for o in lora
    ]
    title = f"{path.stem}: {len(reading.table)} runs"
    write_html(path, title, reading.table, optima, ratios, (), within)


def _check_free(folder: Path | None) -> None:
    """Raise TableError if a folder has files: they may be somebody's, or ours that were changed."""
    if folder and folder.is_dir() and any(folder.iterdir()):
        raise TableError(f"{folder} has files. Name a new folder with out=DIR, or empty this one.")


def find_report(reports: Path, name: str) -> Path:
    """Find a report by its folder, else the newest of a question; else a kept one, tiny first.

    Raises TableError: there is no such report.
    """
    found = [p.parent for root in (reports, KEPT) for p in root.glob("*/question.json")]
    wanted = [p for p in found if p.name == name]
    wanted = wanted or [p for p in found if read_question(p)["name"] == name]
    if not wanted:
        raise TableError(
            f"no report {name!r} in {reports.absolute()}. There are: "
            f"{', '.join(sorted({p.name for p in found})) or '(none)'}. Run it first, as in "
            "lorasweep lr_ratio. For a table of runs: lorasweep fit FILE"
        )
    if own := [p for p in wanted if p.parent != KEPT]:
        return max(own, key=lambda p: (p / "question.json").stat().st_mtime)
    # The times of kept files are those of the checkout and say nothing.
    return min(wanted, key=lambda p: (p.name != f"{name}-tiny", p.name))


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


SHOWN: dict[str, Callable[[Reading], Any]] = {"ratio": ratio, "drift": drifts}
"""Value of show= -> what follows from the fits."""


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

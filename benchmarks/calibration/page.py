"""Render the calibration's page, its figures, and the summary in docs/answers.md.

Everything comes from analysis/results/calibration/calibration.json.
"""

import json
from typing import Any

import numpy as np
import pandas as pd

from analysis.inference.estimate import number
from analysis.report.text import markdown, text_hash, with_block
from benchmarks import plots
from benchmarks.calibration import designs
from benchmarks.calibration.generators import HELD_OUT, INSIDE, MARGIN
from benchmarks.harness import RESULTS, ROOT, render

FOLDER = RESULTS / "calibration"
FINE = 2.0
"""Largest factor between neighbouring LRs up to which the targets for coverage apply."""
Study = dict[str, Any]
"""The content of calibration.json: lists of conditions by kind, and the minutes that they took."""
HEAD = ["requirement", "target", "measured", "met"]


def _percent(value: float, digits: int = 1) -> str:
    return "-" if value != value else f"{100 * value:.{digits}f}%"


def _fine(study: Study) -> pd.DataFrame:
    """Return the conditions with learning rates at most FINE apart."""
    return pd.DataFrame(study["coverage"]).query("factor <= @FINE")


def _worst(means: pd.Series) -> tuple[float, str]:
    """Return the lowest of some means and the name of that mean; ties: alphabetical order."""
    return float(means.min()), str(means.sort_index().idxmin())


TARGETS = """\
coverage of intervals of the best learning rate, mean|94 to 97%
the same, in the worst family|at least 93%
coverage of intervals of the ratio, mean|94 to 97%
the same, in the worst family|at least 93%
median error of the best learning rate (7 LRs a factor 2 apart, 2 seeds)|below 1.1x
correct flags for optima at an edge or near divergence, worst case|at least 99%
false claims (true value at the margin's edge) that are SUPPORTED|at most 2.5%
true, precisely measured claims that are UNDECIDED|at most 20%"""
"""Name and target of each requirement, in the order of `targets`."""


def targets(study: Study) -> list[list[str]]:
    """Compare the targets for the analysis with the measurements of the calibration.

    Returns rows of name, target, measured, met, after the head.
    """
    fine, flags, verdicts = _fine(study), *map(pd.DataFrame, (study["flags"], study["verdicts"]))
    found: list[tuple[str, str]] = []
    for key in ("coverage", "ratio_coverage"):
        mean, (worst, where) = fine[key].mean(), _worst(fine.groupby("family")[key].mean())
        found.append((_percent(mean), "no: too wide" if mean > 0.97 else _met(mean >= 0.94)))
        found.append((f"{_percent(worst)} ({where})", _met(worst >= 0.93)))
    errors = fine.query("rates == 7 and factor == 2 and seeds == 2 and fresh == 0")["error"]
    middle, most = errors.median(), number(errors.max())
    found.append((f"{number(middle)}x, at most {most}x in any condition", _met(middle < 1.1)))
    right, where = _worst(flags.groupby("where")["right"].mean())
    found.append((f"{_percent(right)} ({where})", _met(right >= 0.99)))
    edge = verdicts[verdicts["ratio"].isin(MARGIN)]["supported"]
    false, most = edge.mean(), _percent(edge.max())
    found.append((f"{_percent(false)}, at most {most} in any condition", _met(false <= 0.025)))
    open_ = verdicts[verdicts["ratio"] == 10.0]["undecided"].mean()
    found.append((_percent(open_), _met(open_ <= 0.2)))
    rows = [[*line.split("|"), *row] for line, row in zip(TARGETS.splitlines(), found)]
    return [HEAD, *rows, *designs.targets(study.get("designs", ()))]


def _met(met: bool) -> str:
    return "yes" if met else "**no**"


def page(study: Study) -> str:
    """Render the page."""
    tried = study.get("designs", [])
    return render(
        "calibration",
        n_coverage=sum(r["cases"] for r in study["coverage"]),
        n_cells=len(study["coverage"]),
        least=min(r["cases"] for r in study["coverage"]),
        judged=sum(r["cases"] for r in study["verdicts"]),
        minutes=study["minutes"],
        inside=", ".join(INSIDE),
        held_out=", ".join(HELD_OUT),
        fine=FINE,
        margin=MARGIN,
        intervals=tried,
        interval_families=", ".join(dict.fromkeys(r["family"] for r in tried)),
        interval_tables=designs.tables(tried),
        targets=targets(study),
        families=_family_rows(study),
        designs=_design_rows(study),
        verdicts=_verdict_rows(study),
        flags=[
            ["family", "optimum", "flag right", "value or bound holds"],
            *(
                [r["family"], r["where"], _percent(r["right"]), _percent(r["holds"])]
                for r in study["flags"]
            ),
        ],
        sharing=_sharing_rows(study),
    )


_COVERAGE = ("coverage", "coverage_value", "coverage_bound", "ratio_coverage")


def _cell(cells: pd.DataFrame, key: str) -> str:
    """Format the mean of one number over conditions."""
    value = float(cells[key].mean())
    if key == "valued":
        return _percent(value, 0)
    return _percent(value) if key.endswith("coverage") or key in _COVERAGE else number(value)


def _family_rows(study: Study) -> list[list[str]]:
    columns = {
        "coverage": "coverage",
        "of values": "coverage_value",
        "of bounds": "coverage_bound",
        "with a value": "valued",
        "error": "error",
        "ratio": "ratio_coverage",
        "argmin error": "argmin_error",
        "parabola coverage": "parabola_coverage",
        "parabola error": "parabola_error",
        "global coverage": "global_coverage",
        "global error": "global_error",
    }
    rows = [["family", *columns]]
    for f, cells in _fine(study).groupby("family", sort=False):
        mark = " (inside)" if f in INSIDE else " (held out)" if f in HELD_OUT else ""
        rows.append([f + mark, *(_cell(cells, key) for key in columns.values())])
    return rows


def _design_rows(study: Study) -> list[list[str]]:
    design = ["rates", "factor", "seeds", "fresh", "noise"]
    head = "learning rates|factor|seeds|fresh seeds|noise|coverage|worst family|with a value"
    rows = [[*head.split("|"), "width (high / low)", "error", "ratio"]]
    for key, cells in pd.DataFrame(study["coverage"]).groupby(design, sort=False):
        worst, family = _worst(cells.set_index("family")["coverage"])
        shares = (_cell(cells, "coverage"), f"{_percent(worst)} ({family})")
        width = number(float(np.exp(cells["width"].mean())))
        rest = (_cell(cells, k) for k in ("error", "ratio_coverage"))
        rows.append([*(f"{v:g}" for v in key), *shares, _cell(cells, "valued"), width, *rest])
    return rows


def _verdict_rows(study: Study) -> list[list[str]]:
    rows = [["true ratio", "noise", "SUPPORTED", "REFUTED", "UNDECIDED", "most SUPPORTED (family)"]]
    for (ratio, noise), cells in pd.DataFrame(study["verdicts"]).groupby(["ratio", "noise"]):
        most, where = max(zip(cells["supported"], cells["family"]))
        means = (_percent(cells[k].mean()) for k in ("supported", "refuted", "undecided"))
        rows.append([f"{ratio:g}", f"{noise:g}", *means, f"{_percent(most)} ({where})"])
    return rows


def _sharing_rows(study: Study) -> list[list[str]]:
    head = "family|learning rates|factor|noise|alone: values|coverage|high / low|shared: values"
    rows = [[*head.split("|"), "coverage", "high / low"]]
    for r in study["sharing"]:
        cells = [r["family"], str(r["rates"]), f"{r['factor']:g}", f"{r['noise']:g}"]
        for fit in (r["alone"], r["shared"]):
            width = "-" if fit["width"] is None else number(float(np.exp(fit["width"])))
            coverage = "-" if fit["coverage"] is None else _percent(fit["coverage"])
            cells += [str(fit["answers"]), coverage, width]
        rows.append(cells)
    return rows


def summary(study: Study) -> list[str]:
    """Render the table of targets."""
    return markdown(targets(study))


def write() -> None:
    """Write the page, its figures and the summary in docs/answers.md."""
    text = (FOLDER / "calibration.json").read_text()
    study = json.loads(text)
    (FOLDER / "README.md").write_text(page(study))
    plots.coverage(_fine(study), FOLDER / "coverage.png", text_hash(text))
    plots.verdict_shares(pd.DataFrame(study["verdicts"]), FOLDER / "verdicts.png", text_hash(text))
    document = ROOT / "docs" / "answers.md"
    document.write_text(with_block(document.read_text(), "calibration", summary(study)))

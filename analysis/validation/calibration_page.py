"""The page of the calibration study: analysis/results/calibration/README.md, its figures, and the
README's block.

    python -m analysis.validation.calibration_page

Rendered from calibration.json and nothing else.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.inference.estimate import number
from analysis.report import plots
from analysis.validation.calibration import FOLDER, MARGIN
from analysis.validation.generators import HELD_OUT, INSIDE

BEGIN, END = (
    "<!-- calibration: made by `python -m analysis.validation.calibration_page` -->",
    "<!-- end of calibration -->",
)
FINE = 2.0
"""Spacing, as a factor, up to which the study's targets for coverage hold."""
Row = dict[str, Any]


def _mean(rows: Sequence[Row], key: str, weight: str | None = None) -> float:
    known = [r for r in rows if r.get(key) is not None]
    if not known:
        return float("nan")
    w = [r[weight] for r in known] if weight else None
    return float(np.average([r[key] for r in known], weights=w))


def _percent(value: float, digits: int = 1) -> str:
    return "-" if value != value else f"{100 * value:.{digits}f}%"


def _fine(told: dict[str, Any]) -> list[Row]:
    return [r for r in told["coverage"] if r["factor"] <= FINE]


def _by(rows: Sequence[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    out: dict[Any, list[Row]] = {}
    for r in rows:
        out.setdefault(key(r), []).append(r)
    return out


def targets(told: dict[str, Any]) -> list[list[str]]:
    """Compare what was asked of the analysis with what the study measured: rows of name, target,
    measured, met."""
    fine, families = _fine(told), _by(_fine(told), lambda r: r["family"])
    rate, ratio = _mean(fine, "coverage"), _mean(fine, "ratio_coverage")
    worst = min((_mean(rows, "coverage"), f) for f, rows in families.items())
    worst_ratio = min((_mean(rows, "ratio_coverage"), f) for f, rows in families.items())
    errors = [
        r["error"]
        for r in fine
        if (r["rates"], r["factor"], r["seeds"], r["fresh"]) == (7, 2.0, 2, 0) and r["error"]
    ]
    right = min(
        (_mean(rows, "right"), where)
        for where, rows in _by(told["flags"], lambda r: r["where"]).items()
    )
    edge = [r for r in told["verdicts"] if r["ratio"] in MARGIN]
    true = [r for r in told["verdicts"] if r["ratio"] == 10.0]
    rows = [
        (
            "intervals of best_lr hold the truth, on average",
            "94 to 97%",
            _percent(rate),
            0.94 <= rate <= 0.97,
        ),
        (
            "... in the worst family",
            "at least 93%",
            f"{_percent(worst[0])} ({worst[1]})",
            worst[0] >= 0.93,
        ),
        (
            "intervals of the ratio hold the truth, on average",
            "94 to 97%",
            _percent(ratio),
            0.94 <= ratio <= 0.97,
        ),
        (
            "... in the worst family",
            "at least 93%",
            f"{_percent(worst_ratio[0])} ({worst_ratio[1]})",
            worst_ratio[0] >= 0.93,
        ),
        (
            "median error of best_lr, 7 rates a factor 2 apart, 2 seeds",
            "below 1.1x",
            f"{number(float(np.median(errors)))}x, at most {number(max(errors))}x in a cell",
            float(np.median(errors)) < 1.1,
        ),
        (
            "flags of edge and divergence right, worst place",
            "at least 99%",
            f"{_percent(right[0])} ({right[1]})",
            right[0] >= 0.99,
        ),
        (
            "a false claim, at the margin's edge, called SUPPORTED",
            "at most 2.5%",
            f"{_percent(_mean(edge, 'supported'))}, at most {_percent(max(r['supported'] for r in edge))} in a cell",
            _mean(edge, "supported") <= 0.025,
        ),
        (
            "a true, well measured claim left UNDECIDED",
            "at most 20%",
            _percent(_mean(true, "undecided")),
            _mean(true, "undecided") <= 0.2,
        ),
    ]
    return [
        [name, target, measured, _met(name, met, rate, ratio)]
        for name, target, measured, met in rows
    ]


def _met(name: str, met: bool, rate: float, ratio: float) -> str:
    if met:
        return "yes"
    value = ratio if "ratio" in name else rate
    return "no: cautious" if "average" in name and value > 0.97 else "**no**"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Write rows as a Markdown table, the first one its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""]


HEAD = ["asked", "target", "measured", "met"]


def render(told: dict[str, Any]) -> str:
    """Write the page."""
    n_coverage = sum(r["cases"] for r in told["coverage"])
    least = min(r["cases"] for r in told["coverage"])
    out = [
        "# How far the analysis can be trusted",
        "",
        f"{n_coverage:,} planted curves in {len(told['coverage'])} cells (family x design x noise), at least {least:,} a cell, "
        f"fitted as real ones are, in sweeps of four curves; {sum(r['cases'] for r in told['verdicts']):,} planted sweeps "
        "judged. "
        f"{told['minutes']:.0f} minutes. Families inside the fitted one: {', '.join(INSIDE)}; never looked at when the model's "
        f"constants were chosen: {', '.join(HELD_OUT)}. Noise of a run 1e-4 to 1e-2 nats, curvature 0.02 to 0.3 nats per unit "
        "of ln(lr) squared. The truth is the minimum of the generator's expected loss.",
        "",
        *table([HEAD, *targets(told)]),
        "![coverage](coverage.png)",
        "",
        "## By family",
        "",
        f"Spacing of at most {FINE:g}. Coverage: intervals and bounds. Errors are median factors. Beside it, "
        "on "
        "the same cases: the best rate of the grid, a parabola through the five rates around it with a bootstrap over seeds, "
        "and one parabola through all points.",
        "",
        *table(_family_rows(told)),
        "## By design",
        "",
        *table(_design_rows(told)),
        "## Verdicts",
        "",
        f"'The ratio lies in {MARGIN[0]:g} to {MARGIN[1]:g}', one full fine-tuning curve against three ranks, "
        "one "
        "seed over the grid and five fresh ones at the three best rates.",
        "",
        *table(_verdict_rows(told)),
        "![verdicts](verdicts.png)",
        "",
        "## Flags",
        "",
        "Optima 1.5 spacings inside the rates tried must get a value (or end at a rate that breaks down), those "
        "half a spacing or more outside must be called bounds.",
        "",
        *table(_flag_rows(told)),
        "## Curvature shared between ranks",
        "",
        "Four ranks with fewer rates beside two with seven, curvatures within 20%.",
        "",
        *table(_sharing_rows(told)),
        "Command: `make calibrate`",
    ]
    return "\n".join(out) + "\n"


def _family_rows(told: dict[str, Any]) -> list[list[str]]:
    rows = [
        [
            "family",
            "coverage",
            "of values",
            "of bounds",
            "with a value",
            "error",
            "ratio",
            "argmin error",
            "parabola coverage",
            "parabola error",
            "global coverage",
            "global error",
        ]
    ]
    for f, cells in _by(_fine(told), lambda r: r["family"]).items():
        mark = " (inside)" if f in INSIDE else " (held out)" if f in HELD_OUT else ""
        rows.append(
            [
                f + mark,
                _percent(_mean(cells, "coverage")),
                _percent(_mean(cells, "coverage_value")),
                _percent(_mean(cells, "coverage_bound")),
                _percent(_mean(cells, "valued"), 0),
                number(_mean(cells, "error")),
                _percent(_mean(cells, "ratio_coverage")),
                number(_mean(cells, "argmin_error")),
                _percent(_mean(cells, "parabola_coverage")),
                number(_mean(cells, "parabola_error")),
                _percent(_mean(cells, "global_coverage")),
                number(_mean(cells, "global_error")),
            ]
        )
    return rows


def _design_rows(told: dict[str, Any]) -> list[list[str]]:
    rows = [
        [
            "rates",
            "factor",
            "seeds",
            "fresh seeds",
            "noise",
            "coverage",
            "worst family",
            "with a value",
            "width (high / low)",
            "error",
            "ratio",
        ]
    ]
    for key, cells in _by(
        told["coverage"], lambda r: (r["rates"], r["factor"], r["seeds"], r["fresh"], r["noise"])
    ).items():
        worst = min((r["coverage"], r["family"]) for r in cells if r["coverage"] is not None)
        width = _mean(cells, "width")
        rows.append(
            [
                *(f"{v:g}" for v in key),
                _percent(_mean(cells, "coverage")),
                f"{_percent(worst[0])} ({worst[1]})",
                _percent(_mean(cells, "valued"), 0),
                number(float(np.exp(width))),
                number(_mean(cells, "error")),
                _percent(_mean(cells, "ratio_coverage")),
            ]
        )
    return rows


def _verdict_rows(told: dict[str, Any]) -> list[list[str]]:
    rows = [["true ratio", "noise", "SUPPORTED", "REFUTED", "UNDECIDED", "most SUPPORTED (family)"]]
    for (ratio, noise), cells in sorted(
        _by(told["verdicts"], lambda r: (r["ratio"], r["noise"])).items()
    ):
        most = max((r["supported"], r["family"]) for r in cells)
        rows.append(
            [
                f"{ratio:g}",
                f"{noise:g}",
                *(_percent(_mean(cells, k)) for k in ("supported", "refuted", "undecided")),
                f"{_percent(most[0])} ({most[1]})",
            ]
        )
    return rows


def _flag_rows(told: dict[str, Any]) -> list[list[str]]:
    rows = [["family", "optimum", "said right", "value or bound holds"]]
    return rows + [
        [r["family"], r["where"], _percent(r["right"]), _percent(r["holds"])] for r in told["flags"]
    ]


def _sharing_rows(told: dict[str, Any]) -> list[list[str]]:
    rows = [
        [
            "family",
            "rates",
            "factor",
            "noise",
            "alone: answers",
            "coverage",
            "high / low",
            "shared: answers",
            "coverage",
            "high / low",
        ]
    ]
    for r in told["sharing"]:
        cells = [r["family"], str(r["rates"]), f"{r['factor']:g}", f"{r['noise']:g}"]
        for kind in ("alone", "shared"):
            a = r[kind]
            width = "-" if a["width"] is None else number(float(np.exp(a["width"])))
            cells += [
                str(a["answers"]),
                "-" if a["coverage"] is None else _percent(a["coverage"]),
                width,
            ]
        rows.append(cells)
    return rows


def with_block(text: str, told: dict[str, Any]) -> str:
    """Return the project's README with its block made anew."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n" + "\n".join(table([HEAD, *targets(told)])).rstrip() + f"\n{END}{tail}"


def main() -> None:
    """Write page, figures and the README's block."""
    told = json.loads((FOLDER / "calibration.json").read_text())
    (FOLDER / "README.md").write_text(render(told))
    plots.coverage(_fine(told), FOLDER / "coverage.png")
    plots.verdict_shares(told["verdicts"], FOLDER / "verdicts.png")
    path = Path(__file__).resolve().parents[2] / "README.md"
    path.write_text(with_block(path.read_text(), told))


if __name__ == "__main__":
    main()

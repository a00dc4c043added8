"""What the notebooks show: tables as data frames and figures, so that no cell holds any
mathematics.

Reads kept results; trains nothing and fits by the same calls as the reports.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.inference.estimate import number, rate, with_interval
from analysis.measures import next_runs
from analysis.measures.efficiency import of_curves
from analysis.optimum.fit import fit_all
from analysis.optimum.optimum import Optimum
from analysis.questions.ratio_answer import Answer, answer_of
from analysis.report import plots_curves
from analysis.report.commands import WITHIN
from analysis.report.study import parts_of, rows_of
from analysis.runs.lr_curves import lr_curves
from analysis.runs.table import read

RESULTS = Path(__file__).resolve().parents[1] / "results"


def kept(name: str) -> Path:
    """Return the folder of a kept result; raises FileNotFoundError with the names there are."""
    folder = RESULTS / name
    if not (folder / "table.parquet").is_file():
        names = ", ".join(sorted(p.parent.name for p in RESULTS.glob("*/table.parquet")))
        raise FileNotFoundError(f"no kept result {name!r}. There are: {names}")
    return folder


def table(folder: Path) -> pd.DataFrame:
    """Read a result's runs."""
    return read(folder / "table.parquet")


def answer(folder: Path) -> Answer:
    """Fit and judge a result's runs under the question they were trained for."""
    return answer_of(table(folder), json.loads((folder / "question.json").read_text()))


def fits(runs: pd.DataFrame) -> list[Optimum]:
    """Fit every curve of a table."""
    return fit_all(lr_curves(runs))


def _of(found: Answer | Sequence[Optimum]) -> Sequence[Optimum]:
    return found.optima if isinstance(found, Answer) else found


def optima(found: Answer | Sequence[Optimum]) -> pd.DataFrame:
    """One row a curve: the optimum, the low-regret band, the best loss."""
    rows = []
    for o in _of(found):
        band = o.band(WITHIN)
        rows.append(
            {
                "model and data": o.curve.group,
                "curve": o.curve.name,
                "best LR [95%]": with_interval(o.best_lr, rate),
                f"within {WITHIN:g} nats": "-"
                if band is None
                else f"{rate(band[0])} to {rate(band[1])}",
                "best NLL": number(o.best_nll, 5),
                "runs": len(o.curve.x),
                "flags": ", ".join(o.flags),
            }
        )
    return pd.DataFrame(rows)


def ratios(found: Answer) -> pd.DataFrame:
    """One row a ratio of LoRA's best rate over full fine-tuning's."""
    return pd.DataFrame(
        [
            {
                "model and data": r.group,
                "ranks": "4 and more" if r.rank is None else str(r.rank),
                "alpha": r.alpha,
                "ratio [95%]": with_interval(r.ratio),
                "NLL gap": with_interval(r.gap),
            }
            for r in found.ratios
        ]
    )


def verdicts(found: Answer) -> pd.DataFrame:
    """One row a claim."""
    return pd.DataFrame(
        [
            {
                "claim": v.claim,
                "model and data": v.group,
                "verdict": v.outcome,
                "measured": with_interval(v.estimate),
                "expected": v.expected,
                "margin": f"{v.margin[0]:g} to {v.margin[1]:g}",
                "why": v.why,
                "needed": v.needed,
            }
            for v in found.verdicts
        ]
    )


def drifts(found: Answer) -> pd.DataFrame:
    """One row a group: the slope of ln(best LR) per doubling of the rank, with its tests."""
    return pd.DataFrame(
        [
            {
                "model and data": g,
                "slope [95%]": with_interval(d.slope),
                "p (no slope)": number(d.p_slope, 2),
                "p (ranks equal)": number(d.p_equal, 2),
            }
            for g, d in found.drifts.items()
        ]
    )


def suggestions(found: Answer) -> pd.DataFrame:
    """One row a suggestion: the rates and seeds that would decide most."""
    return pd.DataFrame(
        [
            {
                "model and data": s.curve.group,
                "curve": s.curve.name,
                "lr": rate(s.lr),
                "seeds": ", ".join(map(str, s.seeds)),
                "why": s.why,
            }
            for s in next_runs.suggest(found)
        ]
    )


def efficiency(runs: pd.DataFrame, found: Answer | Sequence[Optimum]) -> pd.DataFrame:
    """One row a LoRA curve: rho, full fine-tuning's steps to its loss over its own steps."""
    told = zip(_of(found), of_curves(runs, _of(found)))
    return pd.DataFrame(
        [
            {
                "model and data": o.curve.group,
                "curve": o.curve.name,
                "rho [95%]": with_interval(e),
                "seeds": e.n,
                "flags": ", ".join(e.flags),
            }
            for o, e in told
            if e is not None
        ]
    )


def lr_against_nll(found: Answer | Sequence[Optimum]) -> Any:
    """Show NLL over learning rate with fits and intervals."""
    return _shown(lambda path: plots_curves.lr_against_nll(_of(found), path))


def learning_curves(runs: pd.DataFrame, found: Answer | Sequence[Optimum]) -> Any:
    """Show held-out NLL over steps."""
    return _shown(lambda path: plots_curves.learning(runs, _of(found), path))


def study() -> pd.DataFrame:
    """One row a claim of every kept result; primary claims are corrected for their number over all
    of them (Holm)."""
    head, *rows = rows_of(parts_of([RESULTS]))
    return pd.DataFrame(rows, columns=head)


def page(name: str) -> Any:
    """Show a kept page."""
    from IPython.display import Markdown

    return Markdown((RESULTS / name).read_text())


def _shown(draw: Any) -> Any:
    from IPython.display import Image

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.png"
        draw(path)
        return Image(path.read_bytes())

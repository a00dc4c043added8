"""The only interface to `analysis`.

`analysis` is imported inside functions, because pandas and scipy take a second to load. It gets
tables, plain values and paths; the caller decides where results are.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.errors import SpecError, StoreError, unknown
from lorasweep.sweep.grid import Point, curve_key
from lorasweep.sweep.question import Sweep

if TYPE_CHECKING:
    import pandas as pd

KEPT = Path(__file__).resolve().parents[2] / "analysis" / "results"
"""The repository's kept results, which a report may show next to its own."""


def check_claims(sweep: Sweep | None) -> None:
    """Raise SpecError if the sweep claims something that its analysis does not measure."""
    if sweep is None:
        return
    from analysis.questions.registry import UnknownQuestion, question_named

    try:
        module = question_named(sweep.analysis or "")
    except UnknownQuestion as error:
        raise SpecError(unknown("analysis", sweep.analysis, error.known)) from None
    estimands = module.ESTIMANDS
    for name, claim in sweep.claims.items():
        if claim.estimand not in estimands:
            raise SpecError(f"claim {name!r}: {unknown('estimand', claim.estimand, estimands)}")
        if claim.estimand in module.LOG_ESTIMANDS and not claim.margin[0] > 0:
            raise SpecError(
                f"claim {name!r}: margin={claim.margin}, but {claim.estimand} is a ratio. "
                "Expected a margin above 0."
            )


def seeds_needed(points: Sequence[Point], sweep: Sweep | None) -> list[str]:
    """Return a line per claim about a ratio: how many fresh seeds per curve it needs.

    Computed before any training, from the margin and an assumed noise.
    """
    claims = sweep.claims if sweep else {}
    ratios = {name: claim for name, claim in claims.items() if claim.estimand == "lr_ratio"}
    if sweep is None or not ratios:
        return []
    from analysis.measures.power import NOISE, needed_seeds

    lines = []
    n_lora = len({curve_key(p) for p in points if p.spec.method.name == "lora"})
    for name, claim in ratios.items():
        n, error = needed_seeds((claim.margin[0], claim.margin[1]), n_lora)
        shown = "more than 16" if n is None else f"about {n}"
        lines.append(
            f"  claim {name}: needs {shown} fresh seeds per curve, planned "
            f"{len(sweep.second.seeds)} (expected error {error:.2f} of ln ratio at a noise of "
            f"{NOISE:g} nats)"
        )
    return lines


def judge(table: "pd.DataFrame", question: dict[str, Any], folder: Path, as_json: bool) -> str:
    """Judge a sweep's finished runs, write the report into `folder`, and return the answer.

    The answer is text for the terminal, or with `as_json` one JSON object.

    Raises:
        StoreError: the runs cannot be judged together.
    """
    from analysis.report.report import judge_and_report

    with _table_errors():
        return judge_and_report(table, question, folder, as_json, KEPT)


def claims_hash(question: dict[str, Any]) -> str:
    """Hash the claims and their margins, to detect changes after the runs."""
    from analysis.report.report import question_hash

    return question_hash(question)


@dataclass(frozen=True)
class NextRound:
    """The most useful runs to add, and why."""

    runs: list[dict[str, Any]]
    """Each {like: id of a finished run, lr, seed}: that run with another learning rate and seed."""
    lines: list[str]


def next_round(table: "pd.DataFrame", question: dict[str, Any]) -> NextRound:
    """Suggest runs to add to a finished sweep; none if every claim is decided.

    Raises:
        StoreError: the runs cannot be judged together.
    """
    from analysis.measures.next_runs import lines, suggest
    from analysis.questions.registry import analyse
    from analysis.runs.lr_curves import runs_of

    with _table_errors():
        wanted = suggest(analyse(table, question))
        runs = [
            {"like": str(runs_of(table, s.curve)["run_id"].iloc[0]), "lr": s.lr, "seed": seed}
            for s in wanted
            for seed in s.seeds
        ]
    return NextRound(runs, lines(wanted))


@contextmanager
def _table_errors() -> Iterator[None]:
    from analysis.runs.table import TableError

    try:
        yield
    except TableError as error:
        raise StoreError(
            f"the runs are finished and kept, but cannot be judged together: {error}"
        ) from None


@dataclass(frozen=True)
class Qualification:
    """Whether tasks are suitable for questions about learning rates."""

    verdict: dict[str, bool]
    """Model and data set -> whether it qualifies."""
    checks: list[dict[str, Any]]
    lines: list[str]


def qualify(table: "pd.DataFrame") -> Qualification:
    """Judge tasks from finished runs of full fine-tuning and of LoRA's highest rank."""
    from analysis.questions import qualify as questions
    from analysis.report.text import aligned

    checks = questions.qualify(table)
    return Qualification(
        questions.verdict(checks),
        [dataclasses.asdict(c) for c in checks],
        aligned(questions.rows(checks)),
    )


def study(reports: Path, titles: Sequence[str], title: str) -> list[str]:
    """Write the page of the answers in `reports/TITLE`, and return its table as lines.

    The page is `reports/title/study.md`.
    """
    from analysis.report.study import answers, page
    from analysis.report.text import aligned

    parts = answers.parts_of([reports], titles)
    path = reports / title / "study.md"
    page.write(parts, path)
    return ["", *aligned(answers.rows_of(parts)), "", f"page: {path}"]

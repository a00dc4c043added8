"""Call `analysis` with tables, plain values and paths; no other module does.

`analysis` is imported inside functions, because pandas and scipy take a second to load.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.errors import SpecError, StoreError, unknown
from lorasweep.sweep.grid import Point
from lorasweep.sweep.question import Claim, Sweep
from lorasweep.sweep.replicates import planned_seeds

if TYPE_CHECKING:
    import pandas as pd

    from analysis.inference.decide import Outlook

KEPT = Path(__file__).resolve().parents[2] / "analysis" / "results"
"""The kept results of the repository. A report may show them beside the judged runs."""


def check_claims(sweep: Sweep | None) -> None:
    """Raise SpecError if the analysis of a sweep cannot judge one of the claims."""
    if sweep is None:
        return
    from analysis.questions.registry import question_named

    try:
        asked = question_named(sweep.analysis or "", sweep.estimands, sweep.variants)
    except ValueError as error:
        raise SpecError(f"sweep.{error}") from None
    estimands = asked.names
    for name, claim in sweep.claims.items():
        if claim.estimand not in estimands:
            raise SpecError(f"claim {name!r}: {unknown('estimand', claim.estimand, estimands)}")
        if claim.estimand in asked.logs and not claim.margin[0] > 0:
            raise SpecError(
                f"claim {name!r}: margin={claim.margin}, but {claim.estimand} is a ratio. "
                "Expected a margin above 0."
            )
        if claim.except_models and not asked.by_base:
            raise SpecError(
                f"claim {name!r}: except_models={claim.except_models}, but analysis "
                f"{sweep.analysis!r} cannot leave out bases. Remove it, or leave the bases out of "
                "the sweep."
            )


def outlooks(
    points: Sequence[Point], sweep: Sweep | None, *scales: str
) -> "list[tuple[str, Outlook]]":
    """Return for each claim whether the planned runs can decide it.

    Each entry names a scale: the first of `scales` for which the claim states a standard deviation
    between seeds. `points`: the runs of the first stage.

    Raises:
        SpecError: the analysis of the sweep cannot judge one of the claims.
    """
    if sweep is None or sweep.search is not None:  # a search ends when its claim is decided
        return []
    check_claims(sweep)
    from analysis.inference.decide import outlook
    from analysis.questions.registry import question_named

    ratios = question_named(sweep.analysis, sweep.estimands, sweep.variants).logs
    seeds, found = planned_seeds(points, sweep.replicate), []
    for name, claim in sweep.claims.items():
        source = next((s for s in scales if claim.planned_at(s).sd is not None), scales[0])
        stated = claim.planned_at(source)
        decides = outlook(
            name,
            claim.expected,
            claim.margin,
            stated.sd,
            stated.units or seeds,
            rounds=sweep.rounds,
            log=claim.estimand in ratios,
            units="observations" if stated.units else "seeds",
            underpowered=claim.is_underpowered_at(source),
        )
        found.append((source, decides))
    return found


def decided_by(
    claim: Claim, scale: str, outlook: "Outlook", rounds: int
) -> tuple[list[int], list[float]]:
    """Return the seeds at each planned look, and the probability of a decision by each.

    The first look has the planned seeds; action=extend adds up to MAX_NEW_SEEDS for each further
    one. Both are empty with one look, without a standard deviation, or with other units than seeds.
    """
    sd = claim.planned_at(scale).sd
    if rounds == 1 or not sd or outlook.units != "seeds":
        return [], []
    from analysis.inference import decide
    from analysis.measures.next_runs import MAX_NEW_SEEDS

    seeds = [outlook.planned + MAX_NEW_SEEDS * k for k in range(rounds)]
    return seeds, decide.decided_by(claim.expected, claim.margin, sd, seeds, outlook.log)


def judge(table: "pd.DataFrame", question: dict[str, Any], folder: Path, as_json: bool) -> str:
    """Judge a sweep's finished runs, write the report into `folder`, and return it as text or JSON.

    Raises:
        StoreError: the runs cannot be judged together.
    """
    from analysis.report.report import judge_and_report

    with _table_errors():
        return judge_and_report(table, question, folder, as_json, KEPT)


def look(table: "pd.DataFrame", question: dict[str, Any]) -> tuple[bool, dict[str, list[float]]]:
    """Judge the runs of a search so far.

    Returns whether they decide it, and the learning rates that a curve still needs, by the id of
    one of its runs. With one seed, no curve has a variance, which asks for no learning rate.

    Raises:
        StoreError: the runs cannot be judged together.
    """
    from analysis.measures.next_runs import missing_lrs
    from analysis.questions.registry import analyse
    from analysis.report.report import results_of
    from analysis.runs.lr_curves import runs_of

    with _table_errors():
        found = analyse(table, question)
        lrs = {}
        for o in found.optima:
            if table["seed"].nunique() > 1 or "no_variance" not in o.flags:
                run = str(runs_of(table, o.curve)["run_id"].iloc[0])
                lrs[run] = [float(f"{lr:.2e}") for lr in missing_lrs(o)[0]]
        return not open_questions(results_of(found, question, table)), lrs


def open_questions(results: dict[str, Any]) -> list[str]:
    """Return what the runs of a search have not decided; `results`: those of its analysis."""
    found = []
    arms = [arm for arm in results["arms"] if trains(arm)]
    for arm in arms:
        name, regret = arm_name(arm), arm["regret_percent"]
        if regret is None:
            found.append(f"the learning rate of {name} ({', '.join(arm['flags']) or 'no seeds'})")
        elif not arm["known"]:
            found.append(f"the learning rate of {name} (it may cost {regret:.2g}% of the gain)")
    if len({arm["method"] for arm in arms}) > 1:
        for v in (v for v in results["verdicts"] if v["outcome"] == "UNDECIDED"):
            found.append(f"LoRA against full fine-tuning (needed: {v['needed'] or v['why']})")
    return found


def trains(arm: dict[str, Any]) -> bool:
    """Return whether a learning rate of an arm of a search lowers the loss."""
    return arm["best_lr"]["value"] is not None or arm["best_tried"] is not None


def arm_name(arm: Mapping[str, Any]) -> str:
    """Name an arm of a search in words."""
    return f"LoRA rank {arm['rank']}" if arm["rank"] else "full fine-tuning"


def claims_hash(question: dict[str, Any]) -> str:
    """Hash the claims and their margins, to detect changes after the runs."""
    from analysis.report.report import question_hash

    return question_hash(question)


def next_round(
    table: "pd.DataFrame", question: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return runs to add to a finished sweep, and lines with the reasons.

    There are none if every claim is decided. A run is {like, lr, seed}: a copy of the finished run
    with id `like`, with another learning rate and seed.

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
    return runs, lines(wanted)


@contextmanager
def _table_errors() -> Iterator[None]:
    from analysis.runs.table import TableError

    try:
        yield
    except TableError as error:
        raise StoreError(
            f"the runs are finished and kept, but cannot be judged together: {error}"
        ) from None


def qualify(table: "pd.DataFrame") -> tuple[dict[str, bool], list[dict[str, Any]], list[str]]:
    """Judge whether tasks are suitable, from runs of full fine-tuning and of the largest LoRA.

    Returns whether each model and data set is suitable, the checks as JSON values, and as lines.
    """
    from analysis.measures import qualify as tasks
    from analysis.report.text import aligned

    checks = tasks.qualify(table)
    return tasks.verdict(checks), [asdict(c) for c in checks], aligned(tasks.rows(checks))


def study(reports: Path, titles: Sequence[str], title: str) -> list[str]:
    """Write the page of all answers, `reports/title/study.md`; return its table in lines."""
    from analysis.report.study import answers
    from analysis.report.text import aligned, missing

    found = answers.read_answers([reports], titles)
    path, lines = reports / title / "study.md", ["", *aligned(answers.claims_table(found)), ""]
    if why := missing("study.md", "matplotlib", "jinja2"):
        return [*lines, f"left out: {why}"]
    from analysis.report.study import page

    page.write(found, path)
    return [*lines, f"page: {path}"]


def code_length(
    base: Sequence[float], code: Sequence[float], tokens: Sequence[int], left: int | None
) -> list[dict[str, float | None]]:
    """Extrapolate the nats of the measured batches to all rows of the data set.

    Returns value, low and high twice: under the base model, and online in training.

    Args:
        base: nats of each measured batch under the base model.
        code: nats of each batch before it was trained on.
        tokens: loss tokens of each batch.
        left: loss tokens of the rows that were not measured. None: the rows are endless, and all
            values are None.
    """
    import numpy as np

    from analysis.inference.code_length import extrapolate

    if left is None:
        return [dict.fromkeys(("value", "low", "high")) for _ in range(2)]
    found = extrapolate(np.array(base), np.array(code), np.array(tokens, dtype=float), left)
    return [
        {"value": e.value, "low": e.low, "high": e.high} for e in (found.as_is, found.prequential)
    ]

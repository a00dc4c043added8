"""Call `analysis` with planned or finished runs; no other module of lorasweep judges.

`analysis` is imported inside functions, because pandas and scipy take a second to load.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.errors import SpecError, StoreError, unknown
from lorasweep.spec.metric import eval_steps
from lorasweep.store.exported import table_row
from lorasweep.sweep.grid import Point, curve_key, planned_seeds
from lorasweep.sweep.question import Sweep
from lorasweep.sweep.request import Request
from lorasweep.sweep.search import MIN_SEEDS, Look, arm_key, arm_names

if TYPE_CHECKING:
    import pandas as pd

    from analysis.inference.decide import Outlook, Verdict

KEPT = Path(__file__).resolve().parents[2] / "analysis" / "results"
"""The kept results of the repository. A report may show them beside the judged runs."""


def check_claims(sweep: Sweep | None) -> Any:
    """Return the analysis of a sweep; SpecError: it cannot judge one of the claims."""
    if sweep is None:
        return None
    from analysis.questions.registry import question_named

    try:
        asked = question_named(sweep.analysis or "", sweep.estimands, sweep.variants)
    except ValueError as error:
        raise SpecError(f"sweep.{error}") from None
    for name, claim in sweep.claims.items():
        if claim.estimand not in asked.names:
            raise SpecError(f"claim {name!r}: {unknown('estimand', claim.estimand, asked.names)}")
        if claim.estimand in asked.logs and not claim.margin[0] > 0:
            raise SpecError(
                f"claim {name!r}: margin={claim.margin}, but {claim.estimand} is a ratio. "
                "Expected a margin above 0."
            )
        if claim.except_models and not asked.by_base:
            raise SpecError(
                f"claim {name!r}: except_models={claim.except_models}, but analysis "
                f"{sweep.analysis!r} cannot leave out bases. Remove it."
            )
    return asked


def rehearse(sweep: Sweep, points: Sequence[Point], scale: str = "") -> "list[Verdict]":
    """Judge planned runs as if one run of each curve had ended; SpecError: they cannot be judged.

    Data are assumed to fit every rank, so claims on data that do not are not counted. A search can
    be answered without a comparison, but each of its arms needs a line of the answer.
    """
    import pandas as pd

    from analysis.inference.decide import GateCode
    from analysis.runs.table import TableError

    asked, rows, arms = check_claims(sweep), [], sweep.search and arm_names(points)
    ended = {"state": "done", "test_nll": 1.0, "nll_start": 2.0, "bits_generator": 0.1}
    for p in {curve_key(p)[1]: p for p in points}.values():
        at = eval_steps(p.spec.steps)
        curve = [{"step": s, "test_nll": 1.0, "test_nll_curve": 1.0} for s in at]
        retained = 2.0 if p.spec.dataset.n_retain else None
        ended |= {"curve": curve, "retain_nll": retained, "retain_start": retained}
        ended |= {"run_id": p.id, "n_trainable": p.spec.method.n_trainable(p.spec.model)}
        rows.append(table_row(json.loads(p.spec.canonical), ended))
        rows[-1] |= {"arm": arms[arm_key(p)]} if arms else {}
    try:
        question = {**dataclasses.asdict(sweep), "scale": scale}
        found = asked.analyse(pd.DataFrame(rows), question, KEPT)
        if arms:
            lines = [a["arm"] for a in found.search.get("arms", ())]
            if sorted(lines) != sorted(arms.values()):
                raise TableError(f"arms {', '.join(arms.values())}: not each has its own line.")
            return []
        # scale smoke only tries things, and another scale's answer, kept or not, is an answer
        few = scale == "smoke" or (sweep.analysis == "quadrature" and not KEPT.is_dir())
        allowed = {GateCode.ELSEWHERE, *[GateCode.FEW_CONDITIONS] * few}
        lacks = [{g.code for g in v.gates if g.of_grid} - allowed for v in found.verdicts]
        if lacks and (all(lacks) or not found.members):
            raise TableError(f"{found.verdicts[0].lacks}. Without it no claim could be decided.")
        return found.verdicts
    except TableError as error:
        raise SpecError(f"{sweep.analysis} cannot judge these runs together: {error}") from None


def refuse_claims(request: Request) -> None:
    """Drop claims that a foreign trainer's runs cannot decide; SpecError if none is left."""
    for part in request.parts or [request]:
        sweep, trainer = part.sweep, part.points[0].spec.trainer
        if not trainer.command:
            continue
        able = [e.name for e in check_claims(sweep).estimands if e.final]
        part.refused = [k for k, c in sweep.claims.items() if c.estimand not in able]
        sweep.claims = {k: c for k, c in sweep.claims.items() if k not in part.refused}
        if not sweep.claims:
            raise SpecError(
                f"trainer={trainer.name}: no claim is about final losses ({', '.join(part.refused)}"
                "). Use trainer=builtin, or another sweep, such as lr_ratio or tune."
            )


def outlooks(
    points: Sequence[Point], sweep: Sweep | None, *scales: str
) -> "list[tuple[str, Outlook]]":
    """Return for each claim whether the planned runs can decide it.

    Each entry names a scale: the first of `scales` for which the claim states a standard deviation
    between seeds. `points`: the runs of the first stage.
    """
    asked = check_claims(sweep)
    if sweep is None or not points:  # all runs may need more GPUs than exec.max_gpus
        return []
    if sweep.search is not None:  # it ends when its claim is decided
        rehearse(sweep, points)
        return []
    from analysis.inference.decide import outlook

    seeds, found = planned_seeds(points, sweep.replicate), []
    verdicts = rehearse(sweep, points, scales[0])
    counts = Counter(v.claim for v in verdicts)
    together = sum(max(counts[name], 1) for name, c in sweep.claims.items() if c.primary)
    for name, claim in sweep.claims.items():
        source = next((s for s in scales if claim.planned_at(s).sd is not None), scales[0])
        stated, few = claim.planned_at(source), claim.underpowered
        decides = outlook(
            name,
            claim.expected,
            claim.margin,
            stated.sd,
            stated.units or seeds,
            rounds=sweep.rounds,
            log=claim.estimand in asked.logs,
            units="observations" if stated.units else "seeds",
            underpowered=source in few if isinstance(few, list) else few,
            together=together if claim.primary else 1,
        )
        mine = [v for v in verdicts if v.claim == name]
        if mine and all(lacks := [v.lacks for v in mine]):
            asks = not all(v.not_asked for v in mine)
            decides = dataclasses.replace(decides, can_decide=False, lacks=lacks[0], asked=asks)
        found.append((source, decides))
    return found


@contextmanager
def _table_errors(
    said: str = "the runs are finished and kept, but cannot be judged together",
) -> Iterator[None]:
    """Make a table that cannot be judged a StoreError."""
    from analysis.runs.table import TableError

    try:
        yield
    except TableError as error:
        raise StoreError(f"{said}: {error}") from None


@_table_errors()
def judge(table: "pd.DataFrame", question: dict[str, Any], folder: Path, as_json: bool) -> str:
    """Judge finished runs, write the report into `folder`, and return it as text or JSON.

    Raises StoreError: the runs cannot be judged together.
    """
    from analysis.report.report import judge_and_report

    return judge_and_report(table, question, folder, as_json, KEPT)


@_table_errors()
def look(table: "pd.DataFrame", question: dict[str, Any]) -> Look:
    """Judge the runs of a search so far; StoreError: they cannot be judged together.

    Returns whether they decide it, and the learning rates that a curve still needs, by the id of
    one of its runs. A missing variance asks for no learning rate: the next seed gives it. From
    MIN_SEEDS seeds on, an arm of few learning rates gets two more if it does not know its best one.
    """
    from analysis.measures.next_runs import missing_lrs
    from analysis.optimum.fit import FEW_RATES
    from analysis.questions.registry import analyse
    from analysis.report.report import results_of
    from analysis.runs.curves import runs_of

    found, lrs = analyse(table, question), {}
    results, seeds = results_of(found, question, table), table["seed"].nunique()
    for o, arm in zip(found.optima, results["arms"], strict=True):
        few = len({*o.curve.x[o.curve.usable]}) < FEW_RATES and seeds >= MIN_SEEDS
        if few and not arm["known"]:
            o = dataclasses.replace(o, flags=(*o.flags, "few_points"))
        if "no_variance" not in o.flags or (seeds > 1 and o.open_side):
            run = str(runs_of(table, o.curve)["run_id"].iloc[0])
            lrs[run] = [float(f"{lr:.2e}") for lr in missing_lrs(o)[0]]
    return not open_questions(results), lrs


def open_questions(results: dict[str, Any]) -> list[str]:
    """Return what the runs of a search have not decided; `results`: those of its analysis."""
    found = []
    arms = [arm for arm in results["arms"] if arm["best_tried"] is not None]  # others do not train
    for arm in arms:
        name, regret = arm["arm"], arm["regret_percent"]
        if regret is None:
            found.append(f"the learning rate of {name} ({', '.join(arm['flags']) or 'no seeds'})")
        elif not arm["known"]:
            found.append(f"the learning rate of {name} (it may cost {regret:.2g}% of the gain)")
    pair = [results["judged"], results["reference"]]
    if {*pair} <= {arm["arm"] for arm in arms}:
        for v in (v for v in results["verdicts"] if v["outcome"] == "UNDECIDED"):
            found.append(f"{' against '.join(pair)} (needed: {v['needed'] or v['why']})")
    return found


def claims_hash(question: dict[str, Any]) -> str:
    """Hash the claims and their margins, to detect changes after the runs."""
    from analysis.report.report import question_hash

    return question_hash(question)


@_table_errors()
def next_round(
    table: "pd.DataFrame", question: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return runs to add to a finished sweep, none if every claim is decided, and the reasons.

    A run is {like, lr, seed}: a copy of the finished run with id `like`, with another learning rate
    and seed. Raises StoreError: the runs cannot be judged together.
    """
    from analysis.measures.next_runs import lines, suggest
    from analysis.questions.registry import analyse
    from analysis.runs.curves import runs_of

    wanted = suggest(analyse(table, question))
    runs = [
        {"like": str(runs_of(table, s.curve)["run_id"].iloc[0]), "lr": s.lr, "seed": seed}
        for s in wanted
        for seed in s.seeds
    ]
    return runs, lines(wanted)


@_table_errors("fit")
def fit_table(
    path: Path, columns: dict[str, str], higher: str, within: float, show: str, page: Path | None
) -> tuple[Any, list[str], Sequence[str]]:
    """Return the fit of each learning-rate curve of a user's table, as lines, and notes on it.

    Raises StoreError: the table cannot be read or used.

    Args:
        columns: our name of a column -> the file's.
        higher: the column of a metric of which more is better; empty: the loss.
        within: extra loss allowed in the band, in units of the metric.
        show: ratio or drift, in place of the fits.
        page: where to write a page of curves, fits and runs.
    """
    from analysis.runs.table import read_any
    from analysis.tables import commands

    theirs = {str(name): ours for ours, name in columns.items()}
    if len(theirs) < len(columns):
        raise SpecError(f"columns={columns}: each of them needs a column of its own.")
    reading = read_any(path, theirs, higher or None)
    if page:
        page.parent.mkdir(parents=True, exist_ok=True)
        commands.write_page(reading, page, within)
    found = commands.SHOWN[show](reading) if show else commands.fit(reading, within)
    return found, commands.lines(found), reading.notes


@_table_errors("answer")
def of_report(
    name: str, reports: Path, table: Path | None, out: Path | None, as_json: bool
) -> tuple[str, str]:
    """Return the answer of a report judged again, and a note; StoreError: there is none."""
    from analysis.tables.commands import answer

    return answer(name, reports, table, out, as_json)


@_table_errors("answer study")
def of_study(reports: Path, out: Path | None) -> list[list[str]]:
    """Return the table of all claims with a head; write the pages; StoreError: it cannot."""
    from analysis.tables.commands import study

    return study(reports, out)


@_table_errors("nothing was written")
def own_file(path: Path, text: str, comment: str = "<!-- {} -->") -> bytes:
    """Return what to write to a file, with a mark; StoreError: the file there is the user's."""
    from analysis.runs.table import own

    return own(path, text, comment)


def code_length(
    base: Sequence[float], code: Sequence[float], tokens: Sequence[int], left: int | None
) -> list[dict[str, float | None]]:
    """Extrapolate nats of measured batches to all rows: under the base, and online in training.

    Returns value, low and high of both; all None if the rows are endless.

    Args:
        base, code: nats of each batch under the base model, and before it was trained on.
        tokens: loss tokens of each batch.
        left: loss tokens of the rows that were not measured. None: the rows are endless.
    """
    import numpy as np

    from analysis.inference.code_length import extrapolate

    if left is None:
        return [dict.fromkeys(("value", "low", "high")) for _ in range(2)]
    found = extrapolate(np.array(base), np.array(code), np.array(tokens, dtype=float), left)
    return [{key: getattr(e, key) for key in ("value", "low", "high")} for e in found]

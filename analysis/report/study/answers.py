"""Read the sweeps' answers as rows, and fill rows into the findings and the ledger.

Nothing is judged again: all rows are read from results.json; see `analysis.inference.rows`. A
finding (findings.yaml) has numbers from the kept rows, and lists the outcomes that its words state,
those of its main claim first. If the rows have others, the text is stale. The ledger (ledger.yaml)
has every sentence of the study and of its popular summaries, with all verdicts on it.
"""

import functools
import itertools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

from analysis.inference.decide import EXPLORATORY, FAR, WITHDRAWN, Verdict
from analysis.inference.estimate import AT_LEAST, fixed, number, with_interval
from analysis.inference.rows import Row, pick, rows_of
from analysis.inference.where import Setting
from analysis.questions.registry import read_question
from analysis.runs.table import TableError

ORDER = (
    *("regime", "quadrature", "lr_ratio", "lr_scale", "short_runs", "rank", "layers", "experts"),
    *("rl_bits", "rl", "rl_unembedding", "rl_matrices", "rl_layers"),
    *("batch_size", "large_batches", "capacity", "invariance", "compute", "recipes"),
)
"""The order of the study's questions; any others follow by name."""
NAMES = {
    "smollm2-135m-instruct": "SmolLM2",
    "gsm8k": "word problems",
    "skills": "exercises",
    "words": "exercises under new names, by rewards",
    "bandit_drawn": "hidden labels, by rewards",
}
"""Base model or data set -> its name in sentences, where that differs."""
MANY = 4
"""Number of bases up to which they are named."""
TINIEST = 1e-6
"""A margin whose ends are both closer to 0 than this allows for rounding alone."""
SPANS = {"rank": "LoRA rank", "batch_size": "batch", "steps": "updates"}
WORDS = {
    Setting.IN_REGIME: "in the regime",
    Setting.BEYOND: "beyond the regime",
    Setting.REAL: "on a real model",
}


@dataclass(frozen=True)
class Answer:
    """One sweep's answer at one scale."""

    folder: Path
    results: dict[str, Any]
    question: dict[str, Any]

    @property
    def sweep(self) -> str:
        return self.results["sweep"]

    @property
    def scale(self) -> str:
        return self.results["scale"]

    @functools.cached_property
    def rows(self) -> list[Row]:
        """The rows of the answer, verdicts last."""
        return rows_of(self.results, self.question)

    @property
    def judged(self) -> list[tuple[Row, Verdict]]:
        """The rows with verdicts."""
        return [(r, r.verdict) for r in self.rows if r.verdict]

    @property
    def single(self) -> list[tuple[Row, Verdict]]:
        """The verdicts on claims that are asked of these runs."""
        return [(r, v) for r, v in self.judged if not v.not_asked]

    @property
    def exploratory(self) -> bool:
        """Whether all verdicts of the answer are exploratory."""
        return all(v.exploratory for _, v in self.judged)

    @functools.cached_property
    def runs(self) -> pd.DataFrame:
        """The table of the answer's runs."""
        return pd.read_parquet(self.folder / "table.parquet")

    @property
    def run_ids(self) -> set[str]:
        return set(self.runs.get("run_id", ()))

    @property
    def bases(self) -> list[str]:
        return sorted(self.runs["model"].unique())

    @property
    def updates(self) -> int:
        """Number of updates after which the answer was judged; runs may be longer."""
        return max((r.updates or 0 for r in self.rows if r.quantity == "best_lr"), default=0)

    @property
    def trained(self) -> str:
        """The runs in words: models with their size, data, ranks, batch, updates."""
        table = self.runs
        full = table[table["method"] == "fullft"]
        sizes = full.groupby("model")["n_trainable"].max() if "n_trainable" in full else {}
        millions = {m: f"{n / 1e6:{'.2g' if n < 1e8 else '.0f'}}M" for m, n in sizes.items()}
        models = [f"{m} ({millions[m]} parameters)" if m in millions else m for m in self.bases]
        names = f"{len(models)} bases" if len(models) > 3 else " and ".join(models)
        said = [f"{names} on {' and '.join(sorted(table['dataset'].unique()))}"]
        for column, what in SPANS.items():
            if table[column].notna().any():
                span = dict.fromkeys(f"{v:,g}" for v in (table[column].min(), table[column].max()))
                said.append(f"{what} {' to '.join(span)}")
        if table["steps"].nunique() == 1 and 0 < self.updates < table["steps"].max():
            said[-1] += f" (judged after {self.updates}, before the task was solved)"
        rows = self.results.get("held_out")
        return ", ".join([*said, *([f"held-out rows {rows}"] if rows else [])])


def read_answers(folders: Sequence[Path]) -> list[Answer]:
    """Read all answers, in ORDER; of two with one name, the first folder's."""
    found: dict[str, Answer] = {}
    for root in folders:
        for path in sorted(root.glob("*/results.json")):
            if path.parent.name not in found:
                try:
                    results, question = json.loads(path.read_text()), read_question(path.parent)
                    answer = Answer(path.parent, results, question)
                    _ = answer.scale, answer.rows, answer.runs  # reads all of its files
                    found[path.parent.name] = answer
                except (OSError, ValueError, LookupError, TypeError) as error:  # others count
                    print(f"left out: {path.parent}: {error!r}", file=sys.stderr)

    def place(a: Answer) -> tuple[int, str, str]:
        known = ORDER.index(a.sweep) if a.sweep in ORDER else len(ORDER)
        return known, a.sweep, a.scale

    return sorted(found.values(), key=place)


def claims_table(answers: Sequence[Answer]) -> list[list[str]]:
    """Return the table of all claims for a terminal, one row per claim after the head."""
    rows = [
        ["claim", "scale", "expected", "measured [interval]", "verdict", "runs", "still needed"]
    ]
    for a in answers:
        many = len({r.task for r, _ in a.judged}) > 1
        for r, v in a.judged:
            where = f", {r.task}" if many else ""
            rows.append(
                [
                    f"{r.says}{where} ({a.sweep}: {v.claim}{', primary' if v.primary else ''})",
                    a.scale,
                    f"{v.expected:g}, within {within(v.margin)}",
                    with_interval(v.estimate),
                    v.shown,
                    str(a.results.get("runs", "-")),
                    v.needed or "-",
                ]
            )
    return rows


# ---------------------------------------------------------------- words


def where(r: Row) -> str:
    """Name the base, the data, the rank and the number of updates of a row; many bases counted."""
    one_set = r.setting == Setting.IN_REGIME and " on " in r.task
    data = "only rules new" if one_set else " and ".join(map(called, r.data.split(" and ")))
    size = [
        f"rank {r.rank}" * (r.rank is not None),
        f"{r.updates or 0:,} updates" * bool(r.updates),
    ]
    at = r.at.partition(";")[0] or ", ".join(filter(None, size))
    bases = re.split(", | and ", r.base)
    named = listed([called(b) for b in bases]) if len(bases) <= MANY else f"{len(bases)} bases"
    return f"{named} ({'; '.join(filter(None, (data, at)))})"


def listed(words: Sequence[str]) -> str:
    """Join words by commas and a last "and"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def called(name: str) -> str:
    """Return the name of a base model or data set in sentences."""
    return NAMES.get(name, name)


def within(margin: tuple[float, float], far: float = FAR, unit: str = "") -> str:
    """Return a claim's margin in words; ends from `far` on are open."""
    low, high = margin
    if -TINIEST < low < 0 < high < TINIEST:
        return f"0{unit}, to rounding"
    text = f"up to {high:g}{unit}" if low <= -far else f"{low:g} to {high:g}{unit}"
    return f"{low:g}{unit} and more" if high >= far else text


# ---------------------------------------------------------------- the findings

TEXTS, SETTINGS = (Path(__file__).with_name(f"{name}.yaml") for name in ("findings", "settings"))
ON_PAGE = 5
"""Number of findings on the page; the others have a line below."""
Show = tuple[Callable[[float], float], Callable[[float], str], str]
SHOWN: dict[str, Show] = {
    "plain": (float, number, ""),
    "short": (float, lambda v: number(v, 2), ""),
    "times": (float, lambda v: fixed(v, 1) if v >= 1 else number(v, 2), ""),
    "factor": (float, lambda v: number(v, 2) if 0 < v < 0.1 else fixed(v, 2), ""),
    "percent": (float, lambda v: fixed(v, 1), "%"),
    "fine percent": (float, lambda v: fixed(v, 2), "%"),
    "whole percent": (float, lambda v: number(v, 2), "%"),
    "points": (float, lambda v: fixed(v, 1, "+"), " points"),
    "share": (lambda v: 100 * v, lambda v: fixed(v, 1), "%"),
    "loss": (float, lambda v: fixed(v, 3), ""),
    "rate": (float, lambda v: f"{v:.1e}".replace("e-0", "e-"), ""),
    "needs": (lambda speed: 1 / speed, lambda v: fixed(v, 2), ""),
    "fourfold": (lambda power: 4**power, lambda v: fixed(v, 2), ""),
    "ahead": (lambda lost: -lost, lambda v: fixed(v, 1), "%"),
    "times off": (math.exp, lambda v: fixed(v, 2), ""),
    "fold": (math.exp, number, "-fold"),
    "rise": (lambda log: 100 * math.expm1(log), lambda v: f"{float(number(v, 2)):g}", "%"),
    "fall": (lambda log: -100 * math.expm1(log), lambda v: fixed(v, 1), "%"),
}
"""Way to show a number -> what is shown of the value, its format, its unit."""


class Finding(NamedTuple):
    """A conclusion and the numbers that it rests on."""

    sweep: str
    """The question whose page has the details."""
    text: str
    more: str
    """Sentences with further settings and numbers, for the question's page alone."""
    also: tuple[str, ...]
    """Other questions that the numbers come from."""
    used: tuple[Row, ...]
    """The rows whose numbers or outcomes the text states."""
    short: str
    """The finding in a sentence or two, for README."""
    tag: str
    """Where the number of README was measured."""


class Advice(NamedTuple):
    """A setting, what to set, and what was measured of it."""

    setting: str
    start: str
    why: str
    tag: str
    """For README's table: what to start with, why, and where that was measured."""
    set: str
    lines: tuple[Sequence[str], ...]
    """For each measurement: base, data, rank and updates; the result; what was expected."""
    pages: tuple[str, ...]
    """Questions, or folders of the kept results, with details."""
    used: tuple[Row, ...]


def findings(rows: Sequence[Row], path: Path | None = None) -> list[Finding]:
    """Fill the numbers into findings.yaml, or `path`; the first ON_PAGE are those of the page.

    Raises:
        TableError: rows have other outcomes than a text states, or lack one of its numbers.
    """
    known = by_answer(rows)
    return [_filled(entry, known) for entry in yaml.safe_load((path or TEXTS).read_text())]


def by_answer(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each answer."""
    return {k: list(g) for k, g in itertools.groupby(rows, lambda r: f"{r.sweep}-{r.scale}")}


def settings(rows: Sequence[Row]) -> list[Advice]:
    """Fill the numbers into settings.yaml.

    Raises:
        TableError: rows lack a number, or a claim's outcome in the condition of a number.
    """
    known, out = by_answer(rows), []
    for entry in yaml.safe_load(SETTINGS.read_text()):
        numbers, used = _numbers(known, entry)
        lines = list[Sequence[str]]()
        for line in entry["measured"]:
            said, mine = _lines(known, **line)
            lines, used = lines + said, used + mine
        start, why, tag, advice = (
            str(entry[k]).format(**numbers) for k in ("start", "why", "tag", "set")
        )
        lines += entry.get("elsewhere", ())
        pages, name = (entry["sweep"], *entry.get("also", ())), entry["setting"]
        out.append(Advice(name, start, why, tag, advice, (*lines,), pages, (*used,)))
    return out


def _lines(
    known: dict[str, list[Row]], says: str, of: str, we: str = "", place: str = "", **values: Any
) -> tuple[list[Sequence[str]], list[Row]]:
    """Return a line for each row that `_number` finds, and the rows with their verdicts.

    `we`: what was expected in words; `claim`: the claim that was, if `of` names a measurement;
    `place`: where, if the row does not say it.
    """
    most, claim = values.pop("join", "") == "most", values.pop("claim", "")
    _, rows = _number(known, of, join="all", **values)
    rows = sorted(rows, key=lambda r: r.estimate.value or 0.0)[-1:] if most else rows
    lines, used = list[Sequence[str]](), list(rows)
    for r in rows:
        verdicts = [r] if r.verdict else []
        if claim:
            verdicts = pick(known[of.partition(": ")[0]], claim=claim, base=r.base, data=r.data)
            used += verdicts
        if len(verdicts) != bool(we):
            raise TableError(f"{SETTINGS}: {len(verdicts)} verdicts on {of}, {r.data}, {claim}")
        number, _ = _number(
            {"": [r]}, f": {r.verdict.claim if r.verdict else r.quantity}", **values
        )
        outcome = f"{we}: {verdicts[0].verdict.shown.lower()}" if we else "measured"
        lines.append((place or where(r), says.format(number), outcome))
    return lines, used


def _filled(entry: dict[str, Any], known: dict[str, list[Row]]) -> Finding:
    used: list[Row] = []
    explores = True
    for place, outcomes in entry.get("rests", {}).items():
        answer, _, claim = place.partition(": ")
        judged = pick(known.get(answer, ()), claim=claim)
        explores = explores if used else all(r.verdict.exploratory for r in judged if r.verdict)
        used += judged
        today = [r.verdict.shown for r in judged if r.verdict]
        if today != outcomes:
            raise TableError(
                f"the text {entry['lead']!r} in {TEXTS.parent} states {place} {outcomes}, but its "
                f"verdicts are {today}. Write the text again."
            )
    numbers, mine = _numbers(known, entry)
    mark = f" ({EXPLORATORY})" if explores else ""
    texts = [str(entry.get(k, "")).strip() for k in ("lead", "said", "more", "short", "tag")]
    lead, said, *rest = (text.format(**numbers) for text in texts)
    text, also = f"**{lead}.**{mark} {said}", tuple(entry.get("also", ()))
    return Finding(entry["sweep"], text, rest[0], also, (*used, *mine), *rest[1:])


def _numbers(
    known: dict[str, list[Row]], entry: dict[str, Any]
) -> tuple[dict[str, str], list[Row]]:
    """Return the numbers of an entry as texts, and the rows that they are from."""
    found = {name: _number(known, **asked) for name, asked in entry.get("numbers", {}).items()}
    texts = {name: text for name, (text, _) in found.items()}
    return texts, [r for _, mine in found.values() for r in mine]


def _number(
    known: dict[str, list[Row]], of: str, show: str = "plain", join: str = "", **values: Any
) -> tuple[str, list[Row]]:
    """Return a number of findings.yaml as text, and the rows that it is from.

    Args:
        of: the answer, and a claim or the name of a measured quantity: "rank-tiny: parity".
        show: a key of SHOWN.
        join: how to join the numbers of several rows: "all" lists them, "values" without their
            intervals; "most" is the highest; "ends" the lowest and the highest, "span" these two
            without their intervals.
        values: values of the rows' attributes; a list allows each of its values.
    """
    answer, _, name = of.partition(": ")
    rows = known.get(answer, ())
    found = pick(rows, claim=name) or pick(rows, name, verdict=None)
    for key, value in values.items():
        allowed = value if isinstance(value, list) else [value]
        found = [r for r in found if getattr(r, key) in allowed]
    found = [r for r in found if r.estimate.value is not None]
    if not found or (len(found) > 1 and not join):
        raise TableError(f"a text in {TEXTS.parent}: {len(found)} rows are {of} with {values}")
    ranked = sorted(found, key=lambda r: float(r.estimate.value or 0.0))
    ends, chosen = join in ("ends", "span"), ranked[-1:] if join == "most" else found
    chosen = [ranked[0], ranked[-1]] if ends else chosen
    (to, write, unit), texts = SHOWN[show], []
    for e in (r.estimate for r in chosen):
        texts.append(f"{write(to(float(e.value or 0.0)))}{unit}")
        if join not in ("span", "values") and e.has_interval():
            low, high = sorted(map(to, e.interval))
            texts[-1] += f" [{write(low)}, {write(high)}]"
    return " to ".join(dict.fromkeys(texts)) if ends else listed(texts), found


# ---------------------------------------------------------------- the ledger

SENTENCES = TEXTS.with_name("ledger.yaml")
OUTCOMES = ("SUPPORTED", "REFUTED", BETTER := "REFUTED, being better", "UNDECIDED", WITHDRAWN)
NOT_TESTED = "not tested"
OTHERS = "Other questions"


def ledger(answers: Sequence[Answer]) -> list[list[str]]:
    """Return the ledger's rows, one sentence a row after the head.

    Claims that are not in ledger.yaml but have an answer come last.
    """
    judged = [(f"{r.sweep}: {v.claim}", r, v) for a in answers for r, v in a.single]
    blocks = yaml.safe_load(SENTENCES.read_text())
    claims = {name for block in blocks for s in block["sentences"] for name in claims_of(s)}
    says = {name: r.says for name, r, _ in judged if name not in claims}
    others = [{"says": f"{t[0].upper()}{t[1:]}", "claim": name} for name, t in says.items()]
    blocks += [{"from": OTHERS, "sentences": others}] if others else []
    episodes = [r for a in answers for r in pick(a.rows, "parameters_an_episode")]
    rows = [["sentence", *WORDS.values()]]
    for block in blocks:
        rows.append([f"**{block['from']}**", *("" for _ in Setting)])
        for s in block["sentences"]:
            mine = [(r, v) for name, r, v in judged if name in claims_of(s)]
            cells = [_counted([j for j in mine if j[0].setting == k], s, episodes) for k in Setting]
            text = f"{s['says']} ({s['note']})" if "note" in s else s["says"]
            rows.append([text, *(cells if mine else [NOT_TESTED, *cells[1:]])])
    return rows


def claims_of(sentence: dict[str, Any]) -> Sequence[str]:
    """Return the claims that judge a sentence, as `sweep: claim`; empty: no sweep tests it."""
    named = sentence.get("claim", ())
    return (named,) if isinstance(named, str) else named


def _counted(
    judged: Sequence[tuple[Row, Verdict]], sentence: dict[str, Any], episodes: Sequence[Row]
) -> str:
    """Count the outcomes in one setting with their scales, confirmatory ones first.

    Also show the parameters per sampled completion of the lowest rank, if the sentence has
    `episodes`; with `at_most`, only the upper end of the claim's margin counts.
    """

    def outcome(v: Verdict) -> str:
        if v.is_withdrawn:
            return WITHDRAWN
        if not sentence.get("at_most"):
            return BETTER if v.is_better else v.outcome
        e, most = v.estimate, v.margin[1]
        if v.gates or e.low is None or e.high is None or AT_LEAST in e.flags:
            return "UNDECIDED"
        return "SUPPORTED" if e.high <= most else "REFUTED" if e.low > most else "UNDECIDED"

    by_mark: dict[bool, list[tuple[Row, str]]] = {}
    for r, v in judged:
        explores = bool(v.exploratory) and not v.is_withdrawn
        by_mark.setdefault(explores, []).append((r, outcome(v)))
    lines = []
    for explores, mine in sorted(by_mark.items()):
        counts = Counter(outcome for _, outcome in mine)
        n = f" {{}} of {len(mine)}" if len(mine) > 1 else ""
        words = ", ".join(f"**{o}**{n.format(counts[o])}" for o in OUTCOMES if counts[o])
        scales = [f"`{r.scale.partition('_')[0]}`" for r, _ in mine]
        mark = f" ({EXPLORATORY})" if explores else ""
        lines.append(f"{words} at {', '.join(dict.fromkeys(scales))}{mark}")
    known = []
    for r in (r for r, _ in judged if sentence.get("episodes")):
        of_task = pick(episodes, sweep=r.sweep, scale=r.scale, task=r.task)
        lowest = min((e.rank for e in of_task), default=None)
        known += [float(e.estimate.value or 0) for e in of_task if e.rank == lowest]
    if known:
        shown = dict.fromkeys(f"{float(f'{x:.2g}'):,g}" for x in (min(known), max(known)))
        lines.append(f"at {' to '.join(shown)} parameters an episode")
    return "<br>".join(lines)

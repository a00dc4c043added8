"""The study's table: every claim of every sweep that has an answer, and the pages that are made of it.

    python -m analysis study [--out PAGE.md] [--json]

Read from results.json of kept results (analysis/results) and of reports of one's own; primary claims are corrected for their
number over the whole table (Holm). No number in a page is typed by hand.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.results import LEVEL, Estimate, Verdict, with_interval
from analysis.verdicts import holm, look_level

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- answers: made by `python -m analysis study` -->", "<!-- end of answers -->"
ORDER = ("lr_ratio", "lr_scale", "short_runs", "rank", "layers", "batch_size", "capacity", "invariance", "compute", "recipes")
"""The order of the study's questions; others follow by name."""


@dataclass(frozen=True)
class Part:
    """One sweep's answer at one scale."""

    folder: Path
    told: dict[str, Any]
    question: dict[str, Any]
    verdicts: list[Verdict]

    @property
    def name(self) -> str:
        """Sweep and scale."""
        return f"{self.told['sweep']}-{self.told['scale']}"

    @property
    def command(self) -> str:
        """What makes it again."""
        return f"python -m lorasweep +sweep={self.told['sweep']} scale={self.told['scale']}"


    @property
    def runs(self) -> pd.DataFrame:
        """The runs, as in its table.csv; no rows if it has none."""
        path = self.folder / "table.csv"
        return pd.read_csv(path) if path.is_file() else pd.DataFrame()

    @property
    def run_ids(self) -> set[str]:
        """Names of its runs."""
        return set(self.runs.get("run_id", ()))

    @property
    def trained(self) -> str:
        """What was trained: models with their size, data, ranks, batch, updates."""
        table = self.runs
        if not len(table):
            return "-"
        full = table[table["method"] == "fullft"]
        sizes = full.groupby("model")["n_trainable"].max() if "n_trainable" in full else {}
        models = [f"{m} ({_millions(sizes[m])} parameters)" if m in sizes else m for m in sorted(table["model"].unique())]
        names = "several bases" if len(models) > 3 else " and ".join(models)
        said = [f"{names} on {' and '.join(sorted(table['dataset'].unique()))}"]
        said += [f"{what} {_span(table[column])}" for column, what in SPANS.items() if table[column].notna().any()]
        return ", ".join(said)


SPANS = {"rank": "LoRA rank", "batch_size": "batch", "steps": "updates"}


def _millions(n: float) -> str:
    return f"{n / 1e6:.2g}M" if n < 1e8 else f"{n / 1e6:.0f}M"


def _span(values: pd.Series) -> str:
    low, high = values.min(), values.max()
    return f"{low:,g}" if low == high else f"{low:,g} to {high:,g}"


def parts_of(folders: Sequence[Path]) -> list[Part]:
    """Read all answers below folders; of one sweep and scale the first folder's counts. Primary claims are corrected
    together."""
    found: dict[str, Part] = {}
    for root in folders:
        for path in sorted(root.glob("*/results.json")):
            told = json.loads(path.read_text())
            question = json.loads((path.parent / "question.json").read_text())
            verdicts = [_verdict(v) for v in told["verdicts"]]
            found.setdefault(path.parent.name, Part(path.parent, told, question, verdicts))

    def place(part: Part) -> tuple[int, str, str]:
        sweep = part.told["sweep"]
        return (ORDER.index(sweep) if sweep in ORDER else len(ORDER), sweep, part.told["scale"])

    parts = sorted(found.values(), key=place)
    corrected = iter(holm([_paid(v, p.question) for p in parts for v in p.verdicts]))
    return [Part(p.folder, p.told, p.question, [next(corrected) for _ in p.verdicts]) for p in parts]


def _paid(v: Verdict, question: dict[str, Any]) -> Verdict:
    """Raise a verdict's p by what its sweep's looks cost: the level of one look stands for the level of all of them."""
    share = (1 - LEVEL) / (1 - look_level(int(question.get("rounds", 1))))
    return v if v.p is None else replace(v, p=min(1.0, v.p * share))


def _verdict(plain: dict[str, Any]) -> Verdict:
    estimate = Estimate(**{**plain["estimate"], "flags": tuple(plain["estimate"]["flags"])})
    return Verdict(**{**plain, "estimate": estimate, "margin": tuple(plain["margin"])})


FAR = 100.0
"""An end of a margin this far out stands for none."""
HEAD = ("claim", "scale", "expected", "measured [interval]", "verdict", "runs", "still needed")


def rows_of(parts: Sequence[Part], words: bool = False) -> list[list[str]]:
    """Return the table, its head first: one row a claim, by its name or in words."""
    rows = [list(HEAD)]
    for part in parts:
        several = len({v.group for v in part.verdicts}) > 1
        for v in part.verdicts:
            where = f", {v.group}" if several else ""
            name = f"{part.told['sweep']}: {v.claim}"
            if words:
                whose = part.question["claims"].get(v.claim, {}).get("whose", "ours")
                text = f"{_says(part, v)}{where} (`{name}`, {whose}{', primary' if v.primary else ''})"
            else:
                text = f"{name}{' (primary)' if v.primary else ''}{where}"
            rows.append([text, part.told["scale"],
                         f"{v.expected:g}, within {_margin(v)}", with_interval(v.estimate), v.outcome,
                         str(part.told.get("runs", "-")), v.needed or "-"])  # fmt: skip
    return rows


def _says(part: Part, v: Verdict) -> str:
    """Return the claim in words."""
    return part.question["claims"].get(v.claim, {}).get("says") or v.claim.replace("_", " ")


def _margin(v: Verdict) -> str:
    low, high = v.margin
    return f"{low:g} and more" if high >= FAR else f"up to {high:g}" if low <= -FAR else f"{low:g} to {high:g}"


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(c.replace("|", "\\|") for c in r) + " |" for r in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def table(parts: Sequence[Part]) -> list[str]:
    """Write the table as Markdown, claims in words, verdicts in bold."""
    rows = rows_of(parts, words=True)
    return _markdown([rows[0], *([*r[:4], f"**{r[4]}**", *r[5:]] for r in rows[1:])])


def contradicted(parts: Sequence[Part]) -> list[str]:
    """Write what became, at every scale that it was asked at, of the claims that are refuted at one of them: a claim that
    falls on one base may stand on another. A sweep's verdict on all its tasks counts, with the bases that it rests on."""
    scales = sorted({p.told["scale"] for p in parts}, key=lambda s: (not s.startswith("tiny"), len(s), s))
    found: dict[tuple[str, str], dict[str, tuple[Part, Verdict]]] = {}
    for part in parts:
        for v in part.verdicts:  # the first one of a claim is that over all tasks
            found.setdefault((part.told["sweep"], v.claim), {}).setdefault(part.told["scale"], (part, v))
    refuted = [at for at in found.values() if any(v.outcome == "REFUTED" for _, v in at.values())]
    shown = [s for s in scales if any(s in at for at in refuted)]
    rows = [["claim", "expected", *shown]]
    for at in refuted:
        part, first = next(iter(at.values()))
        cells = [_cell(*at[s]) if s in at else "not asked" for s in shown]
        rows.append([_says(part, first), _margin(first), *cells])
    return _markdown(rows) if refuted else []


def tally(parts: Sequence[Part]) -> list[list[str]]:
    """Count verdicts by whose claim it is; a claim counts once for each scale, and not again for each task."""
    first: dict[tuple[str, str], tuple[str, str]] = {}
    for part in parts:
        for v in part.verdicts:
            whose = part.question["claims"].get(v.claim, {}).get("whose", "ours")
            first.setdefault((part.name, v.claim), (whose, v.outcome))
    outcomes = ("SUPPORTED", "REFUTED", "UNDECIDED")
    said = {"study": "the study's own", "popular": "popular: summaries, defaults, other papers",
            "ours": "ours: certificates, controls"}  # fmt: skip
    rows = [["claims", *outcomes]]
    for whose in (w for w in said if any(a == w for a, _ in first.values())):
        rows.append([said[whose], *(str(sum(f == (whose, o) for f in first.values())) for o in outcomes)])
    return rows


def _cell(part: Part, v: Verdict) -> str:
    bases = sorted({c["model"] for c in part.told["curves"]})
    where = bases[0] if len(bases) == 1 else f"{len(bases)} bases"
    return f"**{v.outcome}** {with_interval(v.estimate)} ({where})"


def block(parts: Sequence[Part], root: str, figures: Sequence[str] = ()) -> str:
    """Write what the project's README shows: the primary claims, and the figures of the parts named."""
    primary = [replace(p, verdicts=[v for v in p.verdicts if v.primary]) for p in parts]
    out = [*table(primary), ""]
    for part in (p for p in parts if p.name in figures):
        out += _figures(part, root)[:2]
    return "\n".join(out).rstrip()


def _figures(part: Part, root: str) -> list[str]:
    out = []
    for name, caption in part.told.get("figures") or []:
        if (part.folder / name).is_file():
            out += [f"![{caption}]({root}{part.folder.name}/{name})", ""]
    return out


def page(parts: Sequence[Part], root: str = "") -> str:
    """Write the study's page: the table, then each question with its verdicts, its figures and its command."""
    claims = {(p.told["sweep"], v.claim) for p in parts for v in p.verdicts}
    runs = len(set().union(*(p.run_ids for p in parts))) if parts else 0
    out = ["# The study", "",
           f"{len(claims)} claims of {len({p.told['sweep'] for p in parts})} sweeps, some asked at several scales and on "
           f"several tasks, {runs:,} distinct runs. A verdict holds for the models, tasks and lengths of its runs, which stand "
           "at each question below. At tiny these are models of 0.2 to 3 million parameters on a synthetic language, some "
           "hundred updates, where LoRA mostly learns more slowly than full fine-tuning: outside of the regime in which the "
           "study finds them equal. Nothing there says what a model of billions would do.", "",
           "Primary claims are corrected for their number over the whole table (Holm), so that one may be open here that its "
           "own report decides. Margins were stated before the runs, and each report prints their hash; what else of a "
           "question changed after a look is in DECISIONS (D34, D36, D41), and each look is paid for in the interval's "
           "level. rho is full fine-tuning's updates to a loss that both reach over LoRA's: 0.5 means that LoRA needs twice "
           "as many.", "",
           *_markdown(tally(parts)), "",
           *table(parts), ""]  # fmt: skip
    if (refuted := contradicted(parts)):
        out += ["## Claims that were refuted, by scale", "",
                "Does a refutation hang on one base? The base stands in brackets: tiny64 and tiny128 differ in width, "
                "tiny64-s1 is tiny64 of another pretraining seed, smollm2 a real pretrained model.", "",
                *refuted, ""]  # fmt: skip
    by_question: dict[str, list[Part]] = {}
    for part in parts:
        by_question.setdefault(part.question["question"], []).append(part)
    for text, mine in by_question.items():
        asked = mine[0].question
        out += [f"## {text}", "", f"Source of the claim: {asked['source']}. {asked.get('how', '')}".strip(), ""]
        for part in mine:
            here = f"{root}{part.folder.name}"
            out += [f"At scale `{part.told['scale']}`, {part.told.get('runs', 0):,} runs, {part.trained} "
                    f"([report]({here}/report.md), "
                    f"[table]({here}/table.csv), `{part.command}`):", "",
                    *(_said(part, v) for v in part.verdicts), "", *_figures(part, root)]  # fmt: skip
    return "\n".join(out).rstrip() + "\n"


def _said(part: Part, v: Verdict) -> str:
    where = f" ({v.group})" if len({w.group for w in part.verdicts}) > 1 else ""
    rest = f"; {v.why}" if v.outcome == "UNDECIDED" or v.why.startswith("by task") else ""
    told = f"measured {with_interval(v.estimate)}, to lie within {_margin(v)}"
    return f"- **{v.outcome}**: {_says(part, v)}{where}; {told}{rest}."


SHOWN = ("lr_scale-tiny", "rank-tiny", "layers-tiny", "capacity-tiny")
"""Parts whose first figure the project's README shows."""


def readme(text: str) -> str:
    """Return the project's README with its block of answers made anew."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{block(parts_of([RESULTS]), 'analysis/results/', SHOWN)}\n{END}{tail}"


def main() -> None:
    """Write the kept results' page and the block of the project's README."""
    (RESULTS / "README.md").write_text(page(parts_of([RESULTS])))
    path = Path(__file__).parent.parent / "README.md"
    path.write_text(readme(path.read_text()))

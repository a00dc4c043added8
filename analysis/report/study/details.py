"""What the page folds away: the questions with their verdicts and figures, and every verdict."""

import os
from collections.abc import Sequence
from pathlib import Path

from analysis.inference.estimate import (
    BETTER,
    EXPLORATORY,
    WITHDRAWN,
    Verdict,
    with_interval,
)
from analysis.report.study.answers import Part, rows_of, within
from analysis.report.study.pooled import Pooled
from analysis.report.text import markdown


def questions(parts: Sequence[Part], over_bases: Sequence[Pooled], folder: Path) -> list[str]:
    """Render every question with its answers, first those at whole scales.

    Args:
        folder: of the page, from which links lead to the answers.
    """
    by_question: dict[str, list[Part]] = {}
    for part in parts:
        by_question.setdefault(part.question["question"], []).append(part)
    out = []
    for text, mine in by_question.items():
        question = mine[0].question
        source = f"Source of the claim: {question['source']}. {question.get('how', '')}".strip()
        out += [f"### {text}", "", source, ""]
        out += [f"**{WITHDRAWN}**: {why}.", ""] if (why := question.get("withdrawn")) else []
        sweep = mine[0].results["sweep"]
        pools = [p for p in over_bases if p.one[0].results["sweep"] == sweep]
        out += [*map(_average, pools), ""] if pools else []
        for part in (p for p in mine if "_" not in p.results["scale"]):
            lead = f"At scale `{part.results['scale']}`, {_trained(part, folder)}:"
            out += [lead, "", *_answer(part, folder)]
        for part in (p for p in mine if "_" in p.results["scale"]):
            name = f"{part.results['scale']}: {', '.join(part.bases)}"
            out += [f"<details><summary>The same at scale {name}</summary>", ""]
            out += [f"Of {_trained(part, folder)}:", "", *_answer(part, folder), "</details>", ""]
    return out


def _average(pool: Pooled) -> str:
    part, v = pool.one
    gated = f"{len(pool.left_out)} not to be judged: {', '.join(pool.left_out)}"
    if pool.estimate.value is None:
        return f"- No average over bases ({gated}): {part.says(v.claim)}"
    without = f" ({gated})" if pool.left_out else ""
    return (
        f"- Average over {', '.join(pool.bases)}{without}: {part.says(v.claim)}; "
        f"{with_interval(pool.estimate)}, margin {within(v)}"
    )


def _trained(part: Part, folder: Path) -> str:
    here = os.path.relpath(part.folder, folder)
    runs = part.results.get("runs", 0)
    # A sweep file may have changed since an early answer: its command is in the history.
    asks = "" if "fingerprint_stamped" in part.question else f", `{part.command}`"
    links = f"([report]({here}/report.md), [table]({here}/table.parquet){asks})"
    return f"{runs:,} runs, {part.trained} {links}"


def _answer(part: Part, folder: Path) -> list[str]:
    return [*(verdict(part, v) for v in part.verdicts), "", *figures(part, folder)]


def verdict(part: Part, v: Verdict) -> str:
    """Render one verdict as an item of a list, with what has to be said beside it."""
    where = f" ({v.group})" if len({w.group for w in part.verdicts}) > 1 else ""
    is_open = v.outcome == "UNDECIDED" and not v.is_withdrawn
    rest = f"; {v.why}" if is_open else f"; {BETTER}" if v.is_better else ""
    rest += f"; needs {v.needed}" if is_open and v.needed else ""
    rest += f"; {EXPLORATORY}: {v.exploratory}" if v.exploratory else ""
    measured = f"measured {with_interval(v.estimate)}, margin {within(v)}"
    notes = [part.read(v), *(part.word(v.claim, k) for k in ("measure", "beside"))]
    beside = "; ".join(filter(None, notes))
    return f"- **{v.shown}**: {part.says(v.claim)}{where}; {measured}{rest}." + (
        f" *{beside}*" if beside else ""
    )


def figures(part: Part, folder: Path) -> list[str]:
    """Render an answer's figures with their captions."""
    out = []
    for name, caption in part.results.get("figures") or []:
        if (part.folder / name).is_file():
            out += [f"![{caption}]({os.path.relpath(part.folder / name, folder)})", ""]
            out += [f"*{caption[0].upper()}{caption[1:]}.*", ""]
    return out


def table(parts: Sequence[Part]) -> list[str]:
    """Render the whole table as Markdown, with claims as sentences and verdicts in bold."""
    head, *rows = rows_of(parts, words=True)
    return markdown([head, *([*r[:4], f"**{r[4]}**", *r[5:]] for r in rows)])

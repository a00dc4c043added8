"""The ledger: every sentence of the study and of its popular summaries, with all verdicts on it.

The sentences are in ledger.yaml. Claims that are not in ledger.yaml but have an answer come last.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from analysis.inference.decide import EXPLORATORY, WITHDRAWN, Verdict
from analysis.inference.estimate import AT_LEAST
from analysis.measures.rows import Row, Setting, pick
from analysis.report.study.answers import WORDS, Answer

SENTENCES = Path(__file__).with_suffix(".yaml")
OUTCOMES = ("SUPPORTED", "REFUTED", BETTER := "REFUTED, being better", "UNDECIDED", WITHDRAWN)
NOT_TESTED = "not tested"
OTHERS = "Other questions"


@dataclass(frozen=True)
class Sentence:
    """One line of the ledger."""

    says: str
    claims: tuple[str, ...]
    """The claims that judge the sentence, as `sweep: claim`; empty: no sweep tests it."""
    note: str = ""
    """A qualification, in parentheses after the sentence."""
    episodes: bool = False
    """Show parameters per episode: the study's claim is about more parameters than episodes."""
    at_most: bool = False
    """Only the upper end of the claim's margin counts."""


def sentences() -> dict[str, list[Sentence]]:
    """Read the sentences of the study and its summaries, by their source (`from`)."""
    found: dict[str, list[Sentence]] = {}
    for block in yaml.safe_load(SENTENCES.read_text()):
        for s in block["sentences"]:
            named = s.pop("claim", ())
            claims = (named,) if isinstance(named, str) else tuple(named)
            found.setdefault(block["from"], []).append(Sentence(claims=claims, **s))
    return found


def ledger(answers: Sequence[Answer]) -> list[list[str]]:
    """Return the ledger's rows, one sentence a row after the head."""
    judged = [(f"{r.sweep}: {v.claim}", r, v) for a in answers for r, v in a.single]
    blocks = sentences()
    named = {claim for block in blocks.values() for s in block for claim in s.claims}
    says = {name: r.says for name, r, _ in judged if name not in named}
    others = [Sentence(f"{text[0].upper()}{text[1:]}", (name,)) for name, text in says.items()]
    episodes = [r for a in answers for r in pick(a.rows, "parameters_an_episode")]
    rows = [["sentence", *WORDS.values()]]
    for title, block in {**blocks, **({OTHERS: others} if others else {})}.items():
        rows.append([f"**{title}**", *("" for _ in Setting)])
        for s in block:
            by_setting: dict[Setting, list[tuple[Row, Verdict]]] = {}
            for name, r, v in judged:
                if name in s.claims:
                    by_setting.setdefault(r.setting, []).append((r, v))
            cells = [_counted(by_setting.get(k, []), s, episodes) for k in Setting]
            untested = [NOT_TESTED, *cells[1:]]
            rows.append([f"{s.says} ({s.note})" if s.note else s.says])
            rows[-1] += cells if by_setting else untested
    return rows


def _counted(
    judged: Sequence[tuple[Row, Verdict]], sentence: Sentence, episodes: Sequence[Row]
) -> str:
    """Count the outcomes in one setting with their scales, confirmatory ones first."""

    def outcome(v: Verdict) -> str:
        if v.is_withdrawn:
            return WITHDRAWN
        if not sentence.at_most:
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
    if sentence.episodes and (known := [x for r, _ in judged for x in of_lowest(r, episodes)]):
        shown = dict.fromkeys(f"{float(f'{x:.2g}'):,g}" for x in (min(known), max(known)))
        lines.append(f"at {' to '.join(shown)} parameters an episode")
    return "<br>".join(lines)


def of_lowest(r: Row, episodes: Sequence[Row]) -> list[float]:
    """Return the parameters per sampled completion of the lowest rank in a row's task."""
    mine = [e for e in pick(episodes, sweep=r.sweep, scale=r.scale) if e.task == r.task]
    return [float(e.estimate.value or 0) for e in mine if e.rank == min(m.rank for m in mine)]

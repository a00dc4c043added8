"""The ledger: every sentence of the study and of its popular summaries, and what became of it.

The sentences lie in ledger.yaml. Claims with an answer that are not named there follow them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from analysis.inference.estimate import AT_LEAST, EXPLORATORY, WITHDRAWN, Verdict
from analysis.report.study.answers import Part
from analysis.report.study.setting import WORDS, Setting
from analysis.report.text import markdown

SENTENCES = Path(__file__).with_suffix(".yaml")
OUTCOMES = ("SUPPORTED", "REFUTED", BETTER := "REFUTED, being better", "UNDECIDED", WITHDRAWN)
NOT_TESTED = "not tested"
OTHERS = "Other questions"


@dataclass(frozen=True)
class Sentence:
    """One line of the ledger."""

    says: str
    claims: tuple[str, ...]
    """`sweep: claim` of all that judge it; empty: no sweep asks it."""
    note: str = ""
    """What else has to be known of it."""
    episodes: bool = False
    """The study says so of more parameters than episodes: show how many there were."""
    at_most: bool = False
    """It states an upper bound: of its claim's margin only the upper end counts."""


def sentences() -> dict[str, list[Sentence]]:
    """Read the sentences of the study and its summaries, by where they come from."""
    return {
        block["from"]: [
            Sentence(**{"claims": _claims(s.pop("claim", None)), **s}) for s in block["sentences"]
        ]
        for block in yaml.safe_load(SENTENCES.read_text())
    }


def _claims(named: str | list[str] | None) -> tuple[str, ...]:
    return (named,) if isinstance(named, str) else tuple(named or ())


def ledger(parts: Sequence[Part]) -> list[str]:
    """Render the ledger as a Markdown table, one sentence a line."""
    blocks = sentences()
    named = {claim for block in blocks.values() for s in block for claim in s.claims}
    blocks[OTHERS] = [
        Sentence(f"{says[0].upper()}{says[1:]}", (claim,))
        for claim, says in _judged(parts).items()
        if claim not in named
    ]
    rows = [["sentence", *WORDS.values()]]
    for title, block in blocks.items():
        rows += [[f"**{title}**", *("" for _ in Setting)]] if block else []
        rows += [[f"{s.says} ({s.note})" if s.note else s.says, *_cells(parts, s)] for s in block]
    return markdown(rows)


def _judged(parts: Sequence[Part]) -> dict[str, str]:
    return {_name(part, v): part.says(v.claim) for part in parts for v in part.single}


def _name(part: Part, v: Verdict) -> str:
    return f"{part.results['sweep']}: {v.claim}"


def _cells(parts: Sequence[Part], sentence: Sentence) -> list[str]:
    """Return what was found in each setting, or that nothing was."""
    by_setting: dict[Setting, list[tuple[Part, Verdict, str]]] = {}
    conditions: dict[Setting, list[float]] = {}
    for part in parts:
        for v in part.single:
            if _name(part, v) in sentence.claims:
                setting = part.setting(v.group)
                by_setting.setdefault(setting, []).append((part, v, _outcome(v, sentence)))
                if sentence.episodes and (ratio := part.parameters_an_episode(v)) is not None:
                    conditions.setdefault(setting, []).append(ratio)
    if not by_setting:
        return [NOT_TESTED, *("" for _ in list(Setting)[1:])]
    return [_cell(by_setting.get(s, [])) + _condition(conditions.get(s, [])) for s in Setting]


def _condition(ratios: Sequence[float]) -> str:
    """Say how many parameters there were for each episode; empty without any."""
    if not ratios:
        return ""
    shown = (f"{float(f'{v:.2g}'):,g}" for v in (min(ratios), max(ratios)))
    return f"<br>at {' to '.join(dict.fromkeys(shown))} parameters an episode"


def _outcome(v: Verdict, sentence: Sentence) -> str:
    if v.is_withdrawn:
        return WITHDRAWN
    return _at_most(v) if sentence.at_most else BETTER if v.is_better else v.outcome


def _at_most(v: Verdict) -> str:
    """Judge a claim by the upper end of its margin alone."""
    e = v.estimate
    if v.gates or e.low is None or e.high is None or AT_LEAST in e.flags:
        return "UNDECIDED"
    most = v.margin[1]
    return "SUPPORTED" if e.high <= most else "REFUTED" if e.low > most else "UNDECIDED"


def _cell(found: Sequence[tuple[Part, Verdict, str]]) -> str:
    """Count the outcomes of one sentence in one setting, with the scales that they hold for.

    Confirmatory outcomes stand first, then the exploratory ones.
    """
    by_mark: dict[bool, list[tuple[Part, str]]] = {}
    for part, v, outcome in found:
        by_mark.setdefault(_explores(v), []).append((part, outcome))
    lines = []
    for explores, mine in sorted(by_mark.items(), key=lambda item: item[0]):
        counts = Counter(outcome for _, outcome in mine)
        n = f" {{}} of {len(mine)}" if len(mine) > 1 else ""
        words = ", ".join(f"**{o}**{n.format(counts[o])}" for o in OUTCOMES if counts[o])
        scales = ", ".join(dict.fromkeys(f"`{_scale(part)}`" for part, _ in mine))
        mark = f" ({EXPLORATORY})" if explores else ""
        lines.append(f"{words} at {scales}{mark}")
    return "<br>".join(lines)


def _explores(v: Verdict) -> bool:
    return bool(v.exploratory) and not v.is_withdrawn


def _scale(part: Part) -> str:
    return str(part.results["scale"]).partition("_")[0]

"""The answer of a sweep in sentences: yes, no or open, the number, where it holds, what to do.

quantities.yaml has the quantities in words; what to do stands in the sweep's file.
"""

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from analysis.inference.decide import FAR, REMEDIES, GateCode, Verdict
from analysis.inference.estimate import AT_LEAST, fixed
from analysis.measures.regret import ALLOWED
from analysis.measures.rows import Row, rows_of
from analysis.questions.base import NO_CELL, Analysis, level_of
from analysis.questions.registry import shipped
from analysis.report.study.answers import SHOWN, Show, where, within
from analysis.runs.curves import in_words

QUANTITIES = yaml.safe_load(Path(__file__).with_name("quantities.yaml").read_text())
MOST = 3
"""Number of groups of a claim that texts have sentences for."""
WORDS = {"SUPPORTED": "Yes", "REFUTED": "No", "UNDECIDED": "Open"}
ARMS = {"full": "full fine-tuning", "control": "full fine-tuning of LoRA's matrices"}


def sentences_of(
    found: Analysis, question: Mapping[str, Any], results: Mapping[str, Any], table: pd.DataFrame
) -> list[dict[str, Any]]:
    """Return one object for each verdict on a primary claim; on any claim if none is primary.

    `do`, what to do, is the end of `sentence`. `results`: see `report.results_of`.
    """
    rows = [r for r in rows_of(results, question, table) if r.verdict]
    asked = [r for r in rows if r.verdict.primary] or rows
    names, claims, out = list(question["claims"]), worded(question), []
    places = Counter((r.claim, where(r)) for r in asked)
    for r in sorted(asked, key=lambda r: names.index(r.claim)):
        v, said, place = r.verdict, claims[r.claim], where(r)
        if places[r.claim, place] > 1:
            place = ", ".join(filter(None, (in_words(r.task), r.at)))
        parts = [_answer(r, place, found, question)]
        for cost in (c for c in rows if (c.claim, c.task) == (said.get("cost"), r.task)):
            if _has_number(v) and _has_number(cost.verdict):
                phrase, _ = _in_words(cost, found, question)
                parts.append(phrase[0].upper() + phrase[1:])
        # An exploratory verdict confirms nothing, so it is no reason to act.
        is_open = v.exploratory or v.outcome == "UNDECIDED"
        parts.append(said.get("if_open" if is_open else f"if_{v.outcome.lower()}") or "")
        *before, do = [f"{p.strip().removesuffix('.')}." if p else "" for p in parts]
        one = {"claim": r.claim, "text": r.says, "group": r.task, "outcome": v.outcome, "do": do}
        text = " ".join([*before, do]).strip()
        out.append({**one, "exploratory": bool(v.exploratory), "sentence": text})
    return out


def lines_of(answer: Sequence[Mapping[str, Any]], question: dict[str, Any]) -> list[str]:
    """Return the sentences, of at most MOST groups of a claim, and the level of the intervals."""
    lines = []
    for _, of in itertools.groupby(answer, lambda a: a["claim"]):
        shown = {a["sentence"]: a["do"] for a in of}  # groups may share a reason
        for k, (text, do) in enumerate([*shown.items()][:MOST], 1):
            again = do in [*shown.values()][k:MOST]  # said once for several groups
            lines.append(text.removesuffix(do).strip() if again else text)
        lines += [f"And {len(shown) - MOST} more in the table."] * (len(shown) > MOST)
    return [*lines, f"Brackets: {100 * level_of(question):.3g}% intervals."] if lines else []


def worded(question: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the claims; what one lacks is filled from the same claim of the shipped sweep."""
    known, out = shipped(question["name"]).get("claims", {}), {}
    for name, claim in question["claims"].items():
        same = known.get(name, {}) if known.get(name, {}).get("text") == claim.get("text") else {}
        own = {k: v for k, v in claim.items() if v}
        out[name] = {"text": name.replace("_", " "), **same, **own}
    return out


def _answer(r: Row, place: str, found: Analysis, question: Mapping[str, Any]) -> str:
    """Say yes, no or open, with the number and its place."""
    v, claim, begin, end = r.verdict, f'"{r.says}"', f"{WORDS[r.verdict.outcome]}:", ""
    if v.is_withdrawn:
        why = str(v.gates[0].subject).partition(", ")[0]
        return f"Open: {claim} is not decided. The answer is withdrawn: {why}"
    if v.exploratory:
        begin = f"Exploratory: {WORDS[v.outcome].lower()},"
        end = f". It is exploratory: {v.exploratory}"
    why = re.sub(r"\blora r(\d+)", r"LoRA rank \1", v.why.replace("fullft", ARMS["full"]))
    why = in_words(why).replace("_", " ")
    if v.needed not in ("", REMEDIES[GateCode.ELSEWHERE]):
        why += f". Needed: {v.needed}"
    if not _has_number(v):
        at = "" if r.task == NO_CELL else f" on {place}"
        return f"{begin} {claim} is not decided{at}: {why}{end}"
    phrase, margin = _in_words(r, found, question)
    end = (", and this is better" * v.is_better) + end
    end = f". Not decided: {why}{end}" if v.outcome == "UNDECIDED" else end
    return f"{begin} on {place} {phrase}; {margin} counts as agreement with {claim}{end}"


def _has_number(v: Verdict) -> bool:
    """Return whether a sentence may state the estimate: nothing forbids to judge it."""
    known = v.estimate.value is not None and v.estimate.has_interval()
    return known and not (v.outcome == "UNDECIDED" and v.gates)


def _in_words(r: Row, found: Analysis, question: Mapping[str, Any]) -> tuple[str, str]:
    """Return a row's quantity with its number and interval in words, and the claim's margin."""
    declared = question.get("estimands") or shipped(question["analysis"]).get("estimands", {})
    said, gain, e = declared.get(r.quantity, {}), _gain(found, r.task), r.estimate
    kind = said.get("measure", r.quantity)
    if kind.startswith("over_allowed") and not (gain and gain > 0):
        kind = "over_allowed in nats"
    key = max((k for k in QUANTITIES if kind.startswith(k)), key=len, default="")
    entry = QUANTITIES.get(key, {"says": "{measure}: {n}"})
    shows: dict[str, Show] = {**SHOWN, "factor": (float, lambda v: fixed(v, 2), "")}
    shows["gain"] = (lambda v: 100 * (ALLOWED + v / gain), lambda v: fixed(v, 1), "%")
    to, write, unit = shows[entry.get("show", "plain")]
    least, most = r.verdict.margin
    low, high = (float(write(to(v))) for v in (max(least, -FAR), min(most, FAR)))  # far: open
    margin = f"{low:g}{unit} and more" if high >= FAR else f"{within((low, high))}{unit}"
    n = f"{'at least ' * (AT_LEAST in e.flags)}{write(to(e.value))}{unit}"
    n += f" [{', '.join(write(to(v)) for v in e.interval)}]" if e.low != e.high else ""
    of, over = _arm(said.get("of", {})), _arm(said.get("over", "full"))
    words = {"times": said.get("times"), "measure": r.asked.get("measure") or r.quantity}
    return entry["says"].format(n=n, of=of, over=over, **words), margin


def _arm(arm: str | Mapping[str, Any]) -> str:
    """Name an arm of a declared estimand in words."""
    if isinstance(arm, str):
        return ARMS.get(arm, f"LoRA (variant {arm})")
    rank, layers = arm.get("rank"), arm.get("layers")
    name = f"LoRA of rank {rank}" if isinstance(rank, int) else "LoRA"
    of = str(layers).replace("+", " and ").replace("mlp", "MLP")
    of = f"the {of} matrices" if of in ("fewest", "most") else of
    return f"{name} on {of}" if layers else name


def _gain(found: Analysis, group: str) -> float | None:
    """Return how much full fine-tuning lowers the loss in a group, if it is one curve; in nats."""
    if arms := found.measures.get("arms"):  # of a search, whose curves may be of validation rows
        return next((arm["gain"] for arm in arms if arm["method"] == "fullft"), None)
    full = [o for o in found.members.get(group, ()) if o.curve.is_full and o.best_nll is not None]
    return full[0].curve.nll_start - full[0].best_nll if len(full) == 1 else None

"""The answer in sentences (quantities.yaml): yes, no or open, the number, its place, what to do."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from analysis.inference.decide import FAR, REMEDIES, GateCode, Verdict
from analysis.inference.estimate import AT_LEAST, fixed
from analysis.inference.rows import Row, rows_of
from analysis.measures.regret import ALLOWED
from analysis.questions.base import NO_CELL, Analysis, level_of
from analysis.questions.cells import measured_by
from analysis.questions.registry import shipped
from analysis.report.study.answers import SHOWN, Show, where, within
from analysis.runs.curves import in_words

QUANTITIES = yaml.safe_load(Path(__file__).with_name("quantities.yaml").read_text())
MOST = 3
"""Number of groups of a claim that texts have sentences for."""
WORDS = {"SUPPORTED": "Yes", "REFUTED": "No", "UNDECIDED": "Open"}
NAMED = ("method", "rank", "min_rank", "layers", "like")
ARMS = {"full": "full fine-tuning", "control": "full fine-tuning of LoRA's matrices"}


def sentences_of(
    found: Analysis, question: Mapping[str, Any], results: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return one object for each verdict on a primary claim; on any claim if none is primary.

    Claims that are about no run are left out, unless all are.

    `do`, what to do, is the end of `sentence`. `results`: see `report.results_of`.
    """
    rows = [r for r in rows_of(results, question) if r.verdict]
    asked = [r for r in rows if r.verdict.primary] or rows
    asked = [r for r in asked if not r.verdict.not_asked] or asked  # the table names them
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
        outcome = "open" if is_open else "supported" if v.is_better else v.outcome.lower()
        parts.append(said.get(f"if_{outcome}") or "")
        *before, do = [f"{p.strip().removesuffix('.')}." if p else "" for p in parts]
        one = {"claim": r.claim, "text": r.says, "group": r.task, "outcome": v.outcome, "do": do}
        text = " ".join([*before, do]).strip()
        out.append({**one, "exploratory": bool(v.exploratory), "sentence": text})
    return out


def lines_of(answer: Sequence[Mapping[str, Any]], question: dict[str, Any]) -> list[str]:
    """Return the sentences, of at most MOST groups of a claim, and the level of the intervals."""
    lines = []
    for _, of in itertools.groupby(answer, lambda a: a["claim"]):
        shown = [*{a["sentence"]: a for a in of}.values()]  # groups may share a reason
        for k, a in enumerate(shown[:MOST], 1):
            again = a["do"] in [b["do"] for b in shown[k:MOST]]  # said once for several groups
            lines.append(a["sentence"].removesuffix(a["do"] if again else "").strip())
        rest = Counter(WORDS[a["outcome"]].lower() for a in shown[MOST:])
        said = ", ".join(f"{n} {word}" for word, n in rest.items())
        lines += [f"And {rest.total()} more in the table: {said}."] * bool(rest)
    return [*lines, f"Brackets: {100 * level_of(question):.3g}% intervals."] if lines else []


def cautions_of(found: Analysis, table: pd.DataFrame) -> list[str]:
    """Return a sentence for each reason to doubt an answer that rests on foreign trainers."""
    if "trainer" not in table or not (foreign := table[table["trainer"].notna()]).size:
        return []
    out = list[str]()
    if "doubt" in foreign:
        why = foreign["doubt"].dropna().map(lambda text: text.partition(" (")[0])
        for said, runs in why.groupby(why):
            ids = foreign.loc[runs.index, "run_id"]
            out.append(f"Doubtful: {len(ids)} of {len(foreign)} runs ({', '.join(ids)}): {said}")
    for c in (o.curve for o in found.optima if o.curve.key.get("trainer") in {*foreign["trainer"]}):
        y = c.y[np.isfinite(c.y)]
        if len(y) and (y >= c.nll_start).all():
            name = f"{c.group}, {c.name.replace('fullft', ARMS['full'])}"
            out.append(f"{name}: above the base's loss at each of its learning rates.")
    who = ", ".join(sorted({*foreign["trainer"]}))
    out.append(
        f"Trained by {who}: losses are measured by lorasweep; which rows, base, optimizer and "
        "settings the program used cannot be checked beyond docs/trainers.md."
    )
    return out


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
        why = str(v.gates[0].subject).partition(". ")[0]
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
    own, gain, e = declared.get(r.quantity, {}), _gain(found, r.task), r.estimate
    said = measured_by(own.get("every_task", r.quantity), declared)
    kind = said.get("measure", "" if own else r.quantity)
    kind = "speed of two arms" if kind == "speed" and said.get("over") != "full" else kind
    if kind.startswith("over_allowed") and not (gain and gain > 0):
        kind = "over_allowed in nats"
    key = max((k for k in QUANTITIES if kind.startswith(k)), key=len, default="")
    entry = QUANTITIES.get(key, {"says": "{measure}: {n}"})
    wording = "{measure}: {n}" if "difference" in own else entry["says"]
    gained: Show = (lambda v: 100 * (ALLOWED + v / gain), lambda v: fixed(v, 1), "%")
    to, write, unit = {**SHOWN, "gain": gained}[entry.get("show", "plain")]
    far = FAR if to is float else 10.0  # an end from there on is open
    low, high = (
        k * math.inf if k * v >= far else v if to is float else float(write(to(v)))
        for k, v in zip((-1, 1), r.verdict.margin)
    )
    margin = within((low, high), math.inf, unit)
    n = f"{'at least ' * (AT_LEAST in e.flags)}{write(to(e.value))}{unit}"
    n += f" [{', '.join(write(to(v)) for v in e.interval)}]" if e.low != e.high else ""
    of, over = _arm(said.get("of", {})), _arm(said.get("over", "full"))
    times = said.get("times")
    times = "The law's ratio" if isinstance(times, Mapping) else f"{times}"
    words = {"times": times, "measure": r.asked.get("measure") or r.quantity}
    at = f", on the task where this is {own['worst']}imal" if "worst" in own else ""
    return own.get("says", wording).format(n=n, of=of, over=over, **words) + at, margin


def _arm(arm: str | Mapping[str, Any]) -> str:
    """Name an arm of a declared estimand in words."""
    if isinstance(arm, str):
        return ARMS.get(arm, f"LoRA (variant {arm})")
    rank, layers = arm.get("rank"), arm.get("layers")
    name = {"lora": "LoRA", "fullft": ARMS["full"]}.get(m := arm.get("method", "lora"), m)
    name += f" of rank {rank}" * isinstance(rank, int)
    of = str(layers).replace("+", " and ").replace("mlp", "MLP")
    of = f"the {of} matrices" if of in ("fewest", "most") else of
    rest = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in arm.items() if k not in NAMED)
    return name + f" on {of}" * bool(layers) + f" ({rest})" * bool(rest)


def _gain(found: Analysis, group: str) -> float | None:
    """Return how much full fine-tuning lowers the loss in a group, if it is one curve; in nats."""
    if arms := found.search.get("arms"):  # of a search, whose curves may be of validation rows
        return next((arm["gain"] for arm in arms if arm["method"] == "fullft"), None)
    full = [o for o in found.members.get(group, ()) if o.curve.is_full and o.best_nll is not None]
    return full[0].curve.nll_start - full[0].best_nll if len(full) == 1 else None

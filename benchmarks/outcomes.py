"""Compare the adviser's predictions with published outcomes, and write the page.

For each row, the adviser's rules leave out the source of that row, and the kept answers of this
project (no kept answer is about these models).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.harness import RESULTS, render
from lorasweep.advise.advice import advise
from lorasweep.advise.read import customer_of
from lorasweep.advise.rules import STEP, Advice, Known, rate_of
from lorasweep.config import catalogue
from lorasweep.config.catalogue import conf_dir

TARGET = RESULTS / "advice" / "README.md"
OUTCOMES = Path(__file__).with_name("outcomes.yaml")
SAYS = {"met": "close", "missed": "behind", "unknown": "open"}
"""State of the adviser's first condition (capacity for what is new) -> predicted outcome."""
OUTCOME_HEAD = "source|setting|model|rank|published|adviser|load|verdict"
RATE_HEAD = "source|model|task|method|published best|adviser|verdict"


class Judged(NamedTuple):
    """One published row and the adviser's prediction for it."""

    entry: dict[str, Any]
    advice: Advice
    says: str
    verdict: str
    """hit, miss or open."""


@cache
def read() -> dict[str, Any]:
    """Read outcomes.yaml."""
    return yaml.safe_load(OUTCOMES.read_text())


@cache
def _known() -> Known:
    folders = [conf_dir()]
    return Known(catalogue.models(folders), catalogue.machines(folders))


def _advice(entry: dict[str, Any]) -> Advice:
    """Return the adviser's answer to a row, without the row's source."""
    kept: dict[str, Any] = {}
    for name, found in _known().published.items():
        if isinstance(found, list):
            found = [e for e in found if e["source"] != entry["source"]]
        own = isinstance(found, dict) and found.get("source") == entry["source"]
        kept[name] = None if own else found
    world = replace(_known(), published=kept)
    shape = read()["shapes"].get(entry["customer"]["model"], {})
    c = customer_of({"name": entry["source"], **entry["customer"], **shape})
    return advise(c, world)


def outcomes() -> Iterator[Judged]:
    """Judge every published outcome of LoRA at a rank."""
    for entry in read()["outcomes"]:
        advice = _advice(entry)
        says = SAYS[advice.conditions[0]["state"]]
        verdict = "open" if says == "open" else "hit" if says == entry["came"] else "miss"
        yield Judged(entry, advice, says, verdict)


def rates() -> Iterator[Judged]:
    """Judge for every published best LR whether it lies in the adviser's interval."""
    for entry in read()["rates"]:
        advice = _advice(entry)
        found = rate_of(advice, entry["method"])
        verdict = "hit" if found.low <= entry["rate"] <= found.high else "miss"
        says = f"{found.rate:.2g} ({found.low:.2g} to {found.high:.2g})"
        yield Judged(entry, advice, says, verdict)


# ---------------------------------------------------------------- the page


def page() -> str:
    """Return the page in Markdown."""
    judged, found = list(outcomes()), list(rates())
    names = _known().published["sources"] | read()["sources"]
    used = dict.fromkeys(j.entry["source"] for j in judged + found)
    outcome_rows, rate_rows = [OUTCOME_HEAD.split("|")], [RATE_HEAD.split("|")]
    for j in judged:
        e, c = j.entry, j.entry["customer"]
        setting = [e["source"], e["what"], c["model"], str(c["rank"]), f"{e['came']}: {e['said']}"]
        said = [j.says, j.advice.conditions[0]["why"], _shown(j.verdict)]
        outcome_rows.append([*setting, *said])
    for j in found:
        e, c = j.entry, j.entry["customer"]
        setting = [e["source"], c["model"], c["task"], e["method"], f"{e['rate']:.2g}"]
        rate_rows.append([*setting, j.says, _shown(j.verdict)])
    return render(
        "outcomes",
        step=STEP,
        outcome_count=_count(judged),
        outcomes=outcome_rows,
        rate_count=_count(found),
        rates=rate_rows,
        not_judged=read()["not_judged"],
        sources={key: names[key] for key in used},
    )


def _count(judged: list[Judged]) -> str:
    hits, misses, left = (sum(j.verdict == v for j in judged) for v in ("hit", "miss", "open"))
    rest = f", {left} left open" if left else ""
    return f"Of {len(judged)} rows {hits} are hits, {misses} misses{rest}."


def _shown(verdict: str) -> str:
    return f"**{verdict}**" if verdict == "miss" else verdict


def main(arguments: Sequence[str] = ()) -> None:
    """Write the page."""
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(page())

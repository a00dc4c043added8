"""Hold the adviser against outcomes that others published, and write the page.

Each row is judged without its own source in the rules, and without the kept answers of this
project, none of which is about these models.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lorasweep.config import catalogue
from lorasweep.config.folders import conf_dir
from lorasweep.customers.advice import Advice, advise
from lorasweep.customers.evidence import Case, Known, Trace
from lorasweep.customers.read import customer_of
from lorasweep.customers.rules.rates import STEP, Rate, rate_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "analysis" / "results" / "advice" / "README.md"
OUTCOMES = Path(__file__).with_name("outcomes.yaml")
SAYS = {"met": "close", "missed": "behind", "unknown": "open"}
"""What a rank is expected to come to, by the state of its room for what is new."""


class Judged(NamedTuple):
    """One published row and what the adviser says of it."""

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


def _advice(entry: dict[str, Any]) -> tuple[Advice, Known]:
    """Return the adviser's answer to a row, and what it knew: all but the row's source."""
    world = replace(_known(), published=_known().published.without([entry["source"]]))
    shape = read()["shapes"].get(entry["customer"]["model"], {})
    c = customer_of({"name": entry["source"], **entry["customer"], **shape})
    return advise(c, world), world


def outcomes() -> Iterator[Judged]:
    """Judge every published outcome of LoRA at a rank."""
    for entry in read()["outcomes"]:
        advice, _ = _advice(entry)
        says = SAYS[advice.conditions[0].state]
        verdict = "open" if says == "open" else "hit" if says == entry["came"] else "miss"
        yield Judged(entry, advice, says, verdict)


def rates() -> Iterator[Judged]:
    """Judge every published best rate: whether it lies in the adviser's interval."""
    for entry in read()["rates"]:
        advice, world = _advice(entry)
        found = _rate(advice, world, entry["method"])
        verdict = "hit" if found.low <= entry["rate"] <= found.high else "miss"
        says = f"{found.rate:.2g} ({found.low:.2g} to {found.high:.2g})"
        yield Judged(entry, advice, says, verdict)


def _rate(advice: Advice, world: Known, method: str) -> Rate:
    case = Case(advice.customer, advice.model, world, Trace())
    return rate_of(case, method, advice.choice.rank, advice.work)


# ---------------------------------------------------------------- the page


def page() -> str:
    """Return the page in Markdown."""
    methods, found = list(outcomes()), list(rates())
    lines = [
        "# The adviser against published outcomes",
        "",
        "Each row is judged without its own source in the rules, and without this project's own "
        "answers. What the rules take from others is in `lorasweep/customers/published.yaml`; "
        "these "
        "rows are in `lorasweep/bench/outcomes.yaml`. They were chosen before the adviser was "
        "held against them, though no commit shows it. The rules of method and rank were not "
        "changed after; the interval of the rate was: it was the sources' disagreement alone, and "
        f"7 of 10 best rates lay outside, so it now reaches a factor {STEP:g} further each way, of "
        "which these rows are no test. Each row is one team's runs, most "
        "of them of one seed.",
        "",
        "## Does LoRA keep up?",
        "",
        _count(methods),
        "",
        "Close: no worse, within what the source calls noise, or within 0.005 nats. The adviser "
        "says close where the load of that rank is surely at most 0.5, behind where it is surely "
        "above 1, else open. Lengths that are not stated are the adviser's assumption.",
        "",
        "| source | setting | model | rank | published | adviser | load | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [_outcome_row(j) for j in methods]
    lines += [
        "",
        "## Best learning rates",
        "",
        _count(found),
        "",
        "The sweep of tinker-cookbook has rates 2.5 to 3.3 apart, so its best rates are known to "
        "about a factor 2 each way.",
        "",
        "| source | model | task | method | published best | adviser | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_rate_row(j) for j in found]
    lines += ["", "## Not judged", "", "How much was trained on is not stated.", ""]
    lines += [f"- {e['what']}: {e['said']}" for e in read()["not_judged"]]
    return "\n".join([*lines, *_sources(methods + found)]) + "\n"


def _count(judged: list[Judged]) -> str:
    counts = {v: sum(j.verdict == v for j in judged) for v in ("hit", "miss", "open")}
    return (
        f"Of {len(judged)} rows {counts['hit']} are hits, {counts['miss']} misses"
        + (f", {counts['open']} left open" if counts["open"] else "")
        + "."
    )


def _shown(verdict: str) -> str:
    return f"**{verdict}**" if verdict == "miss" else verdict


def _outcome_row(j: Judged) -> str:
    e, c = j.entry, j.entry["customer"]
    state = j.advice.conditions[0].why
    return (
        f"| {e['source']} | {e['what']} | {c['model']} | {c['rank']} | {e['came']}: {e['said']} | "
        f"{j.says} | {state} | {_shown(j.verdict)} |"
    )


def _rate_row(j: Judged) -> str:
    e, c = j.entry, j.entry["customer"]
    return (
        f"| {e['source']} | {c['model']} | {c['task']} | {e['method']} | {e['rate']:.2g} | "
        f"{j.says} | {_shown(j.verdict)} |"
    )


def _sources(judged: list[Judged]) -> list[str]:
    names = _known().published.values["sources"] | read()["sources"]
    used = dict.fromkeys(j.entry["source"] for j in judged)
    lines = ["", "## Sources", "", *(f"- {key}: {names[key]}" for key in used), ""]
    return [*lines, "Command: `python -m lorasweep.bench.outcomes_page`"]


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())

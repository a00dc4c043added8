"""Format advice as cells of a table, and as a page in HTML from `templates/`.

The template engine escapes HTML. `plain_text` escapes Markdown in texts of customers.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from lorasweep.advise.advice import Advice, totals
from lorasweep.advise.evidence import Sure, shown
from lorasweep.advise.read import Failed
from lorasweep.errors import check_installed
from lorasweep.plan.planner import MEMORY_ERROR, SPEED_ERROR

METHODS = {"lora": "LoRA", "full": "full", "open": "undecided"}
HEAD = (
    *("customer", "model", "method", "rank", "learning rate", "largest batch", "load", "GPUs"),
    *("hours", "dollars", "GiB per GPU, LoRA", "GiB per GPU, full", "warnings"),
)
NUMBERS = ("rank", "largest batch", "load", *HEAD[8:])
BASIS = (
    "Memory and time are computed from shapes and data sheets. Of published figures, nine in ten "
    f"lie within {MEMORY_ERROR:.0%} of the memory and {SPEED_ERROR:.0%} of the time. Method, rank "
    "and learning rate follow published rules, which disagree; measured regret covers small "
    "models only. Load is the information in the data, in bits, over 2 bits for each trained "
    "parameter. Where the method is undecided, search on the customer's rows: +sweep=tune."
)


def short(value: float | None) -> str:
    """Format a number; None becomes '?'."""
    return "?" if value is None else shown(float(value))


def amount(value: float | None) -> str:
    """Format hours or dollars."""
    return "<0.01" if value is not None and value < 0.01 else short(value)


def counted(counts: Mapping[str, int | None]) -> str:
    """Format the number measured, and if known the total: '10 of 200'."""
    of = "" if counts["all"] is None else f" of {counts['all']:,}"
    return f"{counts['measured']:,}{of}"


@cache
def _environment() -> Any:
    check_installed("jinja2", "a plan for GPUs, or a page or card of customers")
    import jinja2  # takes a moment to load

    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*Path(__file__).parents[1].glob("*/templates")]),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters: dict[str, Any] = {"short": short, "amount": amount, "shown": shown, "counted": counted}
    found.filters |= {**filters, "repr": repr, "dollars": "${:,.0f}".format, "json": json.dumps}
    return found


def render(template: str, **values: Any) -> str:
    """Render a file of `templates/`."""
    return _environment().get_template(template).render(**values)


def printable(text: str) -> str:
    """Replace control characters, which a terminal would obey."""
    return "".join(ch if ch.isprintable() else "?" for ch in text)


def plain_text(text: str) -> str:
    """Escape Markdown."""
    for mark in "\\`*_[]|":
        text = text.replace(mark, "\\" + mark)
    return escape(" ".join(text.split()), quote=False)


def name_of(found: Advice | Failed) -> str:
    """Return a customer's name, else the place of its row."""
    return found.name or (found.where if isinstance(found, Failed) else "")


def cells(advice: Advice | Failed) -> list[str]:
    """Return the customer's row of the table with the columns HEAD."""
    if isinstance(advice, Failed):
        return [name_of(advice), "", "error", *[""] * (len(HEAD) - 3)]
    p = advice.plain()
    memory = []  # of each GPU, and their number if it is not one
    for method in ("lora", "full"):
        gpus = p[f"gpus_{method}"] or 1
        memory.append(short(p[f"peak_gib_{method}"]) + f" (x {gpus})" * (gpus > 1))
    return [
        p["name"],
        p["model"],
        METHODS[p["method"]],
        str(p["rank"]) if p["method"] != "full" else "-",
        f"{p['lr']:.1e} ({p['lr_low']:.1e} to {p['lr_high']:.1e})",
        f"{p['batch_size_max']:,}",
        short(p["load"]),
        f"{p['gpus'] or '?'} x {p['gpu']}",
        amount(p["hours"]),
        amount(p["cost_usd"]),
        *memory,
        str(len(p["warnings"])),
    ]


def summary_lines(found: Sequence[Advice | Failed]) -> list[str]:
    """Return lines with the counts and costs of all customers."""
    t = totals(found)
    return render("summary.txt", t=t, comparable=_comparable(t)).splitlines()


def _comparable(t: Mapping[str, Any]) -> str:
    whom = "1 customer" if t["comparable"] == 1 else f"{t['comparable']} customers"
    return f"The {whom} for whom both methods fit and have a price"


def html(found: Sequence[Advice | Failed], title: str) -> str:
    """Return the page in HTML: one file without scripts."""
    t = totals(found)
    good = [a for a in found if isinstance(a, Advice)]
    numbers = {(r.name, r.source, r.sure) for a in good for r in a.reasons.values()}
    states = {(c.name, e, c.sure) for a in good for c in a.conditions for e in c.evidence}
    cards = []
    for a in found:
        card: dict[str, Any] = {"name": name_of(a), "kind": "error", "answer": a}
        if isinstance(a, Advice):
            measured = "bits" in a.reasons and a.reasons["bits"].sure is Sure.MEASURED
            card |= {"kind": a.choice.method, "p": a.plain(), "measured": measured}
        cards.append(card)
    return render(
        "advice.html",
        title=title,
        basis=BASIS,
        totals=t,
        comparable=_comparable(t),
        head=HEAD,
        numbers=NUMBERS,
        rows=[cells(a) for a in found],
        cards=cards,
        sources=[
            ("Sources", [": ".join(e) for e in sorted(numbers)]),
            ("Kept results", [": ".join(e) for e in sorted(states)]),
        ],
    )

"""Format advice as cells of a table, and as a page in HTML from `templates/`.

The template engine escapes HTML. `plain_text` escapes Markdown in texts of customers.
"""

import json
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path
from shlex import quote
from typing import Any

from lorasweep.advise.advice import plain_of, totals
from lorasweep.advise.read import RowError
from lorasweep.advise.rules import Advice, shown
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
    "parameter. Where the method is undecided, search on the customer's rows: lorasweep tune."
)


def short(value: float | None) -> str:
    """Format a number; None becomes '?'."""
    return "?" if value is None else shown(float(value))


def amount(value: float | None) -> str:
    """Format hours or dollars."""
    return "<0.01" if value is not None and value < 0.01 else short(value)


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
    filters: dict[str, Any] = {"short": short, "amount": amount, "shown": shown, "repr": repr}
    found.filters |= {**filters, "dollars": "${:,.0f}".format, "json": json.dumps, "sh": quote}
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


def cells(advice: Advice | RowError) -> list[str]:
    """Return the customer's row of the table with the columns HEAD."""
    if isinstance(advice, RowError):
        return [advice.name or advice.where, "", "error", *[""] * (len(HEAD) - 3)]
    a, chosen = advice, advice.chosen
    memory = []  # of each GPU, and their number if it is not one
    for arm in (a.lora, a.full):
        memory.append(short(arm.peak_gib) + f" (x {arm.gpus})" * ((arm.gpus or 1) > 1))
    return [
        a.name,
        a.model.name,
        METHODS[a.method],
        str(a.rank) if a.method != "full" else "-",
        f"{a.rate.rate:.1e} ({a.rate.low:.1e} to {a.rate.high:.1e})",
        f"{a.largest_batch:,}",
        short(a.load),
        f"{chosen.gpus or '?'} x {a.hardware.name}",
        amount(chosen.hours),
        amount(chosen.cost_usd),
        *memory,
        str(len(a.warnings)),
    ]


def html(found: Sequence[Advice | RowError], title: str) -> str:
    """Return the page in HTML: one file without scripts."""
    rows = [cells(a) for a in found]
    kinds = [a.method if isinstance(a, Advice) else "error" for a in found]
    cards = [*zip(found, kinds, map(plain_of, found), (row[0] for row in rows))]
    words: dict[str, Any] = {"basis": BASIS, "totals": totals(found), "rows": rows, "cards": cards}
    return render("advice.html", title=title, head=HEAD, numbers=NUMBERS, **words)

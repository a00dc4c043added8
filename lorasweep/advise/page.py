"""The answers for people: a table for the terminal, a page in Markdown, and one in HTML."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lorasweep.advise.advice import Advice, Failed, totals
from lorasweep.advise.trace import Reason, Sure, shown
from lorasweep.plan.placement import MEMORY_ERROR, SPEED_ERROR

TEMPLATE = Path(__file__).with_name("page.html")
METHODS = {"lora": "LoRA", "full": "full", "open": "open"}
HEAD = (
    *("customer", "model", "method", "rank", "rate", "batch up to", "load", "GPUs"),
    *("hours", "dollars", "GiB LoRA", "GiB full", "warnings"),
)
NUMBERS = ("rank", "batch up to", "load", "hours", "dollars", "GiB LoRA", "GiB full", "warnings")
BASIS = (
    "Memory and time are computed from shapes and data sheets: nine in ten published figures "
    "lie within "
    f"{MEMORY_ERROR:.0%} and {SPEED_ERROR:.0%}. Method, rank and rate rest on published rules, "
    "which "
    "disagree; the map of measured regret covers only the small models it was measured on. Load "
    "is bits "
    "of what is new over 2 bits for each trained parameter. Open means: not settled, run a sweep "
    "(write_sweep=NAME)."
)


def cells(advice: Advice | Failed) -> list[str]:
    """Return the row of a table, under HEAD."""
    if isinstance(advice, Failed):
        return [advice.name or advice.where, "", "error", *[""] * (len(HEAD) - 3)]
    p = advice.plain()
    return [
        p["name"],
        p["model"],
        METHODS[p["method"]],
        str(p["rank"]) if p["method"] != "full" else "-",
        f"{p['lr']:.1e} ({p['lr_low']:.1e} to {p['lr_high']:.1e})",
        f"{p['batch_size_max']:,}",
        _short(p["load"]),
        f"{p['gpus'] or '?'} x {p['gpu']}",
        _amount(p["hours"]),
        _amount(p["cost_usd"]),
        _short(p["peak_gib_lora"]),
        _short(p["peak_gib_full"]),
        str(len(p["warnings"])),
    ]


def printable(text: str) -> str:
    """Return text as a terminal may show it: without control characters."""
    return "".join(ch if ch.isprintable() else "?" for ch in text)


def _short(value: float | None) -> str:
    return "?" if value is None else shown(float(value))


def _amount(value: float | None) -> str:
    """Return hours or dollars as people count them."""
    return "<0.01" if value is not None and value < 0.01 else _short(value)


def summary_lines(found: Sequence[Advice | Failed]) -> list[str]:
    """Return the portfolio at a glance."""
    t = totals(found)
    lines = [
        f"{t['customers']} customers: {t['lora']} LoRA, {t['full']} full fine-tuning, "
        f"{t['open']} open, "
        f"{t['errors']} with errors",
        f"training as advised: ${t['cost_usd']:,.0f}. {comparable_text(t)}: as advised "
        f"${t['cost_usd_of_these']:,.0f}, LoRA for all ${t['cost_usd_lora']:,.0f}, full "
        f"fine-tuning for all ${t['cost_usd_full']:,.0f}",
        f"serving: {t['serving_gib_lora']:,.0f} GiB as adapters on one base a model, "
        f"{t['serving_gib_full']:,.0f} GiB as copies",
    ]
    return lines


def markdown(found: Sequence[Advice | Failed], title: str) -> str:
    """Return the page in Markdown."""
    lines = [f"# {title}", "", *(f"- {line}" for line in summary_lines(found)), "", BASIS, ""]
    lines += _markdown_table([HEAD, *(cells(a) for a in found)])
    lines += ["", "## Warnings and errors", ""]
    for a in found:
        said = [a.error] if isinstance(a, Failed) else a.trace.warnings
        if said:
            name = a.name or a.where
            lines += [f"- **{plain_text(name)}**", *(f"  - {plain_text(text)}" for text in said)]
    return "\n".join(lines) + "\n"


def plain_text(text: str) -> str:
    """Escape what Markdown would render, in text that customers wrote."""
    for mark in "\\`*_[]|":
        text = text.replace(mark, "\\" + mark)
    return escape(" ".join(text.split()), quote=False)


def _markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(plain_text(c) for c in row) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("---:" if h in NUMBERS else "---" for h in HEAD) + "|")
    return lines


# ---------------------------------------------------------------- HTML


def html(found: Sequence[Advice | Failed], title: str) -> str:
    """Return the page in HTML: one file, without scripts, and every name escaped."""
    t = totals(found)
    body = [f"<h1>{escape(title)}</h1>", *_portfolio(t), *_table(found)]
    body.append("<h2>Customers</h2>")
    for k, a in enumerate(found):
        body += _error_card(k, a) if isinstance(a, Failed) else _card(k, a)
    body += _sources(found)
    return TEMPLATE.read_text().replace("<!--BODY-->", "\n".join(body))


def _portfolio(t: Mapping[str, Any]) -> Iterable[str]:
    names = {"lora": "LoRA", "full": "full", "open": "open", "error": "errors"}
    counts = {"lora": t["lora"], "full": t["full"], "open": t["open"], "error": t["errors"]}
    shares = "".join(
        f'<span class="bg-{k}" style="flex:{n}">{n} {names[k]}</span>'
        for k, n in counts.items()
        if n
    )
    yield f'<div class="share" role="img" aria-label="methods">{shares}</div>'
    yield f'<p class="note">{escape(BASIS)}</p><h2>What each choice costs</h2>'
    yield f'<p class="note">{escape(comparable_text(t))}. All as advised: '
    yield f'${t["cost_usd"]:,.0f}.</p><div class="bars">'
    choices = (
        ("as advised", t["cost_usd_of_these"], "advised", "$"),
        ("LoRA for all", t["cost_usd_lora"], "lora", "$"),
        ("full for all", t["cost_usd_full"], "full", "$"),
    )
    yield from _bars(choices)
    yield "</div><h2>Serving</h2>" + '<div class="bars">'
    served = (
        ("adapters, one base a model", t["serving_gib_lora"], "lora", ""),
        ("copies of the model", t["serving_gib_full"], "full", ""),
    )
    yield from _bars(served, " GiB")
    yield "</div>"


def comparable_text(t: Mapping[str, Any]) -> str:
    """Say which customers choices are compared on."""
    return (
        f"The {t['comparable']} customers for whom both methods have a price (the others do not "
        "say how long to train, or a method fits nowhere)"
    )


def _bars(rows: Iterable[tuple[str, float, str, str]], unit: str = "") -> Iterable[str]:
    given = list(rows)
    most = max((value for _, value, _, _ in given), default=0.0) or 1.0
    for name, value, kind, sign in given:
        yield (
            f'<span>{name}</span><i class="bg-{kind}" style="width:{100 * value / most:.1f}%"></i>'
            f"<b>{sign}{value:,.0f}{unit}</b>"
        )


def _table(found: Sequence[Advice | Failed]) -> Iterable[str]:
    def cell(head: str, text: str) -> str:
        return (
            f'<td class="n">{escape(text)}</td>' if head in NUMBERS else f"<td>{escape(text)}</td>"
        )

    yield '<h2>Table</h2><div class="table"><table><tr>'
    yield "".join(f'<th class="n">{h}</th>' if h in NUMBERS else f"<th>{h}</th>" for h in HEAD)
    yield "</tr>"
    for k, a in enumerate(found):
        name, model, method, *rest = cells(a)
        kind = "error" if isinstance(a, Failed) else a.choice.method
        yield (
            f'<tr><td><a href="#c{k}">{escape(name)}</a></td><td>{escape(model)}</td>'
            f'<td class="{kind}">{method}</td>'
            + "".join(cell(h, c) for h, c in zip(HEAD[3:], rest, strict=True))
            + "</tr>"
        )
    yield "</table></div>"


def _error_card(k: int, a: Failed) -> Iterable[str]:
    name = escape(a.name or a.where)
    yield f'<section class="card" id="c{k}"><h3>{name}: <span class="error">error</span></h3>'
    yield "<ul>" + "".join(f"<li>{escape(p)}</li>" for p in a.problems)
    yield f'</ul><p class="note">{escape(a.where)} of the table</p></section>'


def _card(k: int, a: Advice) -> Iterable[str]:
    p = a.plain()
    yield (
        f'<section class="card" id="c{k}"><h3>{escape(p["name"])}: <span class="{p["method"]}">'
        f"{METHODS[p['method']]}</span></h3>"
        f'<p class="note">{escape(p["model"])}, {p["task"]}. {escape(p["why"])} '
        f"(by the {p['by']} rule)</p>"
    )
    adapters = (
        f"{p['layers']} matrices at rank {p['rank']}, alpha {p['alpha']}, "
        f"{p['adapter_mib']:,.0f} MiB"
    )
    rate = f"{p['lr']:.2e}, {p['lr_low']:.1e} to {p['lr_high']:.1e}: {p['lr_source']}"
    steps = (
        f"{p['batch_size']:,} rows, at most {p['batch_size_max']:,}; {shown(p['steps'])} updates, "
    )
    facts = {
        "adapters": adapters,
        "learning rate": rate,
        "batch and length": f"{steps}at least {p['steps_min']}",
        "load": f"{_short(p['load'])} from {_short(p['bits'])} bits{_measured(a)}",
        "LoRA": _arm(p, "lora"),
        "full fine-tuning": _arm(p, "full"),
        "operations": f"LoRA's update takes {p['flops_ratio']:.2f} times full fine-tuning's",
    }
    yield "<dl>" + "".join(f"<dt>{n}</dt><dd>{escape(v)}</dd>" for n, v in facts.items()) + "</dl>"
    states = (
        f'<li class="state-{c.state}">{escape(c.name)}: {c.state}, {escape(c.why)}</li>'
        for c in a.conditions
    )
    yield f"<ul>{''.join(states)}</ul>"
    if p["warnings"]:
        yield "<ul>" + "".join(f"<li>{escape(w)}</li>" for w in p["warnings"]) + "</ul>"
    reasons = "".join(f"<li>{escape(_reason(r))}</li>" for r in a.trace.reasons.values())
    yield "<details><summary>formulas and inputs</summary>"
    yield f"<ul>{reasons}</ul></details></section>"


def _measured(a: Advice) -> str:
    bits = a.trace.reasons.get("bits")
    return ", measured in the data" if bits and bits.sure is Sure.MEASURED else ""


def _reason(r: Reason) -> str:
    given = ", ".join(f"{name} {shown(value)}" for name, value in r.inputs.items())
    return f"{r.name} = {shown(r.value)}: {r.formula}" + (f" ({given})" if given else "")


def _sources(found: Sequence[Advice | Failed]) -> Iterable[str]:
    """Yield once for the page what numbers and conditions rest on."""
    good = [a for a in found if isinstance(a, Advice)]
    numbers = {(r.name, r.source, r.sure.value) for a in good for r in a.trace.reasons.values()}
    states = {(c.name, e, c.sure.value) for a in good for c in a.conditions for e in c.evidence}
    for title, entries in (("Sources", numbers), ("Kept answers", states)):
        yield f"<h2>{title}</h2><ul>"
        yield "".join(f"<li>{escape(': '.join(e))}</li>" for e in sorted(entries))
        yield "</ul>"


def _arm(p: Mapping[str, Any], name: str) -> str:
    if p[f"gpus_{name}"] is None:
        return "fits on no number of GPUs as planned"
    more = "" if p[f"fits_{name}"] else " (more than are at hand)"
    return (
        f"{p[f'gpus_{name}']} x {p['gpu']}{more}, {_short(p[f'peak_gib_{name}'])} GiB each; "
        f"{_amount(p[f'hours_{name}'])} hours, {_amount(p[f'cost_usd_{name}'])} dollars; served in "
        f"{_short(p[f'serving_gib_{name}'])} GiB"
    )

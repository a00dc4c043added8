"""A fleet for people: the card of each adapter, and the page over all customers."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lorasweep.customers.outcome import GAINED, UNKNOWN, WORSE, Outcome, counts, counts_line
from lorasweep.customers.pages import plain_text, render
from lorasweep.customers.runs import folder_of
from lorasweep.spec.dataset import FIRST_RENDER

NUMBERS = ("gain", "before", "after", "learning rate", "tried", "rows", "held out", "rank")
HEAD = ("customer", *NUMBERS, "notes")
NAMED = 12
"""Customers of a group that the page names; the table has all."""
MASKS = {
    "completion": "every answer",
    "last_assistant": "the last answer of a conversation",
    "all": "all text",
}
FORMS = {
    "chat_template": "the chat template of the base",
    "role_eos": "'Role: ' before each message",
    "role_colon": "'Role:' before each message",
}


def card(outcome: Outcome) -> str:
    """Return the card of an adapter, in Markdown with the head that model hubs read."""
    on_hub = outcome.member.points[0].spec.model.source == "hub"  # else hubs would link to another
    head: dict[str, Any] = {"base_model": outcome.base} if on_hub else {}
    head |= {"library_name": "peft", "tags": ["lora"]}
    return render(
        "card.md",
        head=yaml.safe_dump(head, sort_keys=False),
        name=plain_text(outcome.name),
        facts=[(name, plain_text(text)) for name, text in _facts(outcome)],
    )


def _facts(outcome: Outcome) -> list[tuple[str, str]]:
    """Return the facts of a trained adapter: name and text, each a line of templates/facts.txt."""
    p, member = outcome.plain(), outcome.member
    form = FORMS[p["render"]]
    if p["template"] is not None:
        plain = p["render"] == FIRST_RENDER
        form = f"{p['template']!r}" if plain else f"{form}, with {p['template']!r} as the message"
    model = member.points[0].spec.model
    mask = MASKS[p["mask"]]
    text = render("facts.txt", p=p, rows=member.rows, model=model, form=form, mask=mask)
    facts = (line.partition(": ") for line in text.split("\n") if line)
    return [(name, fact) for name, _, fact in facts]


def cells(outcome: Outcome) -> list[str]:
    """Return the row of a table, under HEAD."""
    p = outcome.plain()
    if outcome.spec is None:
        return [p["name"] or "?", *[""] * (len(HEAD) - 2), p["error"]]
    held_out = outcome.member.rows.held_out
    notes = [n for n in (outcome.room, outcome.edge and f"{outcome.edge} learning rate") if n]
    if (p["steps_done"] or p["steps"]) < p["steps"]:
        notes.append(f"ended early, after {p['steps_done']} of {p['steps']} updates")
    if outcome.gain is not None and outcome.verdict != GAINED:
        worse = outcome.verdict == WORSE
        notes.append(WORSE if worse else "whether it gained is not known")
    if p["advised"] == "full":
        notes.append("the adviser says full fine-tuning")
    gain = "?" if outcome.gain is None else f"{outcome.gain:+.3f}"
    if outcome.gain is not None and outcome.interval is not None:
        gain += f" ± {outcome.interval[1] - outcome.gain:.3f}"
    return [
        p["name"],
        gain,
        f"{p['loss_before']:.3f}",
        f"{p['loss_after']:.3f}",
        f"{p['lr']:g}",
        str(len(outcome.tried)),
        f"{p['n_train']:,}",
        f"{p['n_validation']} + {p['n_test']}" if held_out else "none",
        str(p["rank"]),
        ", ".join(notes),
    ]


def _groups(found: Sequence[Outcome]) -> dict[str, list[int]]:
    """Return the customers of each group, by index in `found`, without empty groups."""
    trained = {k: o for k, o in enumerate(found) if o.spec is not None}
    verdicts = {k: o.verdict for k, o in trained.items() if o.gain is not None}
    of = {v: [k for k, mine in verdicts.items() if mine == v] for v in (GAINED, WORSE, UNKNOWN)}
    groups = {
        "without an adapter": [k for k in range(len(found)) if k not in trained],
        "gained, on test rows": of[GAINED],
        "got worse, on test rows": of[WORSE],
        "not known: the interval of the gain holds 0, or there is none": of[UNKNOWN],
        "not known, as no row was held out": [k for k in trained if k not in verdicts],
        "best learning rate at the edge of those tried": [k for k, o in trained.items() if o.edge],
        "more data than the rank has capacity for": [
            k for k, o in trained.items() if o.room and o.member.rows.held_out
        ],
    }
    return {says: group for says, group in groups.items() if group}


def summary_lines(found: Sequence[Outcome]) -> list[str]:
    """Return the number of customers by result."""
    groups = _groups(found)
    groups.pop("without an adapter", None)
    return [counts_line(counts(found)), *(f"{len(g)} {says}" for says, g in groups.items())]


def page(found: Sequence[Outcome], title: str, earlier: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page in HTML: one file, without scripts.

    Args:
        found: the outcome of each customer.
        title: the table's name.
        earlier: the facts of adapters that are not of this table's state, by folder.
    """
    folders = {folder_of(o.name) for o in found}
    cards: list[dict[str, Any]] = []
    for o in found:
        if o.spec is None:
            cards.append({"error": o.problem, "earlier": earlier.get(folder_of(o.name))})
        else:
            note = f"folder {o.member.folder}, run {o.spec.id}"
            cards.append({"error": "", "facts": list(_facts(o)), "note": note})
    groups = []
    for says, group in _groups(found).items():
        few = 2 * len(group) <= len(found)  # names of most customers would say little
        groups.append((says, group, group[:NAMED] if few else []))
    return render(
        "fleet.html",
        title=title,
        counts=counts_line(counts(found)),
        groups=groups,
        head=HEAD,
        numbers=NUMBERS,
        names=[o.name or "?" for o in found],
        rows=[cells(o) for o in found],
        cards=cards,
        gone=[str(facts.get("name")) for f, facts in earlier.items() if f not in folders],
    )

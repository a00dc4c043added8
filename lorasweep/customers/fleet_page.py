"""A fleet for people: the card of each adapter, and the page over all customers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from lorasweep.customers.evidence import shown
from lorasweep.customers.outcome import GAINED, UNKNOWN, WORSE, Outcome, counts, counts_line
from lorasweep.customers.pages import plain_text, render
from lorasweep.customers.rows import BY_PROMPT
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


def _facts(outcome: Outcome) -> Iterator[tuple[str, str]]:
    """Yield the facts of a trained adapter: name and text."""
    p, rows = outcome.plain(), outcome.member.rows
    yield "adapter", f"LoRA of rank {p['rank']}, alpha {p['alpha']:g}, on {p['layers']} matrices"
    yield "base", _base(outcome)
    yield "trained on", f"{p['n_train']:,} rows of {p['data']} ({p['revision']})"
    if p["n_repeated"]:
        split = "; duplicates stay in one split" if rows.held_out else ""
        yield "repetitions", f"{p['n_repeated']:,} rows say the same as another one{split}"
    if p["n_same_prompt"]:
        says = f"{p['n_same_prompt']:,} rows have the prompt of another one, and another answer"
        if rows.held_out and p["prompts_shared"]:
            says += (
                "; rows were divided without regard to it, so the gain is that on other answers, "
                "to prompts that may have been trained on"
            )
        elif rows.held_out:
            says += "; no prompt is both held out and trained on"
        yield "prompts", says
    if p["n_left_out"]:
        what = "row" if rows.dataset.held_out_by != BY_PROMPT else "prompt"
        yield "left out", f"{p['n_left_out']:,} training rows, whose {what} is held out"
    yield "prompt form", _form(p)
    if p["example"]:
        written = "".join(f"⟦{e['text']}⟧" if e["in_loss"] else e["text"] for e in p["example"])
        yield "example", f"{written.replace(chr(10), '⏎')} (⟦ ⟧ encloses what is learned)"
    yield (
        "training",
        f"{p['steps_done'] or p['steps']:,} updates of {p['batch_size']} rows, "
        f"{p['tokens'] or 0:,} tokens, {p['seconds'] or 0:,.1f} s",
    )
    if p["early_stopping"]:
        yield "early stopping", p["early_stopping"]
    yield "learning rate", _learning_rate(outcome, p)
    losses = f"{shown(p['loss_before'])} nats a token before, {shown(p['loss_after'])} after"
    if outcome.gain is None:
        yield (
            "loss",
            f"{losses}, on the training rows themselves: with {p['n_train'] - p['n_repeated']} "
            "different rows none was held out, so nothing is known of the gain on others",
        )
    else:
        n = p["n_test_prompts"]
        prompts, over = ("", "rows") if n is None else (f" ({n:,} prompts)", "prompts")
        text = f"{losses}, on {p['n_test']} test rows{prompts}: a gain of {outcome.gain:.3g}"
        if outcome.interval is not None:
            low, high = outcome.interval
            text += f", 95% interval {low:.3g} to {high:.3g} (Student's t over {over})"
            if outcome.verdict == UNKNOWN:
                text += ", so whether it gained is not known"
        yield "held-out loss", text
    method = {"lora": "LoRA", "full": "full fine-tuning", "open": "open"}[p["advised"]]
    forced = ". LoRA was asked for nevertheless" if p["advised"] == "full" else ""
    yield "the adviser said", f"{method}: {p['advised_why']}{forced}"
    if p["room"]:
        yield "capacity", p["room"]
    if p["tied"]:
        yield "use", "as it is, never merged: the unembedding it changes is tied to the embedding"
    for text in p["warnings"]:
        yield "warning", text


def _form(p: Mapping[str, Any]) -> str:
    """Say how a prompt must be written for the adapter."""
    form = FORMS[p["render"]]
    if p["template"] is not None:
        plain = p["render"] == FIRST_RENDER
        form = f"{p['template']!r}" if plain else f"{form}, with {p['template']!r} as the message"
    end = f"; an answer ends with {p['end']!r}" if p["end"] else ""
    return f"{form}; in the loss: {MASKS[p['mask']]}{end}"


def _base(outcome: Outcome) -> str:
    model = outcome.member.points[0].spec.model
    load = "load it, then peft.PeftModel.from_pretrained(base, this folder)"
    if model.source == "hub":
        return f"{outcome.base}: {load}"
    shape = f"{model.n_layers} layers, {model.hidden_size:,} wide, {model.vocab_size:,} tokens"
    return f"{outcome.base} ({shape}), a copy of your own as it is not on the hub: {load}"


def _learning_rate(outcome: Outcome, p: Mapping[str, Any]) -> str:
    if len(outcome.tried) == 1:
        return f"{p['lr']:g}, the advised one; no other was tried ({p['advised_lr']})"
    tried = ", ".join(
        f"{t.lr:g} {'diverged' if t.validation is None else f'{t.validation:.4f}'}"
        for t in outcome.tried
    )
    edge = f"; it is the {p['edge']} one, so the best may lie beyond" if p["edge"] else ""
    return (
        f"{p['lr']:g}, the lowest loss on {p['n_validation']} validation rows: {tried}{edge}. They "
        f"lie around the advised learning rate ({p['advised_lr']})"
    )


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

"""What people read: the card beside an adapter, and the page over all customers.

Names and error texts are customers': they are escaped in both.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from lorasweep.advise.advice import Failed
from lorasweep.advise.page import TEMPLATE, plain_text
from lorasweep.advise.trace import shown
from lorasweep.fleet.members import folder_of
from lorasweep.fleet.outcome import (
    GAINED,
    UNKNOWN,
    WORSE,
    Outcome,
    counts,
    counts_line,
    plain_of,
)
from lorasweep.fleet.rows import BY_PROMPT
from lorasweep.spec.dataset import FIRST_RENDER

NUMBERS = ("gain", "before", "after", "rate", "of", "rows", "held out", "rank")
HEAD = ("customer", *NUMBERS, "to know")
WRAPS = ' style="white-space: normal; min-width: 16em"'
NAMED = 12
"""Customers of a group that the page names; the table has all."""


def card(outcome: Outcome) -> str:
    """Return the card of an adapter, in Markdown with the head that model hubs read."""
    p = outcome.plain()
    on_hub = outcome.member.points[0].spec.model.source == "hub"  # else hubs would link to another
    head = {"base_model": p["base"]} if on_hub else {}
    head |= {"library_name": "peft", "tags": ["lora"]}
    lines = [f"---\n{yaml.safe_dump(head, sort_keys=False)}---", f"# {plain_text(p['name'])}", ""]
    lines += [f"- **{name}:** {plain_text(text)}" for name, text in _facts(outcome)]
    return "\n".join(lines) + "\n"


def _facts(outcome: Outcome) -> Iterable[tuple[str, str]]:
    """Yield what there is to say of a trained adapter."""
    p = outcome.plain()
    yield "adapter", f"LoRA of rank {p['rank']}, alpha {p['alpha']:g}, on {p['layers']} matrices"
    yield "base", _base(outcome)
    yield "trained on", f"{p['n_train']:,} rows of {p['data']} ({p['revision']})"
    if p["n_repeated"]:
        split = "; what is held out is trained on nowhere" if outcome.member.rows.held_out else ""
        yield "repetitions", f"{p['n_repeated']:,} rows say the same as another one{split}"
    if p["n_same_prompt"]:
        yield "prompts", _prompts(outcome)
    if p["n_left_out"]:
        what = "row" if outcome.member.rows.dataset.held_out_by != BY_PROMPT else "prompt"
        yield "left out", f"{p['n_left_out']:,} training rows, whose {what} is held out"
    yield "prompt form", _form(outcome)
    if p["example"]:
        written = "".join(f"⟦{e['text']}⟧" if e["in_loss"] else e["text"] for e in p["example"])
        yield "example", f"{written.replace(chr(10), '⏎')} (learned is what stands in ⟦ ⟧)"
    yield (
        "training",
        f"{p['steps_done'] or p['steps']:,} updates of {p['batch_size']} rows, "
        f"{p['tokens'] or 0:,} tokens, {p['seconds'] or 0:,.1f} s",
    )
    if p["early_stopping"]:
        yield "early stopping", p["early_stopping"]
    yield "learning rate", _rate(outcome)
    before, after = shown(p["loss_before"]), shown(p["loss_after"])
    if outcome.gain is None:
        yield (
            "loss",
            f"{before} nats a token before, {after} after, on the training rows themselves: with "
            f"{p['n_train'] - p['n_repeated']} different rows none was held out, so nothing is "
            "known of the gain on others",
        )
    else:
        yield (
            "held-out loss",
            f"{before} nats a token before, {after} after, on {p['n_test']} rows that were neither "
            f"trained on nor chose anything{_of_prompts(outcome)}: a gain of "
            f"{outcome.gain:.3g}{_interval(outcome)}",
        )
    method = {"lora": "LoRA", "full": "full fine-tuning", "open": "open"}[p["advised"]]
    forced = ". LoRA was asked for all the same" if p["advised"] == "full" else ""
    yield "the adviser said", f"{method}: {p['advised_why']}{forced}"
    if p["room"]:
        yield "room", p["room"]
    if p["tied"]:
        yield "use", "as it is, never merged: the unembedding it changes is tied to the embedding"
    for text in p["warnings"]:
        yield "warning", text


def _prompts(outcome: Outcome) -> str:
    """Say how many rows share a prompt, and on which sides of the division they may be."""
    p = outcome.plain()
    says = f"{p['n_same_prompt']:,} rows have the prompt of another one, and another answer"
    if not outcome.member.rows.held_out:
        return says
    if not p["prompts_shared"]:
        return f"{says}; no prompt is both held out and trained on"
    return (
        f"{says}; rows were divided without regard to it, so the gain is that on other answers, to "
        "prompts that may have been trained on"
    )


def _of_prompts(outcome: Outcome) -> str:
    n = outcome.plain()["n_test_prompts"]
    return "" if n is None else f" ({n:,} prompts)"


MASKS = {
    "completion": "every answer",
    "last_assistant": "the last answer of a conversation",
    "all": "all text",
}


def _form(outcome: Outcome) -> str:
    """Say how a prompt is written, for those who are to write it so to the adapter."""
    p = outcome.plain()
    forms = {
        "chat_template": "the chat template of the base",
        "role_eos": "'Role: ' before each message",
        "role_colon": "'Role:' before each message",
    }
    form = forms[p["render"]]
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


def _rate(outcome: Outcome) -> str:
    p = outcome.plain()
    if len(outcome.tried) == 1:
        return f"{p['lr']:g}, the advised one; no other was tried ({p['advised_lr']})"
    tried = ", ".join(f"{t.lr:g} {_loss(t.validation)}" for t in outcome.tried)
    edge = f"; it is the {p['edge']} one, so the best may lie beyond" if p["edge"] else ""
    return (
        f"{p['lr']:g}, the lowest loss on {p['n_validation']} rows that were not trained on: "
        f"{tried}{edge}. They lie around the advised rate ({p['advised_lr']})"
    )


def _interval(outcome: Outcome) -> str:
    if outcome.interval is None:
        return ""
    low, high = outcome.interval
    says = {UNKNOWN: ", so whether it gained is not known"}.get(outcome.verdict, "")
    over = "rows" if outcome.plain()["n_test_prompts"] is None else "prompts"
    return f", 95% interval {low:.3g} to {high:.3g} (Student's t over {over}){says}"


def _loss(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.4f}"


def cells(found: "Outcome | Failed") -> list[str]:
    """Return the row of a table, under HEAD."""
    p = plain_of(found)
    if not isinstance(found, Outcome) or found.spec is None:
        return [p["name"] or "?", *[""] * (len(HEAD) - 2), p["error"]]
    notes = [n for n in (found.room, found.edge and f"{found.edge} rate") if n]
    if (p["steps_done"] or p["steps"]) < p["steps"]:
        notes.append(f"ended early, after {p['steps_done']} of {p['steps']} updates")
    if found.gain is not None and found.verdict != GAINED:
        notes.append(found.verdict if found.verdict == WORSE else "whether it gained is not known")
    if p["advised"] == "full":
        notes.append("the adviser says full fine-tuning")
    return [
        p["name"],
        _gain(found),
        f"{p['loss_before']:.3f}",
        f"{p['loss_after']:.3f}",
        f"{p['lr']:g}",
        str(len(found.tried)),
        f"{p['n_train']:,}",
        f"{p['n_validation']} + {p['n_test']}" if found.member.rows.held_out else "none",
        str(p["rank"]),
        ", ".join(notes),
    ]


def _gain(outcome: Outcome) -> str:
    """Return the gain and half its interval."""
    if outcome.gain is None:
        return "?"
    if outcome.interval is None:
        return f"{outcome.gain:+.3f}"
    return f"{outcome.gain:+.3f} ± {outcome.interval[1] - outcome.gain:.3f}"


def _groups(found: Sequence["Outcome | Failed"]) -> dict[str, list[int]]:
    """Return who gained, who did not, and whose rate or rank is in question, by place in `found`.

    Groups without anybody are left out.
    """
    trained = {k: o for k, o in enumerate(found) if isinstance(o, Outcome) and o.spec is not None}
    measured = {k: o.verdict for k, o in trained.items() if o.gain is not None}

    def of(verdict: str) -> list[int]:
        return [k for k, v in measured.items() if v == verdict]

    groups = {
        "without an adapter": [k for k in range(len(found)) if k not in trained],
        "gained, by rows that chose nothing": of(GAINED),
        "got worse, by rows that chose nothing": of(WORSE),
        "not known: the interval of the gain holds 0, or there is none": of(UNKNOWN),
        "not known, as no row was held out": [k for k in trained if k not in measured],
        "best rate at the edge of those tried": [k for k, o in trained.items() if o.edge],
        "more data than the rank has room for": [
            k for k, o in trained.items() if o.room and o.member.rows.held_out
        ],
    }
    return {says: group for says, group in groups.items() if group}


def summary_lines(found: Sequence["Outcome | Failed"]) -> list[str]:
    """Return how many gained, how many did not, and whose rate or rank is in question."""
    groups = _groups(found)
    groups.pop("without an adapter", None)
    return [counts_line(counts(found)), *(f"{len(g)} {says}" for says, g in groups.items())]


def page(
    found: Sequence["Outcome | Failed"], title: str, earlier: Mapping[str, Mapping[str, Any]]
) -> str:
    """Return the page in HTML: one file, without scripts, and every name escaped.

    Args:
        found: what became of each customer.
        title: the table's name.
        earlier: the facts of adapters that are not of this table's state, by folder.
    """
    body = [f"<h1>{escape(title)}</h1>"]
    body += [f"<p>{escape(summary_lines(found)[0])}</p>", "<ul>", *_named(found), "</ul>"]
    body.append(
        '<p class="note">Losses are nats a token on held-out rows. The rate with the lowest loss '
        "on the first of them (held out, left) was chosen; before, after and gain are of the "
        "others. Beside a gain is half its 95% interval: of 20 customers that gain "
        "nothing, one is expected to seem to gain or to lose.</p>"
    )
    body += _table(found)
    body += _gone(found, earlier)
    for k, outcome in enumerate(found):
        if isinstance(outcome, Outcome) and outcome.spec is not None:
            facts = "".join(
                f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _facts(outcome)
            )
            body.append(
                f'<section class="card" id="c{k}"><h3>{escape(outcome.name)}</h3><dl>{facts}</dl>'
                f'<p class="note">folder {escape(outcome.member.folder)}, run '
                f"{escape(outcome.spec.id)}</p></section>"
            )
        else:
            p = plain_of(outcome)
            stays = _stays(earlier.get(folder_of(outcome.name)))
            body.append(
                f'<section class="card" id="c{k}"><h3>{escape(p["name"] or "?")}: <span '
                f'class="error">no adapter</span></h3><p>{escape(p["error"])}</p>{stays}</section>'
            )
    text = TEMPLATE.read_text().replace("LoRA or full fine-tuning", "Customers' adapters", 1)
    return text.replace("<!--BODY-->", "\n".join(body))


def _named(found: Sequence["Outcome | Failed"]) -> Iterable[str]:
    """Yield each group with the names of its first customers, unless all or most belong to it."""
    for says, group in _groups(found).items():
        names = [
            f'<a href="#c{k}">{escape(plain_of(found[k])["name"] or "?")}</a>'
            for k in group[:NAMED]
        ]
        if len(group) > NAMED:
            names.append(f"and {len(group) - NAMED} more")
        few = 2 * len(group) <= len(found)
        yield f"<li>{len(group)} {escape(says)}{': ' + ', '.join(names) if few else ''}</li>"


def _stays(facts: Mapping[str, Any] | None) -> str:
    """Say that a customer's folder holds what an earlier state left; nothing without one."""
    if facts is None:
        return ""
    return (
        "<p>Its folder holds an earlier adapter, of another state of its data or settings: run "
        f"{escape(str(facts.get('run')))}, on {escape(str(facts.get('n_train')))} rows.</p>"
    )


def _gone(
    found: Sequence["Outcome | Failed"], earlier: Mapping[str, Mapping[str, Any]]
) -> Iterable[str]:
    """Yield which folders are of customers that are no longer in the table."""
    names = {folder_of(o.name) for o in found}
    gone = [str(facts.get("name")) for folder, facts in earlier.items() if folder not in names]
    if gone:
        yield (
            "<p>No longer in the table, with a folder that stays until you delete it: "
            f"{escape(', '.join(gone))}.</p>"
        )


def _table(found: Sequence["Outcome | Failed"]) -> Iterable[str]:
    def cell(head: str, text: str) -> str:
        # a whole error may stand in the last column: it wraps
        return f'<td class="n">{text}</td>' if head in NUMBERS else f"<td{WRAPS}>{text}</td>"

    yield '<div class="table"><table><tr>'
    yield "".join(f'<th class="n">{h}</th>' if h in NUMBERS else f"<th>{h}</th>" for h in HEAD)
    yield "</tr>"
    for k, outcome in enumerate(found):
        name, *rest = map(escape, cells(outcome))
        yield f'<tr><td><a href="#c{k}">{name}</a></td>'
        yield "".join(cell(h, text) for h, text in zip(HEAD[1:], rest, strict=True)) + "</tr>"
    yield "</table></div>"


def write(path: Path, text: str) -> None:
    """Write a page or a card; text that UTF-8 cannot hold is written with question marks."""
    path.write_text(text, encoding="utf-8", errors="replace")

"""Export each customer's adapter with its card, and the page over all customers.

The learning rate was chosen by choice.py; a card's fields are in templates/card_fields.txt.
"""

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from lorasweep.advise.pages import plain_text, render
from lorasweep.data import tokenizing
from lorasweep.errors import LorasweepError, ModelError
from lorasweep.fleet.choice import GAINED, Outcome, counts, counts_line
from lorasweep.fleet.serving import ADAPTER, PEFT, Profile, problems
from lorasweep.spec.model import ModelSpec
from lorasweep.store import checkpoint, folders
from lorasweep.store.run_store import RunStore

CARD, FACTS, PAGE = "README.md", "facts.json", "index.html"
TEMPLATE = "chat_template.jinja"
"""File that a tokenizer writes its chat template to."""
IN_BATCH = 8
"""Largest number of adapters in a batch that a command asks for; each takes GPU memory. A
convention; vLLM's default is 1."""
NUMBERS = ("gain", "before", "after", "learning rate", "rows")
HEAD = ("customer", "exact answers", *NUMBERS, "notes")


def export(
    found: Sequence[Outcome],
    store: RunStore,
    folder: Path,
    title: str,
    tokenizer_of: Callable[[ModelSpec], Any],
    profile: Profile = PEFT,
) -> list[Outcome]:
    """Write the folders of customers with an adapter, and the page; return the outcomes.

    Deletes the weights of runs that were not chosen. A customer that has no adapter now, or left
    the table, keeps the folder of an earlier command.
    """

    from lorasweep.models import load  # only here: it imports torch

    def exported(outcome: Outcome) -> Outcome:
        """Replace our files in a customer's folder, unless it is up to date.

        A folder with the chosen run stays if the run's weights are gone.
        """
        member, spec, facts = outcome.member, outcome.spec, json.dumps(outcome.facts(), indent=1)
        mine, rows, there = folder / member.folder, member.rows, ""
        with suppress(OSError):
            there = (mine / FACTS).read_text() if (mine / ADAPTER).is_file() else ""
        weights = None if there == facts else checkpoint.load_weights(store.folder(spec.id))
        if weights is None and f'"run": "{spec.id}"' in there:
            return outcome
        # the head of a card (hub-docs, modelcard.md); other names would link other repositories
        model, data = spec.model, spec.dataset
        head: dict[str, Any] = {"base_model": model.location} if model.source == "hub" else {}
        head |= member.license | ({"datasets": [data.location]} if data.source == "hub" else {})
        head |= {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora"]}
        example = "".join(f"⟦{text}⟧" if in_loss else text for text, in_loss in rows.example)
        ticks = max(map(len, re.findall("`+", example)), default=0)
        try:
            if weights is None:
                raise ModelError(
                    f"the weights of run {spec.id} were not kept. Train it again: python -m "
                    f"lorasweep action=adapter run={spec.id} out=FOLDER"
                )
            served = tokenizing.with_template(data, tokenizer_of(model))
            tokenizing.check_served(data, served, rows.messages, [], rows.example, "example")
            with folders.replaced(mine, FACTS) as partial:
                load.write_adapter(partial, spec, weights, outcome.result.get("base_commit"))
                tokenizing.save_tokenizer(served, rows.stop, partial)
                architecture = member.served.get("architecture", "")
                if wrong := problems(partial, profile, model, spec.method, architecture):
                    said = " ".join(wrong)
                    raise ModelError(f"{profile.server} would not serve it as trained: {said}")
                # text that UTF-8 cannot hold is written with question marks
                commands = _commands([(outcome, partial, ".")], profile, tokenizer_of)
                card = render(
                    "adapter.md",
                    head=yaml.safe_dump(head, sort_keys=False),
                    name=plain_text(member.name),
                    facts=[(name, plain_text(text)) for name, text in _card_lines(outcome)],
                    example=example,
                    fence="`" * max(3, ticks + 1),  # longer than any in the example
                    folder=member.folder,
                    serve="".join(text for _, text in commands),
                    repository=re.sub("-+", "-", member.folder).strip("-"),  # as the hub allows
                )
                (partial / CARD).write_text(card, encoding="utf-8", errors="replace")
                (partial / FACTS).write_text(facts)
        except LorasweepError as error:  # such as a full disk; other customers are served
            return replace(outcome, spec=None, result={}, problem=str(error))
        return outcome

    found = [exported(o) if o.spec else o for o in found]
    chosen = [o for o in found if o.spec is not None]
    for run in (t["run"] for o in chosen for t in o.tried if t["run"] != o.spec.id):
        (store.folder(run) / checkpoint.WEIGHTS).unlink(missing_ok=True)
    customers = [o.facts() for o in found]
    here = [(o, folder / o.member.folder, f"./{o.member.folder}") for o in chosen]
    page = render(
        "fleet.html",
        title=title,
        lines=summary_lines(found),
        head=HEAD,
        numbers=NUMBERS,
        rows=[cells(p) for p in customers],
        cards=[(p, _card_lines(o) if o.spec else []) for o, p in zip(found, customers)],
        commands=_commands(here, profile, tokenizer_of),
    )
    with folders.replaced(folder, PAGE, whole=False) as partial:
        (partial / PAGE).write_text(page, encoding="utf-8", errors="replace")
    return found


def _card_lines(outcome: Outcome) -> list[tuple[str, str]]:
    """Return (name, text) for each fact of a trained adapter, by templates/card_fields.txt."""
    text = render("card_fields.txt", p=outcome.facts(), rows=outcome.member.rows, spec=outcome.spec)
    facts = (line.partition(": ") for line in text.split("\n") if line)
    return [(name, fact) for name, _, fact in facts]


def _commands(
    found: Sequence[tuple[Outcome, Path, str]], profile: Profile, tokenizer_of: Callable[..., Any]
) -> list[tuple[str, str]]:
    """Return (base, command that serves its adapters) for each base and chat template.

    `found`: each adapter with its folder, and with its folder as the command names it.
    """
    groups: dict[tuple[str, str], list[tuple[Outcome, str]]] = {}
    for o, folder, named in found if profile.command else ():
        path = folder / TEMPLATE
        template = path.read_text() if path.is_file() else ""
        if template == getattr(tokenizer_of(o.spec.model), "chat_template", None):
            template = ""  # the server has it from the base
        groups.setdefault((o.facts()["base"], template), []).append((o, named))
    commands = []
    for (base, template), own in groups.items():
        command = profile.command.format(
            base=shlex.quote(base if own[0][0].spec.model.source == "hub" else "BASE"),
            rank=profile.largest_rank(max(o.member.advised["rank"] for o, _ in own)),
            in_batch=min(len(own), IN_BATCH),
            adapters=len(own),
            modules=" ".join(shlex.quote(f"{o.member.folder}={named}") for o, named in own),
        )
        if template:
            file = shlex.quote(f"{own[0][1]}/{TEMPLATE}")
            command = f"{command} {profile.chat_template.format(file=file)}"
        commands.append((base, command.rstrip()))
    return commands


def _notes(p: dict[str, Any]) -> list[str]:
    """Return what is notable of a customer, for the table and the counts."""
    if p["error"]:
        return ["without an adapter"]
    edge = p["edge"] and "best learning rate at the edge of those tried"
    return [
        p["gained"] if p["gain"] is not None else "too few unique rows to hold any out",
        *filter(None, [p["room"], edge]),
        *["training hurts at every learning rate"] * p["hurts"],
        *["ended early"] * ((p["steps_done"] or p["steps"]) < p["steps"]),
        *["the adviser says full fine-tuning"] * (p["advised"] == "full"),
    ]


def cells(p: dict[str, Any]) -> list[str]:
    """Return the customer's row of the table with the columns HEAD; `p`: the facts."""
    if p["error"]:
        return [p["name"] or "?", *[""] * (len(HEAD) - 2), p["error"]]
    gain = "?" if p["gain"] is None else f"{p['gain']:+.3f}"
    if p["gain_interval"] is not None:
        gain += f" ± {p['gain_interval'][1] - p['gain']:.3f}"
    return [
        p["name"],
        "{before} → {after} of {prompts}".format(**s) if "after" in (s := p["score"] or {}) else "",
        gain,
        f"{p['loss_before']:.3f}",
        f"{p['loss_after']:.3f}",
        f"{p['lr']:g}",
        f"{p['n_train']:,}",
        ", ".join(note for note in _notes(p) if note != GAINED),
    ]


def summary_lines(found: Sequence[Outcome]) -> list[str]:
    """Return lines with the number of customers, in total and with each note."""
    notes = Counter(note for o in found if o.spec for note in _notes(o.facts()))
    return [counts_line(counts(found)), *(f"{n} {note}" for note, n in notes.items())]

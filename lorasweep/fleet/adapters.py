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
from lorasweep.data import text
from lorasweep.errors import LorasweepError, ModelError
from lorasweep.fleet.choice import GAINED, UNKNOWN, WORSE, Outcome, counts, counts_line
from lorasweep.fleet.serving import ADAPTER, PEFT, Profile, problems
from lorasweep.spec.model import ModelSpec
from lorasweep.store import checkpoint, folders
from lorasweep.store.run_store import RunStore

Tokenizers = Callable[[ModelSpec], Any]
"""Base -> its tokenizer."""
CARD, FACTS, PAGE = "README.md", "facts.json", "index.html"
TEMPLATE = "chat_template.jinja"
"""File that a tokenizer writes its chat template to."""
BASE = "BASE"
"""What a command names in place of a base that is not on the hub."""
IN_BATCH = 8
"""Largest number of adapters in a batch that a command asks for; each takes GPU memory. A
convention; vLLM's default is 1."""
NUMBERS = (
    *("gain", "before", "after", "learning rate", "tried", "rows", "held out", "rank"),
    *("seconds", "GPU-hours"),
)
HEAD = ("customer", *NUMBERS, "notes")
LABELS = {GAINED: "gained", WORSE: "got worse", UNKNOWN: "gain uncertain"}
"""Verdict on the gain on test rows -> note. It is uncertain if its 95% interval contains 0."""


def export(
    found: Sequence[Outcome],
    store: RunStore,
    folder: Path,
    title: str,
    save: Callable[..., None],
    tokenizer_of: Tokenizers,
    profile: Profile = PEFT,
) -> list[Outcome]:
    """Write the folders of customers with an adapter, and the page; return the outcomes.

    `save` writes a folder for PEFT from a folder, the spec, weights and the commit of the base.

    Deletes the weights of runs that were not chosen. A customer that has no adapter now, or left
    the table, keeps the folder of an earlier command.
    """
    found = [_export(o, store, folder, save, tokenizer_of, profile) if o.spec else o for o in found]
    chosen = [o for o in found if o.spec is not None]
    for run in (t["run"] for o in chosen for t in o.tried if t["run"] != o.spec.id):
        (store.folder(run) / checkpoint.WEIGHTS).unlink(missing_ok=True)
    now = {o.member.folder for o in chosen}
    earlier: dict[str, str] = {}  # folder of adapters for earlier data or settings -> run
    for path in sorted(folder.glob(f"*/{FACTS}")):
        if path.parent.name not in now and not path.parent.name.startswith("."):
            with suppress(OSError, ValueError, KeyError, TypeError):  # a file of the user's
                earlier[path.parent.name] = str(json.loads(path.read_text())["run"])
    customers = [o.facts() for o in found]
    here = [(o, folder / o.member.folder, f"./{o.member.folder}") for o in chosen]
    page = render(
        "fleet.html",
        title=title,
        lines=summary_lines(found),
        marks=_marks(customers),
        head=HEAD,
        numbers=NUMBERS,
        labels=LABELS,
        kinds={GAINED: "gained", WORSE: "worse", UNKNOWN: "unknown"},
        rows=[cells(p) for p in customers],
        cards=[(p, _card_lines(o) if o.spec else []) for o, p in zip(found, customers)],
        commands=_commands(here, profile, tokenizer_of),
        earlier=earlier,
    )
    with folders.replaced(folder, PAGE, whole=False) as partial:
        (partial / PAGE).write_text(page, encoding="utf-8", errors="replace")
    return found


def _export(
    outcome: Outcome,
    store: RunStore,
    folder: Path,
    save: Callable[..., None],
    tokenizer_of: Tokenizers,
    profile: Profile,
) -> Outcome:
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
    try:
        if weights is None:
            raise ModelError(
                f"the weights of run {spec.id} were not kept. Train it again: python -m lorasweep "
                f"action=adapter run={spec.id} out=FOLDER"
            )
        served = text.with_template(spec.dataset, tokenizer_of(spec.model))
        text.check_served(spec.dataset, served, rows.messages, [], rows.example, "example")
        with folders.replaced(mine, FACTS) as partial:
            save(partial, spec, weights, outcome.result.get("base_commit"))
            text.save_tokenizer(served, rows.stop, partial)
            architecture = member.served.get("architecture", "")
            if wrong := problems(partial, profile, spec.model, spec.method, architecture):
                raise ModelError(
                    f"{profile.server} would not serve the adapter as trained: {' '.join(wrong)}"
                )
            # text that UTF-8 cannot hold is written with question marks
            command = _commands([(outcome, partial, ".")], profile, tokenizer_of)
            card = _card(outcome, "".join(text for _, text in command))
            (partial / CARD).write_text(card, encoding="utf-8", errors="replace")
            (partial / FACTS).write_text(facts)
    except LorasweepError as error:  # such as a full disk; other customers are served
        return replace(outcome, spec=None, result={}, problem=str(error))
    return outcome


def _card(outcome: Outcome, serve: str) -> str:
    """Return the card in Markdown, with the head of the hub's model cards.

    `serve`: the command that serves the adapter; '' if there is none.

    Keys of the head: github.com/huggingface/hub-docs, modelcard.md.
    """
    p, spec = outcome.facts(), outcome.spec
    # without a name on the hub, the hub would link the card to another model or data set
    head: dict[str, Any] = {"base_model": p["base"]} if spec.model.source == "hub" else {}
    head |= p["license"]
    if spec.dataset.source == "hub":
        head["datasets"] = [spec.dataset.location]
    head |= {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora"]}
    example = "".join(f"⟦{e['text']}⟧" if e["in_loss"] else e["text"] for e in p["example"])
    ticks = max(map(len, re.findall("`+", example)), default=0)
    return render(
        "adapter.md",
        head=yaml.safe_dump(head, sort_keys=False),
        name=plain_text(p["name"]),
        facts=[(name, plain_text(text)) for name, text in _card_lines(outcome)],
        example=example,
        fence="`" * max(3, ticks + 1),  # longer than any in the example
        folder=p["folder"],
        serve=serve,
        repository=re.sub("-+", "-", p["folder"]).strip("-"),  # a name that the hub allows
    )


def _card_lines(outcome: Outcome) -> list[tuple[str, str]]:
    """Return (name, text) for each fact of a trained adapter, by templates/card_fields.txt."""
    text = render("card_fields.txt", p=outcome.facts(), rows=outcome.member.rows, spec=outcome.spec)
    facts = (line.partition(": ") for line in text.split("\n") if line)
    return [(name, fact) for name, _, fact in facts]


def _commands(
    found: Sequence[tuple[Outcome, Path, str]],
    profile: Profile,
    tokenizer_of: Tokenizers,
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
            base=shlex.quote(base if own[0][0].spec.model.source == "hub" else BASE),
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
        *[LABELS[p["gained"]]] * (p["gain"] is not None),
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
        gain,
        f"{p['loss_before']:.3f}",
        f"{p['loss_after']:.3f}",
        f"{p['lr']:g}",
        str(len(p["tried"])),
        f"{p['n_train']:,}",
        f"{p['n_validation']} + {p['n_test']}" if p["n_test"] else "none",
        str(p["rank"]),
        f"{p['seconds_used']:,.0f}",
        f"{p['gpu_hours_used']:.3g}",
        ", ".join(note for note in _notes(p) if note != LABELS[GAINED]),
    ]


def summary_lines(found: Sequence[Outcome]) -> list[str]:
    """Return lines with the number of customers, in total and with each note."""
    notes = Counter(note for o in found if o.spec for note in _notes(o.facts()))
    return [counts_line(counts(found)), *(f"{n} {note}" for note, n in notes.items())]


def _marks(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a mark for each measured gain, the largest first; places in percent of the width.

    The axis contains 0 and all gains, and as much on both sides, where long intervals are cut off.
    """
    shown = [(k, p) for k, p in enumerate(found) if not p["error"] and p["gain"] is not None]
    gains = [0.0, *(p["gain"] for _, p in shown)]
    spread = max(gains) - min(gains) or 1.0
    low, high = min(gains) - spread, max(gains) + spread
    marks = []
    for k, p in sorted(shown, key=lambda found: -found[1]["gain"]):
        said, ends = f"{p['gain']:+.3g} nats per token, {p['gained']}", [p["gain"]] * 2
        if p["gain_interval"] is not None:
            said += ", 95% interval {:+.3g} to {:+.3g}".format(*p["gain_interval"])
            ends = p["gain_interval"]
        at, zero, *ends = (
            round(4 + 92 * (min(max(place, low), high) - low) / (high - low), 1)
            for place in (p["gain"], 0.0, *ends)
        )
        mark = {"k": k, "name": p["name"], "said": said, "verdict": p["gained"], "zero": zero}
        marks.append({**mark, "at": at, "left": ends[0], "width": ends[1] - ends[0]})
    return marks

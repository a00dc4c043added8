"""Export a folder per customer with the adapter, card and facts, and one page for the fleet."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from lorasweep.advise.pages import plain_text, render
from lorasweep.data import templates
from lorasweep.errors import LorasweepError, ModelError
from lorasweep.fleet.folders import ADAPTER, problems
from lorasweep.fleet.outcome import GAINED, UNKNOWN, WORSE, Outcome, counts, counts_line
from lorasweep.fleet.picture import picture_of
from lorasweep.fleet.serving import BASE, PEFT, Profile, serve_command
from lorasweep.spec.model import ModelSpec
from lorasweep.store import checkpoint, folders
from lorasweep.store.run_store import RunStore

CARD, FACTS, PAGE = "README.md", "facts.json", "index.html"
TEMPLATE = "chat_template.jinja"
"""File that a tokenizer writes its chat template to."""
WriteAdapter = Callable[..., None]
"""(folder, spec, weights, commit of the base): writes a folder for PEFT."""
TokenizerOf = Callable[[ModelSpec], Any]
"""Loads the tokenizer of a base."""
NUMBERS = (
    *("gain", "before", "after", "learning rate", "tried", "rows", "held out", "rank"),
    *("seconds", "GPU-hours"),
)
HEAD = ("customer", *NUMBERS, "notes")
NAMED = 12
"""Maximum number of customers that the page names in a group. The table lists all customers."""


# ---------------------------------------------------------------- folders


def export(
    found: Sequence[Outcome],
    store: RunStore,
    folder: Path,
    title: str,
    save: WriteAdapter,
    tokenizer_of: TokenizerOf,
    profile: Profile = PEFT,
) -> list[Outcome]:
    """Write the folders of customers with an adapter, and the page; return the outcomes.

    Deletes the weights of runs that were not chosen. A customer that has no adapter now, or left
    the table, keeps the folder of an earlier command.
    """
    found = [_export(o, store, folder, save, tokenizer_of, profile) if o.spec else o for o in found]
    chosen = [o for o in found if o.spec is not None]
    for run in (t.run for o in chosen for t in o.tried if t.run != o.spec.id):
        (store.folder(run) / checkpoint.WEIGHTS).unlink(missing_ok=True)
    now = {o.member.folder for o in chosen}
    earlier: dict[str, dict[str, Any]] = {}  # facts of adapters for earlier data or settings
    for path in sorted(folder.glob(f"*/{FACTS}")):
        if path.parent.name not in now and not path.parent.name.startswith("."):
            with suppress(OSError, ValueError):
                facts = json.loads(path.read_text())
                if isinstance(facts, dict) and "run" in facts:  # else a file of the user's
                    earlier[path.parent.name] = facts
    cards: list[dict[str, Any]] = []
    for o in found:
        if o.spec is None:
            cards.append({"error": o.problem, "earlier": earlier.get(o.member.folder)})
        else:
            note = f"folder {o.member.folder}, run {o.spec.id}"
            card = {"error": "", "facts": _facts(o), "note": note, "example": o.plain()["example"]}
            cards.append({**card, "verdict": o.verdict, "gain": o.gain})
    few = len(found) / 2  # the page names the customers of small groups only
    names = [o.member.name or "?" for o in found]
    gone = earlier.keys() - {o.member.folder for o in found}
    page = render(
        "fleet.html",
        title=title,
        counts=counts_line(counts(found)),
        picture=picture_of(found),
        groups=[(k, g, g[:NAMED] if len(g) <= few else []) for k, g in _groups(found).items()],
        head=HEAD,
        numbers=NUMBERS,
        names=names,
        rows=[cells(o) for o in found],
        cards=cards,
        commands=_commands(
            [(o, folder / o.member.folder, f"./{o.member.folder}") for o in chosen],
            profile,
            tokenizer_of,
        ),
        gone=[str(earlier[f].get("name")) for f in sorted(gone)],
    )
    with folders.replaced(folder, PAGE, whole=False) as partial:
        (partial / PAGE).write_text(page, encoding="utf-8", errors="replace")
    return found


def _export(
    outcome: Outcome,
    store: RunStore,
    folder: Path,
    save: WriteAdapter,
    tokenizer_of: TokenizerOf,
    profile: Profile,
) -> Outcome:
    """Replace our files in a customer's folder, unless it is up to date.

    The folder of an earlier version with the chosen run stays if the run's weights are gone.
    """
    mine, facts = folder / outcome.member.folder, json.dumps(outcome.plain(), indent=1)
    earlier = ""
    with suppress(OSError):
        earlier = (mine / FACTS).read_text() if (mine / ADAPTER).is_file() else ""
    if earlier == facts:
        return outcome
    spec, rows = outcome.spec, outcome.member.rows
    weights = checkpoint.load_weights(store.folder(spec.id))
    if weights is None:
        with suppress(ValueError, KeyError, TypeError):
            if json.loads(earlier)["run"] == spec.id:
                return outcome
        problem = (
            f"the weights of run {spec.id} were not kept: another learning rate was chosen before, "
            "or the run is from a sweep. Train it again: python -m lorasweep action=adapter "
            f"run={spec.id} out=FOLDER"
        )
        return dataclasses.replace(outcome, spec=None, result={}, problem=problem)
    member = outcome.member
    largest = profile.largest_rank(member.advised["rank"])
    architecture = member.served.get("architecture", "")
    try:
        tokenizer = tokenizer_of(spec.model)
        served = templates.with_template(spec.dataset, tokenizer)
        if rows.messages:  # none if an earlier version planned the runs
            templates.check(spec.dataset, served, rows.messages, [], rows.example, "example")
        with folders.replaced(mine, FACTS) as partial:
            save(partial, spec, weights, outcome.result.get("base_commit"))
            templates.save(served, rows.stop, partial)
            if wrong := problems(partial, profile, spec.model, largest, architecture):
                raise ModelError(
                    f"{profile.server} would not serve the adapter as trained: {' '.join(wrong)}"
                )
            # text that UTF-8 cannot hold is written with question marks
            command = _commands([(outcome, partial, ".")], profile, tokenizer_of)
            card = _card(outcome, "".join(text for _, text in command))
            (partial / CARD).write_text(card, encoding="utf-8", errors="replace")
            (partial / FACTS).write_text(facts)
    except LorasweepError as error:  # such as a full disk; other customers are served
        return dataclasses.replace(outcome, spec=None, result={}, problem=str(error))
    return outcome


# ---------------------------------------------------------------- cards and table


def _card(outcome: Outcome, serve: str) -> str:
    """Return the card in Markdown, with the head of the hub's model cards.

    `serve`: the command that serves the adapter; '' if there is none.

    Keys of the head: github.com/huggingface/hub-docs, modelcard.md.
    """
    p, spec = outcome.plain(), outcome.spec
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
        name=plain_text(outcome.member.name),
        facts=[(name, plain_text(text)) for name, text in _facts(outcome)],
        example=example,
        fence="`" * max(3, ticks + 1),  # longer than any in the example
        folder=p["folder"],
        serve=serve,
        repository=re.sub("-+", "-", p["folder"]).strip("-"),  # a name that the hub allows
    )


def _facts(outcome: Outcome) -> list[tuple[str, str]]:
    """Return (name, text) for each fact of a trained adapter, by templates/facts.txt."""
    member = outcome.member
    model = member.points[0].spec.model
    text = render("facts.txt", p=outcome.plain(), rows=member.rows, model=model)
    facts = (line.partition(": ") for line in text.split("\n") if line)
    return [(name, fact) for name, _, fact in facts]


def _commands(
    found: Sequence[tuple[Outcome, Path, str]], profile: Profile, tokenizer_of: TokenizerOf
) -> list[tuple[str, str]]:
    """Return (base, command that serves its adapters) for each base and chat template.

    `found`: each adapter with its folder, and with its folder as the command names it.
    """
    groups: dict[tuple[str, str], list[tuple[Outcome, str]]] = {}
    for o, folder, named in found if profile.command else ():
        path = folder / TEMPLATE  # missing if an earlier version wrote the folder
        template = path.read_text() if path.is_file() else ""
        if template == getattr(tokenizer_of(o.spec.model), "chat_template", None):
            template = ""  # the server has it from the base
        groups.setdefault((o.base, template), []).append((o, named))
    commands = []
    for (base, template), own in groups.items():
        command = serve_command(
            profile,
            base if own[0][0].spec.model.source == "hub" else BASE,
            {o.member.folder: named for o, named in own},
            max(o.member.advised["rank"] for o, _ in own),
            f"{own[0][1]}/{TEMPLATE}" if template else "",
        )
        commands.append((base, command))
    return commands


def cells(outcome: Outcome) -> list[str]:
    """Return the customer's row of the table with the columns HEAD."""
    p = outcome.plain()
    if outcome.spec is None:
        return [p["name"] or "?", *[""] * (len(HEAD) - 2), p["error"]]
    held_out = outcome.member.rows.held_out
    notes = [n for n in (outcome.room, outcome.edge and f"{outcome.edge} learning rate") if n]
    if outcome.hurts:
        notes.append("training hurts at every learning rate")
    if (p["steps_done"] or p["steps"]) < p["steps"]:
        notes.append(f"ended early, after {p['steps_done']} of {p['steps']} updates")
    gain = "?"
    if outcome.gain is not None:
        if outcome.verdict != GAINED:
            worse = outcome.verdict == WORSE
            notes.append(WORSE if worse else "gain uncertain")
        gain = f"{outcome.gain:+.3f}"
        if outcome.interval is not None:
            gain += f" ± {outcome.interval[1] - outcome.gain:.3f}"
    if p["advised"] == "full":
        notes.append("the adviser says full fine-tuning")
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
        f"{p['seconds_used']:,.0f}",
        f"{p['gpu_hours_used']:.3g}",
        ", ".join(notes),
    ]


def _groups(found: Sequence[Outcome]) -> dict[str, list[int]]:
    """Group the customers by result: label -> indices in `found`. Empty groups are left out."""
    trained = {k: o for k, o in enumerate(found) if o.spec is not None}
    held = [k for k, o in trained.items() if o.gain is not None]
    of = {v: [k for k in held if found[k].verdict == v] for v in (GAINED, WORSE, UNKNOWN)}
    groups = {
        "without an adapter": [k for k in range(len(found)) if k not in trained],
        "gained, on test rows": of[GAINED],
        "got worse, on test rows": of[WORSE],
        "gain uncertain: its 95% interval contains 0, or there is none": of[UNKNOWN],
        "gain not measured, as no row was held out": [k for k in trained if k not in held],
        "best learning rate at the edge of those tried": [k for k, o in trained.items() if o.edge],
        "training hurts at every learning rate, on validation rows": [
            k for k, o in trained.items() if o.hurts
        ],
        "data above half of the capacity of the rank": [k for k in held if found[k].room],
    }
    return {label: group for label, group in groups.items() if group}


def summary_lines(found: Sequence[Outcome]) -> list[str]:
    """Return lines with the number of customers, in total and in each group."""
    groups = {k: v for k, v in _groups(found).items() if k != "without an adapter"}
    return [counts_line(counts(found)), *(f"{len(g)} {label}" for label, g in groups.items())]

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
from lorasweep.fleet.outcome import GAINED, UNKNOWN, WORSE, Outcome, counts, counts_line
from lorasweep.fleet.serving import ADAPTER, BASE, PEFT, Profile, problems, serve_command
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
LABELS = {GAINED: "gained", WORSE: "got worse", UNKNOWN: "gain uncertain"}
"""Verdict on the gain on test rows -> note. It is uncertain if its 95% interval contains 0."""


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
    for run in (t["run"] for o in chosen for t in o.tried if t["run"] != o.spec.id):
        (store.folder(run) / checkpoint.WEIGHTS).unlink(missing_ok=True)
    now = {o.member.folder for o in chosen}
    earlier: dict[str, dict[str, Any]] = {}  # facts of adapters for earlier data or settings
    for path in sorted(folder.glob(f"*/{FACTS}")):
        if path.parent.name not in now and not path.parent.name.startswith("."):
            with suppress(OSError, ValueError):
                facts = json.loads(path.read_text())
                if isinstance(facts, dict) and "run" in facts:  # else a file of the user's
                    earlier[path.parent.name] = facts
    customers = [o.facts() for o in found]
    here = [(o, folder / o.member.folder, f"./{o.member.folder}") for o in chosen]
    gone = earlier.keys() - {o.member.folder for o in found}
    page = render(
        "fleet.html",
        title=title,
        counts=counts_line(counts(found)),
        marks=_marks(customers),
        groups=_groups(customers),
        named=NAMED,
        head=HEAD,
        numbers=NUMBERS,
        labels=LABELS,
        kinds={GAINED: "gained", WORSE: "worse", UNKNOWN: "unknown"},
        rows=[cells(p) for p in customers],
        cards=[
            (p, _card_lines(o) if o.spec else [], earlier.get(o.member.folder))
            for o, p in zip(found, customers)
        ],
        commands=_commands(here, profile, tokenizer_of),
        gone=[str(earlier[name].get("name")) for name in sorted(gone)],
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

    A folder with the chosen run stays if the run's weights are gone.
    """
    member, spec, facts = outcome.member, outcome.spec, json.dumps(outcome.facts(), indent=1)
    mine, rows, there = folder / member.folder, member.rows, ""
    with suppress(OSError):
        there = (mine / FACTS).read_text() if (mine / ADAPTER).is_file() else ""
    if there == facts:
        return outcome
    weights = checkpoint.load_weights(store.folder(spec.id))
    try:
        if weights is None:
            if f'"run": "{spec.id}"' in there:
                return outcome
            raise ModelError(
                f"the weights of run {spec.id} were not kept: another learning rate was chosen "
                "before, or the run is from a sweep. Train it again: python -m lorasweep "
                f"action=adapter run={spec.id} out=FOLDER"
            )
        served = templates.with_template(spec.dataset, tokenizer_of(spec.model))
        templates.check(spec.dataset, served, rows.messages, [], rows.example, "example")
        with folders.replaced(mine, FACTS) as partial:
            save(partial, spec, weights, outcome.result.get("base_commit"))
            templates.save(served, rows.stop, partial)
            largest = profile.largest_rank(member.advised["rank"])
            architecture = member.served.get("architecture", "")
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


# ---------------------------------------------------------------- cards, commands, table, picture


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
    """Return (name, text) for each fact of a trained adapter, by templates/facts.txt."""
    text = render("facts.txt", p=outcome.facts(), rows=outcome.member.rows, spec=outcome.spec)
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
        path = folder / TEMPLATE
        template = path.read_text() if path.is_file() else ""
        if template == getattr(tokenizer_of(o.spec.model), "chat_template", None):
            template = ""  # the server has it from the base
        groups.setdefault((o.facts()["base"], template), []).append((o, named))
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


def _notes(p: dict[str, Any]) -> list[str]:
    """Return what is notable of a customer: the labels of its groups, and notes in the table."""
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


def _groups(found: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """Group the customers by their notes: note -> indices in `found`."""
    groups: dict[str, list[int]] = {}
    for k, p in enumerate(found):
        for note in _notes(p):
            groups.setdefault(note, []).append(k)
    return groups


def summary_lines(found: Sequence[Outcome]) -> list[str]:
    """Return lines with the number of customers, in total and in each group."""
    groups = _groups([o.facts() for o in found if o.spec])
    return [counts_line(counts(found)), *(f"{len(g)} {label}" for label, g in groups.items())]


def _marks(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a mark for each measured gain, the largest first; places in percent of the width.

    The axis contains 0 and all gains. It ends where the intervals end, or beyond the gains by their
    range, so that one wide interval does not hide the others.
    """
    shown = [(k, p) for k, p in enumerate(found) if not p["error"] and p["gain"] is not None]
    gains = [0.0, *(p["gain"] for _, p in shown)]
    ends = [*gains, *(end for _, p in shown for end in p["gain_interval"] or ())]
    spread = max(gains) - min(gains) or 1.0
    low, high = max(min(ends), min(gains) - spread), min(max(ends), max(gains) + spread)

    def at(gain: float) -> float:
        return round(4 + 92 * (min(max(gain, low), high) - low) / (high - low or 1.0), 1)

    marks = []
    for k, p in sorted(shown, key=lambda found: -found[1]["gain"]):
        said, ends = f"{p['gain']:+.3g} nats per token, {p['gained']}", [at(p["gain"])] * 2
        if p["gain_interval"] is not None:
            said += ", 95% interval {:+.3g} to {:+.3g}".format(*p["gain_interval"])
            ends = [at(end) for end in p["gain_interval"]]
        mark = {"k": k, "name": p["name"], "said": said, "verdict": p["gained"], "zero": at(0.0)}
        marks.append({**mark, "at": at(p["gain"]), "left": ends[0], "width": ends[1] - ends[0]})
    return marks

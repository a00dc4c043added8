"""Choose a customer's learning rate, measure the gain, and export folders, cards and the page.

A customer's runs: a trial for each learning rate, measured on validation rows. When the best one is
known, a run at its learning rate takes the weights of the trial and is measured on test rows.
"""

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lorasweep.advise.pages import plain_text, render
from lorasweep.advise.rules import APART, FULL, ROOM
from lorasweep.data import templates
from lorasweep.errors import LorasweepError, ModelError
from lorasweep.fleet.runs import Member
from lorasweep.fleet.serving import ADAPTER, PEFT, Profile, problems
from lorasweep.spec.metric import CURVE_START
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import LR_RANGE, RunSpec
from lorasweep.store import checkpoint, folders
from lorasweep.store.run_store import FINAL, TRIAL, Result, RunStore
from lorasweep.sweep.grid import Point

CHOSEN_BY = "test_nll_curve"
"""Key of a result: the final loss on validation rows."""
MOST_TRIED = 6
"""Most learning rates that are tried until the best one is neither the lowest nor the highest."""
GAINED, WORSE, UNKNOWN = "gained", "got worse", "not known"
Tokenizers = Callable[[ModelSpec], Any]
"""Base -> its tokenizer."""
ResultOf = Callable[[str], Result | None]
"""Run id -> result; None: the run has not ended."""
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


@dataclass(frozen=True)
class Outcome:
    """A customer and the run that was chosen for it."""

    member: Member
    problem: str
    """Why no run was chosen; empty if one was chosen."""
    states: dict[str, str] = field(default_factory=dict)
    """State of each run of the customer, by id: the trials, and the run that was measured."""
    tried: list[dict[str, Any]] = field(default_factory=list)
    """Learning rate, id, state and final validation loss (None: there is none) of each trial."""
    spec: RunSpec | None = None
    """The chosen run; None: no run can be chosen."""
    result: dict[str, Any] = field(default_factory=dict)
    used: dict[str, Any] = field(default_factory=dict)
    """Seconds of training and measuring of all runs, and GPU-hours of those on GPUs."""
    hurts: bool = False
    """Whether training at any learning rate raises the loss on validation rows."""

    @property
    def open(self) -> bool:
        """Whether some runs are unfinished, and no run failed."""
        states = set(self.states.values())
        return not self.spec and "failed" not in states and not states <= set(FINAL)

    def facts(self) -> dict[str, Any]:
        """Return the content of the card as JSON values; without runs, only name and error.

        The gain is the decrease of the loss on test rows in nats per token. Its 95% interval is by
        Student's t over the prompts of the test rows, or over the test rows if they were not split
        by prompt (gain_se in train/objectives/held_out.py).
        """
        m, found, spec = self.member, self.result, self.spec
        if m.problem:
            return {"name": m.name, "folder": None, "error": m.problem}
        first, rows, load = m.points[0].spec, m.rows, m.advised["load"]
        data, method, gain, interval, verdict = first.dataset, first.method, None, None, None
        if spec is not None:
            verdict = UNKNOWN
            if rows.held_out:
                gain, error = found["nll_start"] - found["test_nll"], found.get("gain_se")
                if error is not None:
                    from scipy.special import stdtrit  # takes a moment to load

                    n = found.get("n_test_prompts", found["n_test"])
                    half = float(stdtrit(n - 1, 0.975)) * error
                    interval = (gain - half, gain + half)
                    verdict = GAINED if gain > half else WORSE if gain < -half else UNKNOWN
        source = f"{data.location}{f':{data.config}' if data.config else ''}"
        if data.source != "hub":  # only the last folder of the path
            source = f"{Path(data.location).name}/{data.train_split}.{data.source}".lstrip("/")
        room, edge, rates = "", "", [t["lr"] for t in self.tried]
        if not rows.held_out:
            room = "too few unique rows to hold any out"
        elif load is not None and load > ROOM:
            room = f"the data take more than {'all' if load > FULL else 'half'} of the capacity"
        if spec is not None and len(rates) > 1 and not self.hurts:
            edge = {rates[0]: "lowest", rates[-1]: "highest"}.get(spec.lr, "")
        stopping = m.not_early and f"off, so it made all {first.steps} updates: {m.not_early}"
        if first.early_stopping and found.get("steps_done"):
            stopping = (
                f"ended after update {found['steps_done']} of {first.steps} (patience "
                f"{first.early_stopping}); the weights are those of update {found.get('best_step')}"
            )
        of_result = ("n_test_prompts", "steps_done", "best_step", "gain_se", "tokens")
        of_data = ("revision", "n_validation", "render", "mask", "max_length")
        return {
            "name": m.name,
            "folder": m.folder,
            "error": self.problem or None,
            "base": first.model.location if first.model.source == "hub" else first.model.name,
            "run": spec.id if spec else None,
            "lr": spec.lr if spec else None,
            "tried": self.tried,
            "edge": edge,
            "hurts": self.hurts,
            "rank": m.advised["rank"],
            **{key: method.plain()[key] for key in ("alpha", "layers")},
            "tied": first.model.tied and "unembedding" in method.target_layers(),
            "data": source,
            **{key: getattr(data, key) for key in of_data},
            "template": data.template if data.format == "prompt_completion" else None,
            "license": m.license,
            "n_train": found.get("n_train", rows.n_train),
            **{f"n_{k}": getattr(rows, k) for k in ("repeated", "same_prompt", "left_out")},
            "prompts_shared": rows.held_out
            and rows.same_prompt > 0
            and data.held_out_by != "prompt",
            "n_test": found.get("n_test", data.n_test) if rows.held_out else 0,
            "example": [{"text": text, "in_loss": in_loss} for text, in_loss in rows.example],
            **{key: getattr(rows, key) for key in ("end", "messages", "stop")},
            **{key: getattr(first, key) for key in ("steps", "batch_size")},
            **{key: found.get(key) for key in of_result},
            "early_stopping": stopping,
            "loss_before": found.get("nll_start"),
            "loss_after": found.get("test_nll"),
            "gain": gain,
            "gain_interval": interval,
            "gained": verdict,
            "seconds": found.get("wall_s"),
            **(self.used or {"seconds_used": 0.0, "gpu_hours_used": 0.0}),
            "room": room,
            "advised": m.advised["method"],
            "advised_why": m.advised["why"],
            "advised_lr": m.advised["lr_source"],
            "warnings": m.advised["warnings"],
            **({"served": m.served} if m.served else {}),
        }


def with_further(points: Sequence[Point], store: RunStore, go_on: bool) -> list[Point]:
    """Return the runs that customers need, as far as the results of earlier runs tell.

    For each customer: the trials, lowest learning rate first, then the run that is measured.

    Args:
        points: runs of the customers, at least at the learning rates to begin with.
        go_on: while a customer's best learning rate is the lowest or the highest, add the next one
            beyond it, a factor APART away; at most MOST_TRIED in all, and none lower where
            training hurts at every learning rate (`hurts`).
    """
    by_arm: dict[str, dict[float, RunSpec]] = {}
    for p in points:
        by_arm.setdefault(p.arm, {})[p.spec.lr] = p.spec
    result, found = cache(store.result), []
    for arm, by_lr in by_arm.items():
        runs = [replace(by_lr[lr], test_rows=True) for lr in sorted(by_lr)]
        if len(runs) > 1:
            runs = [run.trial for run in runs]
            while go_on and len(runs) < MOST_TRIED and (best := _best(runs, result)):
                lr = best.lr * {runs[0].id: 1 / APART, runs[-1].id: APART}.get(best.id, 0)
                if not LR_RANGE[0] <= lr <= LR_RANGE[1] or hurts(runs, result):
                    break  # 0: the best is inside
                runs = sorted([*runs, replace(best, lr=lr)], key=lambda run: run.lr)
            best = _best(runs, result)
            if best and _loss(best, result) < math.inf:
                runs.append(replace(best, test_rows=True))
        found += [Point(arm, run) for run in runs]
    return found


def hurts(runs: Sequence[RunSpec], result: ResultOf) -> bool:
    """Return whether training at any learning rate raises the loss on validation rows.

    It does if the loss is lowest at the lowest learning rate, and a parabola through the losses
    there, at the next one, and before training (learning rate 0) rises from its beginning. False if
    a loss is not known.
    """
    start = (result(runs[0].id) or {}).get(CURVE_START)
    if start is None or len(runs) < 2 or _best(runs, result) != runs[0]:
        return False
    change, next_change = (_loss(run, result) - start for run in runs[:2])
    return next_change < math.inf and (runs[1].lr / runs[0].lr) ** 2 * change >= next_change


def _best(runs: Sequence[RunSpec], result: ResultOf) -> RunSpec | None:
    """Return the run with the lowest validation loss, in a tie the one with the lowest rate.

    None if some have not ended.
    """
    if not all(result(run.id) for run in runs):
        return None
    return min(runs, key=lambda run: (_loss(run, result), run.lr))


def _loss(run: RunSpec, result: ResultOf) -> float:
    """Return the validation loss of a run that has ended; infinity if it broke on any rows."""
    both = [result(run.id) or {}, result(replace(run, test_rows=True).id) or {}]
    loss = both[0].get(CHOSEN_BY)
    broke = loss is None or any(found.get("state") == "diverged" for found in both)
    return math.inf if broke else loss


def outcome_of(member: Member, store: RunStore) -> Outcome:
    """Choose the learning rate with the lowest validation loss; in a tie, the lowest such rate.

    No learning rate is chosen before all runs of the customer have ended.
    """
    if member.problem:
        return Outcome(member, member.problem)
    states, result = store.states(p.id for p in member.points), cache(store.result)
    by_lr: dict[float, RunSpec] = {}  # the trials come first
    for p in member.points:
        by_lr.setdefault(p.spec.lr, p.spec)
    runs, tried = list(by_lr.values()), []
    for run in runs:
        loss = _loss(run, result) if states[run.id] == "done" else math.inf
        one = {"lr": run.lr, "run": run.id, "state": states[run.id]}
        tried.append({**one, "validation": loss if loss < math.inf else None})
    best, chosen = _best(runs, result), None
    if best and (len(runs) == 1 or _loss(best, result) < math.inf):
        chosen = replace(best, test_rows=True)
        states.setdefault(chosen.id, store.state(chosen.id))
    unfinished = [i for i, state in states.items() if state not in FINAL]
    failed = next((i for i in unfinished if states[i] == "failed"), None)
    if failed is not None:
        problem = f"{store.failure(failed)} (run {failed}; try again: exec.retry=true)"
    elif unfinished:
        problem = f"not trained yet: {len(unfinished)} of {len(states)} runs"
        if killed := max(map(store.failures, unfinished)):
            problem += f"; a run was killed {killed} times. Try fewer exec.workers"
    elif chosen is None or states[chosen.id] == "diverged":
        problem = f"every learning rate diverged: {', '.join(f'{run.lr:g}' for run in runs)}"
    else:
        final = result(chosen.id) or {}
        # the seconds of the chosen run include its trial's
        of = [i for i in states if i != final.get(TRIAL)]
        seconds = {i: (result(i) or {}).get("wall_s") or 0.0 for i in of}
        on_gpus = sum(s for i, s in seconds.items() if store.env(i).get("gpu"))
        used = {"seconds_used": sum(seconds.values()), "gpu_hours_used": on_gpus / 3600}
        return Outcome(member, "", states, tried, chosen, final, used, hurts(runs, result))
    return Outcome(member, problem, states, tried)


def counts(found: Sequence[Outcome]) -> dict[str, int]:
    """Count customers: all, those with an adapter, those not trained yet, those with an error."""
    trained, open_ = sum(o.spec is not None for o in found), sum(o.open for o in found)
    errors = len(found) - trained - open_
    return {"customers": len(found), "adapters": trained, "open": open_, "errors": errors}


def counts_line(values: Mapping[str, int]) -> str:
    """Return the counts in words."""
    text = (
        "{customers} customer{s}: {adapters} adapters, {open} not trained yet, {errors} with errors"
    )
    return text.format(**values, s="" if values["customers"] == 1 else "s")


# ---------------------------------------------------------------- folders, cards and the page


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
        served = templates.with_template(spec.dataset, tokenizer_of(spec.model))
        templates.check(spec.dataset, served, rows.messages, [], rows.example, "example")
        with folders.replaced(mine, FACTS) as partial:
            save(partial, spec, weights, outcome.result.get("base_commit"))
            templates.save(served, rows.stop, partial)
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
    """Return (name, text) for each fact of a trained adapter, by templates/facts.txt."""
    text = render("facts.txt", p=outcome.facts(), rows=outcome.member.rows, spec=outcome.spec)
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

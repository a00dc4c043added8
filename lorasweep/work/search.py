"""The runs that a request has so far, and a search of learning rates: its runs and its answer."""

import dataclasses
import json
import math
import re
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.advise import rates
from lorasweep.advise.rates import law
from lorasweep.advise.rules import family_of, law_rate, texts
from lorasweep.config.compose import quoted
from lorasweep.config.folders import exec_of
from lorasweep.data import tokenizing
from lorasweep.errors import LorasweepError, SpecError, StoreError
from lorasweep.fleet import score
from lorasweep.fleet.choice import with_further
from lorasweep.fleet.rows import shown
from lorasweep.launch.pack import END
from lorasweep.launch.torch_trainer import TorchTrainer
from lorasweep.plan import detect
from lorasweep.plan.budget import parse_budget
from lorasweep.plan.detect import hardware_of
from lorasweep.plan.planner import place
from lorasweep.spec.metric import METRICS, metric_of
from lorasweep.spec.recommended import RANKS
from lorasweep.spec.run import RunSpec
from lorasweep.store import checkpoint, folders, looks
from lorasweep.store.exported import load_runs
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import (
    Point,
    added_points,
    curve_key,
    fields_of,
    lrs_around_optimum,
    second_stage,
)
from lorasweep.sweep.question import axes_of
from lorasweep.sweep.request import Request, question
from lorasweep.sweep.search import (
    LOWEST,
    MIN_SEEDS,
    WORDS,
    Look,
    arm_key,
    arm_names,
    is_short,
    search,
)
from lorasweep.work import answer
from lorasweep.work.answer import look
from lorasweep.work.printed import Answer, duration, notifier, table

if TYPE_CHECKING:
    import pandas as pd

ANSWER = "lorasweep.json"
"""File with the results and the answer in the folder of the best run of a search."""
FLAGS = {
    "bounded_by_divergence": "next to one that diverges",
    "at_edge": "the last one that was tried",
    "few_points": "few were tried",
    "no_variance": "too few seeds",
    "mixed_versions": "of several versions of the trainer",
    "flat": "several are equally good",
    **{rf"{name} r(\d+)": rf"{words} rank \1" for name, words in WORDS.items()},
    "fullft": WORDS["fullft"],
}
"""Doubts about a best learning rate, and names of arms, in words."""


def all_points(request: Request, store: RunStore) -> list[Point]:
    """Return the runs of the grid, of the second stage of finished curves, and of added rounds.

    For a fleet: the trials so far, and the runs that are measured on test rows.
    """
    if request.parts:
        return list({p.id: p for part in request.parts for p in all_points(part, store)}.values())
    points = list(request.points)
    if request.members:
        return with_further(points, store, go_on="rates" not in request.given)
    if request.sweep is None:
        return points
    if is_search(request):
        points = _searched(request, store)
    elif request.sweep.replicate.seeds:
        results = {p.id: store.result(p.id) or {} for p in points}
        unfinished = {curve_key(p) for p in points if not results[p.id]}
        over = [p for p in points if curve_key(p) not in unfinished]
        points += second_stage(over, request.sweep.replicate, lambda rid: final_loss(results[rid]))
    return points + added_points(looks.read(looks.path_of(store.root, request.title)), points)


def as_begun(request: Request, typed: Sequence[str], compose: Callable[..., Request]) -> Request:
    """Return a search with version 0.3's ranks if only such a search has begun; else `request`."""
    store = RunStore(request.exec.runs_dir)
    keys = {t.partition("=")[0].lstrip("+~") for t in typed}
    named = keys & {"lora.rank", "sweep.arms", "sweep.arms.lora", "sweep.arms.lora.rank"}
    if request.sweep_name != "tune" or named or not store.root.is_dir():
        return request

    def begun(asked: Request) -> bool:
        assert asked.sweep is not None and asked.sweep.search is not None
        nothing: Any = (lambda rid: None, lambda known, new: True, lambda points: (True, {}))
        first = search(_starts(asked), asked.sweep.search, *nothing)
        return any(store.folder(p.id).is_dir() for p in first if p.spec.method.name != "fullft")

    earlier = compose([*typed, "sweep.arms.lora.rank=[8,32]"])
    if begun(request) or not begun(earlier):
        return request
    words = "resuming the search of ranks 8 and 32, the default of version 0.3; another: lora.rank="
    notifier(request, always=True)(words + ",".join(map(str, RANKS)))
    return earlier


def final_loss(result: Mapping[str, Any], on_validation: bool = False) -> float | None:
    """Return a run's final metric as a loss, lower is better; None if the run diverged."""
    metric = metric_of(result)
    value = result.get(metric.on_part) if on_validation else metric.value(result)
    return metric.loss(value) if value is not None and result.get("state") == "done" else None


def judged(request: Request, points: Sequence[Point]) -> list[Point]:
    """Return the runs that the analysis judges: all but the short runs of a search."""
    return [p for p in points if not (is_search(request) and is_short(p, request.points))]


def table_of(request: Request, store: RunStore, points: Sequence[Point]) -> "pd.DataFrame":
    """Return the finished ones of these runs as a table; of a search with the names of its arms."""
    found, of = load_runs(store.root, [p.id for p in points]), {p.id: arm_key(p) for p in points}
    if is_search(request) and len(found):
        names = arm_names(request.points)
        found["arm"] = [names[of[rid]] for rid in found["run_id"]]
    return found


def is_search(request: Request) -> bool:
    """Return whether the sweep searches learning rates."""
    return request.sweep is not None and request.sweep.search is not None


def _searched(request: Request, store: RunStore) -> list[Point]:
    """Return the runs of a search so far, within its budget."""
    assert request.sweep is not None and request.sweep.search is not None
    results, first = cache(store.result), request.points[0].spec
    budget = parse_budget(request.budget, first.steps)

    def loss(rid: str) -> float | None:
        if (result := results(rid)) is None:
            return None
        found = final_loss(result, on_validation=first.dataset.n_validation > 0)
        return math.inf if found is None else found

    def may_begin(known: Sequence[Point], new: Sequence[Point]) -> bool:
        return budget is None or budget.allows(new, known, store)

    def look_at(points: Sequence[Point]) -> Look:
        full = judged(request, points)
        key = (request.title, *(p.id for p in full))
        if key not in _LOOKS:
            _LOOKS[key] = look(table_of(request, store, full), question(request))
        return _LOOKS[key]

    own = _own_rates(request)

    def unless_given(of: RunSpec, known: RunSpec, lr: float) -> float | None:
        return None if of in own else law(of, known, lr)

    return search(_starts(request), request.sweep.search, loss, may_begin, look_at, unless_given)


def _own_rates(request: Request) -> set[RunSpec]:
    """Return the runs of arms that state learning rates."""
    arms = request.sweep.arms if request.sweep else {}
    return {p.spec for p in request.points if "lr" in fields_of(axes_of(arms.get(p.arm, {})))}


def _starts(request: Request) -> list[Point]:
    """Return a run for each arm of a search, at the learning rate to start from."""
    own = _own_rates(request)
    return [p if "lr" in request.given or p.spec in own else start_of(p) for p in request.points]


_LOOKS: dict[tuple[str, ...], Look] = {}
"""(title, run ids) -> the analysis of these finished runs, for the time of a command."""


def start_of(point: Point) -> Point:
    """Return the run at the published learning rate for its method and width."""
    spec = point.spec
    kind = "full" if spec.method.name == "fullft" else "lora"
    families = [family_of(spec.model)] if family_of(spec.model) else ["llama", "qwen"]
    laws = [law_rate(texts("published"), str(f), spec.model.hidden_size, kind) for f in families]
    lr = math.prod(law for law in laws if law) ** (1 / len(laws))
    return Point(point.arm, dataclasses.replace(spec, lr=lr))


def search_lines(request: Request) -> list[str]:
    """Say what a search takes, if the sweep is one."""
    if request.sweep is None or request.sweep.search is None:
        return []
    how, n, steps = request.sweep.search, len(request.points), request.points[0].spec.steps
    known = next((p for p in request.points if p.spec.method.name == "lora"), request.points[0])
    lr = start_of(known).spec.lr
    n_law = sum(p != known and bool(rates.law(p.spec, known.spec, lr)) for p in request.points)
    wide = how.n_full + (how.n_short - how.n_lrs) / how.prefix  # n_lrs short runs go on
    first = n_law * how.n_lrs + (n - n_law) * wide
    short = f"short runs of {how.short_steps(steps)} updates find the range, " * (how.prefix > 1)
    return [
        f"search of {n} arm(s): {short}runs of {steps} updates judge: about {first:.0f} of full "
        f"length, and {n * how.n_lrs} with each of up to {how.seeds} fresh seeds, of which an "
        f"answer needs {MIN_SEEDS - 1}"
    ]


def prune(request: Request, store: RunStore, points: Sequence[Point]) -> None:
    """Delete states and weights that no later run and no export needs.

    Kept: the weights of the best run at each of the learning rates around the best one, of each
    arm, for the best one may still change; weights that the user asked to keep; and the final
    states of short runs until full runs have begun from them.
    """
    fresh = any(p.spec.seed != request.points[0].spec.seed for p in points)
    full = {p.id for p in judged(request, points) if store.result(p.id)}
    curves: dict[tuple[str, str], list[Point]] = {}
    for p in points:
        if is_short(p, request.points):
            steps = request.points[0].spec.steps
            if fresh or dataclasses.replace(p.spec, steps=steps).id in full:
                shutil.rmtree(store.folder(p.id) / END, ignore_errors=True)
        elif p.id in full:
            curves.setdefault(arm_key(p), []).append(p)
    for mine in curves.values():
        by_lr = _by_lr(mine, store)
        means = {lr: sum(losses.values()) / len(losses) for lr, losses in by_lr.items()}
        near = lrs_around_optimum(means, request.sweep.search.n_lrs)
        kept = {min(by_lr[lr], key=by_lr[lr].__getitem__) for lr in near}
        for p in mine:
            name = request.exec.prune_weights  # empty: the user keeps them
            if p not in kept and name and store.env(p.id).get("prune_weights") == name:
                (store.folder(p.id) / checkpoint.WEIGHTS).unlink(missing_ok=True)


def _by_lr(points: Sequence[Point], store: RunStore) -> dict[float, dict[Point, float]]:
    """Return the runs of an arm by learning rate, each with its loss on the rows that choose."""
    found: dict[float, dict[Point, float]] = {}
    for p in points:
        loss = final_loss(store.result(p.id) or {}, p.spec.dataset.n_validation > 0)
        found.setdefault(p.spec.lr, {})[p] = math.inf if loss is None else loss
    return found


def check_search(request: Request) -> None:
    """Raise an error if an arm does not fit, or request.out cannot be written or served."""
    machine = hardware_of(request.hardware) if request.hardware else detect.this_machine()
    room, rows = machine.worker_gib or math.inf, request.exec.micro_batch_size
    for p in request.points if request.cluster.kind == "local" else ():
        if (need := place(p.spec, machine, rows=rows).memory_gib) > room:
            raise SpecError(
                f"{p.arm} takes {need:.0f} GiB, and the memory has {room:.0f}. Leave it out with "
                "arms=[NAME] of the others, or choose a smaller model or dataset.max_length."
            )
    if request.out:
        models = {p.spec.model for p in request.points}
        folders.check(Path(request.out).expanduser(), ANSWER, request.exec, models)
        _served(request)


def _served(request: Request) -> tuple[Any, dict[str, Any]]:
    """Return the tokenizer with the rows' chat template, and `shown`; nothing without text."""
    from lorasweep.models import load

    spec, fetched = request.points[0].spec, request.cluster.kind == "slurm"
    if spec.dataset.source == "synthetic":
        return None, {}
    tokenizer = load.tokenizer_of(spec.model, request.exec.models_dir, fetched)
    served = tokenizing.with_template(spec.dataset, tokenizer)
    form = shown(spec.dataset, [], tokenizer)
    tokenizing.check_served(spec.dataset, served, form["messages"], [], form["example"], "example")
    return served, form


def finish(
    request: Request, store: RunStore, points: Sequence[Point], results: dict[str, Any], status: int
) -> Answer:
    """Return the answer, and write the best run into request.out; if not, with exit status 1."""
    from lorasweep.models import load  # only here: it imports torch

    prune(request, store, points)
    names, arms = arm_names(request.points), dict[str, list[Point]]()
    for p in judged(request, points):
        arms.setdefault(names[arm_key(p)], []).append(p)
    lowest = max((min(p.spec.lr for p in own) for own in arms.values()), default=math.inf)
    conclusion, written = conclude(request, results, lowest), not request.out
    n_seeds = len({p.spec.seed for p in points})
    if lost := [p.id for p in points if store.last_attempt(p.id) and not store.result(p.id)]:
        conclusion["open"].insert(0, f"{len(lost)} runs that did not finish, such as {lost[0]}")
    if conclusion["open"] and n_seeds > request.sweep.search.seeds:
        conclusion["open"].append(f"all {n_seeds} seeds are used")
    if budget := parse_budget(request.budget, request.points[0].spec.steps):
        used = budget.used(points, store)
        words = f"{used:.3g} runs" if budget.unit == "runs" else duration(used)
        words += " of GPUs" * (budget.unit == "gpuh")
        conclusion["budget"] = {"given": budget.text, "used": words}
    if request.out and conclusion["method"] is None:
        conclusion["out"] = f"nothing is written to {request.out}"
    if conclusion["method"] is not None:
        arm = next(a for a in results["arms"] if a["arm"] == conclusion["arm"])
        by_lr = _by_lr(arms[arm["arm"]], store)
        tried = arm["best_tried"] or conclusion["lr"]
        # of the seeds at the learning rate that the answer chose
        lr = min(by_lr, key=lambda lr: abs(math.log(lr / tried)))
        best = min(by_lr[lr], key=by_lr[lr].__getitem__)
        conclusion["score"] = score.count(best.spec, request, TorchTrainer())
    if request.out and conclusion["method"] is not None:
        out, (served, form) = Path(request.out).expanduser(), _served(request)
        conclusion["out"] = f"written to {request.out} (learning rate {lr:g})"
        try:
            weights = checkpoint.load_weights(store.folder(best.id))
            if weights is None:
                raise StoreError(
                    f"the weights of run {best.id} were not kept (another command trained it, "
                    "several processes did, or the disk was nearly full). To train it again: "
                    + _command_of(best.id, request)
                )
            with folders.replaced(out, ANSWER) as partial:
                commit = (store.result(best.id) or {}).get("base_commit")
                load.write_adapter(partial, best.spec, weights, commit, request.exec.models_dir)
                if served:
                    tokenizing.save_tokenizer(served, form["stop"], partial)
                content = {k: v for k, v in conclusion.items() if k != "out"}
                content = {**results, "answer": content, "prompt_form": form}
                (partial / ANSWER).write_text(json.dumps(content, indent=1))
            written = True
        except LorasweepError as error:
            conclusion["out"] = f"not written to {request.out}: {error}"
    value, lines = {**results, "answer": conclusion}, _lines(request, results, conclusion)
    return Answer(value, lines, status if written else max(status, 1))


def _command_of(rid: str, request: Request) -> str:
    """Return the command that trains a run again and writes its weights, as a shell takes it."""

    def said(value: Any) -> str:
        if isinstance(value, list):
            return f"[{','.join(map(said, value))}]"
        return value if re.fullmatch(r"[\w./-]+", value) else quoted(value)

    words = ["lorasweep", "adapter", rid, f"out={said(request.out.rstrip('/') + f'-{rid}')}"]
    keys = ("runs_dir", "models_dir", "data_dir", "trainer_files")
    given = {k: v for k in keys if (v := getattr(request.exec, k)) != getattr(exec_of({}), k)}
    return shlex.join([*words, *(f"exec.{k}={said(v)}" for k, v in given.items())])


def conclude(request: Request, results: Mapping[str, Any], lowest: float = 0.0) -> dict[str, Any]:
    """Return the setting to use and why, and what the runs have not decided.

    `lowest`: the learning rate down to which all arms had full runs.
    """
    arms = {arm["arm"]: arm for arm in results["arms"]}
    best, spec, start = results["best"], request.points[0].spec, results["start"]
    outcome = next((v["outcome"] for v in results["verdicts"]), "")
    names = arm_names(request.points)
    methods = {names[arm_key(p)]: p.spec.method.plain() for p in request.points}
    absent = [name for name in methods if name not in arms]
    chosen, reference = (arms.get(results[k]) for k in ("best", "reference"))
    full, lora = (arm and arm["loss"] for arm in (reference, chosen))
    refuted = outcome == "REFUTED" and best == results["judged"]
    lost = 0.0  # share of full fine-tuning's gain that the best of the others gives up, as measured
    if None not in (full, lora, start) and start > full:
        lost = (lora - full) / (start - full)
    others = [(a["method"], a["rank"]) for a in arms.values() if a is not reference]
    by_rank = len({method for method, _ in others}) == 1 and len({*others}) == len(others)
    why = "the smallest rank" if by_rank else "the fewest trained weights"
    why += " within 1% of the gain of the best one"
    if chosen is None:
        chosen, why = reference, "the only method that trains"
    elif reference and (refuted or (outcome != "SUPPORTED" and lost > results["allowed"])):
        chosen, why = reference, f"{best} gives up {100 * lost:.0f}% of the gain"
        why += ", not decided" * (outcome == "UNDECIDED")
    lr = chosen and (chosen["best_lr"]["value"] or chosen["best_tried"])
    end, more, loss = LOWEST * request.sweep.search.wide, list[str](), chosen and chosen["loss"]
    if lr and chosen["best_tried"] and not 0.5 <= lr / chosen["best_tried"] <= 2:
        more = [f"the fit says {lr:.1e}, far from the best learning rate that was tried"]
        lr = chosen["best_tried"]  # such as of a curve with two valleys
    trains = lr and lr >= end
    if not trains or (None not in (start, loss) and loss >= start):
        why = f"no learning rate, tried from {lowest:.1e} on, lowers the loss on "
        why += f"{results['chosen_on']} and test rows"
        if not trains and lowest >= end:
            more += ["lower learning rates, which were not tried"]
        chosen, lr = dict.fromkeys(("arm", "method", "rank")), None
    more += [f"{name}, of which no run of full length has finished" for name in absent]
    return {
        **{k: chosen[k] for k in ("arm", "method", "rank")},
        "layers": methods[chosen["arm"]].get("layers") if lr else None,
        "lr": lr,
        "steps": spec.steps,
        "batch_size": spec.batch_size,
        "why": why,
        "open": [*more, *answer.open_questions(dict(results))],
    }


def _lines(request: Request, results: Mapping[str, Any], c: Mapping[str, Any]) -> list[str]:
    """Return the answer: the setting, a table of the arms, the gap, and what is open."""
    metric = METRICS[request.points[0].spec.objective]
    losses = {"base": results["start"]} | {a["arm"]: a["loss"] for a in results["arms"]}
    shown = {k: None if v is None else f"{metric.loss(v):.4f}" for k, v in losses.items()}
    arms: list[dict[str, Any]] = [{"arm": "base", metric.label: shown["base"]}]
    for a in results["arms"]:
        best, notes = a["best_lr"], ", ".join(a["flags"])
        arms.append(
            {
                "arm": a["arm"],
                "best learning rate": best["value"] or a["best_tried"],
                "interval": [best["low"], best["high"]],
                "good": a["good"],
                metric.label: shown[a["arm"]],
                "seconds": a["seconds"],
                "notes": notes if a["best_tried"] else "no learning rate trains",
            }
        )
    use = "the base as it is"
    if c["method"] is not None:
        use = f"{c['arm']}, learning rate {c['lr']:.1e}"
        use += f", {c['steps']} updates of {c['batch_size']} rows"
    use = "; ".join([f"Use {use} ({c['why']})", *filter(None, [c.get("out")])])
    used = ["used {used} of {given}".format(**c["budget"])] if "budget" in c else []
    last = "; ".join([f"open: {'; '.join(c['open']) or 'nothing'}", *used])
    exact = [f"exact answers: {c['score']['text']}"] if c.get("score") else []
    lines = [*table(arms, *arms[-1]), gap_line(results), last, *results.get("cautions", ())]
    for flag, words in FLAGS.items():
        lines = [re.sub(rf"\b{flag}\b", words, line) for line in lines]
    return [use, *exact, *lines]  # with a path of the user's


def gap_line(results: Mapping[str, Any]) -> str:
    """Say what the judged arm gives up, with the interval that decides the claim.

    It is wider than 95%, as the claim is judged several times.
    """
    arms, verdicts = {arm["arm"]: arm for arm in results["arms"]}, results["verdicts"]
    top, of = results["judged"], results["reference"]
    if top is None or not arms[top]["gap_percent"] or not verdicts:
        return "against full fine-tuning: not compared"
    gain, verdict = arms[of]["gain"], verdicts[0]
    nats = [verdict["estimate"][k] for k in ("value", "low", "high")]
    if not gain or None in nats:
        return f"{top} gives up: no interval ({verdict['why']})"
    gap, low, high = (100 * (results["allowed"] + value / gain) for value in nats)
    said = {"SUPPORTED": ": less than 5%", "REFUTED": ": more than 5%"}
    return (
        f"{top} gives up {gap:.1f}% [{low:.1f}%, {high:.1f}%] of the gain of {of} "
        f"on {results['n_test']} test rows"
        + said.get(verdict["outcome"], f": not decided at 5% ({verdict['why']})")
    )

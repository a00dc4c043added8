"""The answer of a search of learning rates: six lines, and the best run's adapter or weights."""

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasweep.advise.pages import plain_text, render
from lorasweep.cli import answer
from lorasweep.cli.finished_runs import write_adapter
from lorasweep.cli.points import final_loss, judged
from lorasweep.cli.progress import duration
from lorasweep.data import templates
from lorasweep.errors import LorasweepError, SpecError, StoreError
from lorasweep.fleet.rows import shown
from lorasweep.launch.pack import END
from lorasweep.launch.slurm.planning import hardware_of
from lorasweep.methods.lora import LoRA
from lorasweep.plan import detect
from lorasweep.plan.budget import Budget, parse_budget
from lorasweep.plan.plan import make_plan
from lorasweep.plan.planner import place
from lorasweep.spec.metric import METRICS, metric_of
from lorasweep.spec.run import RunSpec
from lorasweep.store import checkpoint, folders
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point, curve_key
from lorasweep.sweep.replicates import lrs_around_optimum
from lorasweep.sweep.request import Request
from lorasweep.sweep.search import LOWEST, MIN_SEEDS, is_short

ANSWER = "lorasweep.json"
"""File with the results and the answer in the folder of the best run."""


# ---------------------------------------------------------------- before and during training


def without_unfit(request: Request) -> tuple[Request, str]:
    """Leave out the arms that do not fit into the memory, and say which; at least one is kept."""
    hardware = hardware_of(request) if request.hardware else detect.this_machine()
    if hardware.worker_gib is None or request.cluster.kind == "slurm":
        return request, ""
    need = {p.id: _memory_gib(p.spec, request) for p in request.points}
    kept = [p for p in request.points if need[p.id] <= hardware.worker_gib]
    if not kept or len(kept) == len(request.points):
        return request, ""
    gone = {f"{p.arm} ({need[p.id]:.0f} GiB)": None for p in request.points if p not in kept}
    request.points = kept
    return request, f"left out, as the memory has {hardware.worker_gib:.0f} GiB: {', '.join(gone)}"


def outlook(request: Request, busy_s: float | None, workers: int) -> list[str]:
    """Say what the search takes, and what its budget buys.

    Args:
        busy_s: seconds of one worker (one GPU) for a run of full length; None: not known.
        workers: workers that train at the same time.

    Raises:
        SpecError: the budget is below one run.
    """
    how, n, steps = request.sweep.search, len(request.points), request.points[0].spec.steps
    budget = parse_budget(request.budget, steps)
    first = n * (how.n_full + (how.n_short - how.n_lrs) / how.prefix)  # n_lrs short runs go on
    each, wall_s = n * how.n_lrs, None if busy_s is None else busy_s / workers
    said = (
        f"search of {n} arm(s): short runs of {how.short_steps(steps)} updates find the range, "
        f"runs of {steps} updates judge. In all about {first:.0f} runs of full length for the "
        f"learning rates, and {each} with each of up to {how.seeds} fresh seeds"
    )
    if wall_s is not None:
        times = [duration(count * wall_s) for count in (first, each)]
        said += f": about {times[0]} and {times[1]} on {workers} worker(s)"
    size = {"runs": 1.0, "gpuh": busy_s}.get(budget.unit, wall_s) if budget else None
    if budget is None or size is None:
        return [said]
    runs = budget.amount / size
    if runs < 1:
        takes = "" if budget.unit == "runs" else f", which takes about {duration(size)}"
        raise SpecError(
            f"budget={budget.text} is below one run of {steps} updates{takes}. Give a larger "
            "budget, or fewer updates: steps=N."
        )
    seeds = min(how.seeds, math.floor((runs - first) / each))
    buys = f"the learning rates and {seeds} fresh seed(s)"
    if seeds < 0:
        buys = "less than the search for the learning rates"
    more = "" if seeds >= MIN_SEEDS - 1 else f"; an answer needs {MIN_SEEDS - 1} fresh seeds"
    return [said, f"budget={budget.text} buys about {runs:.0f} runs: {buys}{more}"]


def outlook_here(request: Request, store: RunStore) -> list[str]:
    """Return `outlook` for this machine; a cluster's speed is not known."""
    if request.cluster.kind == "slurm":
        return outlook(request, None, 1)
    plan = make_plan(request.points, store, request.exec, detect.this_machine())
    runs = sum(p.spec.steps for p in plan.todo) / request.points[0].spec.steps
    return outlook(request, 3600 * plan.hours * plan.workers / runs if runs else None, plan.workers)


def _amount(budget: Budget, amount: float) -> str:
    """Write an amount of a budget in words."""
    if budget.unit == "runs":
        return f"{amount:.3g} runs"
    return duration(amount) + (" of GPUs" if budget.unit == "gpuh" else "")


def stage(request: Request, store: RunStore, points: Sequence[Point]) -> str:
    """Describe the unfinished runs of a search, and the budget that is left; '' if all finished."""
    known = [p for p in points if store.result(p.id)]
    todo = [p for p in points if p not in known]
    if not todo:
        return ""
    first, what = todo[0], "full runs"
    if is_short(first, request.points):
        what = "short runs to find the range"
    elif first.spec.seed != request.points[0].spec.seed:
        what = f"full runs with seed {first.spec.seed}"
    lrs = sorted(p.spec.lr for p in todo)
    line = f"search: {len(todo)} {what}, learning rates from {lrs[0]:g} to {lrs[-1]:g}"
    if budget := parse_budget(request.budget, request.points[0].spec.steps):
        used = budget.used(known, store)
        left = _amount(budget, max(0.0, budget.amount - used))
        line += f"; used {_amount(budget, used)} of {budget.text}, left {left}"
        if expected := budget.expected(todo, known, store):
            line += f", these take about {_amount(budget, expected)}"
    return line


def prune(request: Request, store: RunStore, points: Sequence[Point]) -> None:
    """Delete states and weights that no later run and no export needs.

    Kept: the weights of the best run at each of the learning rates around the best one, of each arm
    and rank, for the best one may still change; and the final states of short runs until
    full runs have begun from them.
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
            curves.setdefault(curve_key(p), []).append(p)
    assert request.sweep is not None and request.sweep.search is not None
    for mine in curves.values():
        by_lr = _by_lr(mine, store)
        means = {lr: sum(losses.values()) / len(losses) for lr, losses in by_lr.items()}
        near = lrs_around_optimum(means, request.sweep.search.n_lrs)
        kept = {min(by_lr[lr], key=by_lr[lr].__getitem__) for lr in near}
        for p in mine:
            if p not in kept:
                (store.folder(p.id) / checkpoint.WEIGHTS).unlink(missing_ok=True)


def _by_lr(points: Sequence[Point], store: RunStore) -> dict[float, dict[Point, float]]:
    """Return the runs of an arm by learning rate, each with its loss on the rows that choose."""
    found: dict[float, dict[Point, float]] = {}
    for p in points:
        loss = final_loss(store.result(p.id) or {}, p.spec.dataset.n_validation > 0)
        found.setdefault(p.spec.lr, {})[p] = math.inf if loss is None else loss
    return found


# ---------------------------------------------------------------- the answer


def check_out(request: Request) -> None:
    """Raise an error if request.out cannot be written, or a server would render other texts."""
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
    served = templates.with_template(spec.dataset, tokenizer)
    form = shown(spec.dataset, [], tokenizer)
    templates.check(spec.dataset, served, form["messages"], [], form["example"], "example")
    return served, form


def finish(request: Request, store: RunStore, points: Sequence[Point], results: str) -> str:
    """Return the answer in lines, or as JSON, and write the best run into request.out.

    `results`: the results of the analysis as JSON.
    """
    found = json.loads(results)
    prune(request, store, points)
    lowest: dict[int | None, float] = {}  # of each arm
    for p in judged(request, points):
        lowest[_rank(p)] = min(p.spec.lr, lowest.get(_rank(p), math.inf))
    conclusion = conclude(request, found, max(lowest.values(), default=math.inf))
    if budget := parse_budget(request.budget, request.points[0].spec.steps):
        used = _amount(budget, budget.used(points, store))
        conclusion["budget"] = {"given": budget.text, "used": used}
    if request.out and conclusion["method"] is None:
        conclusion["out"] = f"nothing is written to {request.out}"
    elif request.out:
        conclusion["out"] = _export(request, store, points, found, conclusion)
    if request.format == "json":
        return json.dumps({**found, "answer": conclusion})
    return "\n".join(_lines(request, found, conclusion))


def conclude(request: Request, results: Mapping[str, Any], lowest: float = 0.0) -> dict[str, Any]:
    """Return the setting to use and why, and what the runs have not decided.

    `lowest`: the learning rate down to which all arms had full runs.
    """
    arms = {arm["rank"]: arm for arm in results["arms"]}
    rank, spec, start = results["best_rank"], request.points[0].spec, results["start"]
    outcome = next((v["outcome"] for v in results["verdicts"]), "")
    methods = {_rank(p): p.spec.method.plain() for p in request.points}
    absent = [answer.arm_name({"rank": r}) for r in methods if r not in arms]
    full, lora = (arms[r]["loss"] if r in arms else None for r in (None, rank))
    lost = 0.0  # share of full fine-tuning's gain that LoRA gives up, as measured
    if None not in (full, lora, start) and start > full:
        lost = (lora - full) / (start - full)
    chosen, why = arms.get(rank), "the smallest rank within 1% of the gain of the best one"
    if rank is None:
        why = "no run of LoRA trains" if len(methods) > 1 else "the only method that was asked for"
    elif None in arms and (
        outcome == "REFUTED" or (outcome != "SUPPORTED" and lost > results["allowed"])
    ):
        chosen, why = arms[None], f"LoRA gives up {100 * lost:.0f}% of the gain"
    lr = chosen and (chosen["best_lr"]["value"] or chosen["best_tried"])
    end, more, loss = LOWEST * request.sweep.search.wide, [], chosen and chosen["loss"]
    if not lr or lr < end or (None not in (start, loss) and loss >= start):
        why = f"nothing trains: no learning rate lowers the loss on {results['chosen_on']} rows"
        if lr and lr >= end:
            why = f"{answer.arm_name(chosen)} at {lr:.1e} does not lower the loss on test rows"
        elif lowest >= end:
            why = f"no learning rate tried in full, from {lowest:.1e} on, lowers the loss"
            more = ["lower learning rates, which the budget did not allow"]
        chosen, lr = {"method": None, "rank": None}, None
    more += [f"{name}, of which no run of full length has finished" for name in absent]
    return {
        "method": chosen["method"],
        "rank": chosen["rank"],
        "layers": methods[chosen["rank"]]["layers"] if lr else None,
        "lr": lr,
        "steps": spec.steps,
        "batch_size": spec.batch_size,
        "why": why,
        "open": [*more, *answer.open_questions(dict(results))],
    }


def _lines(
    request: Request, results: Mapping[str, Any], conclusion: Mapping[str, Any]
) -> list[str]:
    """Return the answer: a line per arm, the gap, the setting, and what is open."""
    specs = {_rank(p): p.spec for p in request.points}
    metric, lines = METRICS[request.points[0].spec.objective], []
    for arm in results["arms"]:
        rate, good, loss, base = arm["best_lr"], arm["good"], arm["loss"], results["start"]
        lr = "no learning rate trains"
        if rate["value"] is not None:
            ends = (
                f" [{rate['low']:.1e}, {rate['high']:.1e}]" if rate["low"] and rate["high"] else ""
            )
            lr = f"best learning rate {rate['value']:.1e}{ends}"
        elif answer.trains(arm):
            lr = f"best learning rate tried {arm['best_tried']:.1e} ({', '.join(arm['flags'])})"
        if good:
            lr += f", good from {good[0]:.1e} to {good[1]:.1e}"
        if loss is not None:
            lr += f"; {'test loss' if metric == METRICS['sft'] else metric.label} "
            lr += f"{metric.loss(loss):.4f}"
            lr += "" if base is None else f" (base {metric.loss(base):.4f})"
        cost = f"{arm['seconds'] or 0:.0f} s, {_memory_gib(specs[arm['rank']], request):.1f} GiB"
        lines.append(f"{answer.arm_name(arm)}: {lr}; a run takes {cost}")
    with_gap = [arm for arm in results["arms"] if arm["gap_percent"]]
    lines += [_gap_line(results, max(with_gap, key=lambda a: a["rank"], default=None))]
    use, c = "the base as it is", conclusion
    if c["method"] is not None:
        on = f" on {c['layers']}" if c["rank"] else ""
        use = f"{answer.arm_name(c)}{on}, learning rate {c['lr']:.1e}, "
        use += f"{c['steps']} updates of {c['batch_size']} rows"
    lines.append("; ".join([f"use: {use} ({c['why']})", *filter(None, [c.get("out")])]))
    used = [f"used {c['budget']['used']} of {c['budget']['given']}"] if "budget" in c else []
    return [*lines, "; ".join([f"open: {'; '.join(c['open']) or 'nothing'}", *used])]


def _gap_line(results: Mapping[str, Any], arm: Mapping[str, Any] | None) -> str:
    """Say what LoRA gives up at the rank of an arm, with the interval that decides the claim.

    The claim is about the highest rank, and its interval may be wider than 95%.
    """
    if arm is None:
        return "LoRA against full fine-tuning: not compared"
    top = max(a["rank"] for a in results["arms"] if a["rank"])
    gap, verdict = arm["gap_percent"], results["verdicts"][0]
    if gap["value"] is None:
        return f"LoRA at rank {arm['rank']} gives up: no interval ({verdict['why']})"
    gain = next(a["gain"] for a in results["arms"] if not a["rank"])
    if arm["rank"] == top and gain and verdict["estimate"]["value"] is not None:
        nats = {k: verdict["estimate"][k] for k in ("value", "low", "high")}
        share = {k: None if v is None else 100 * v / gain for k, v in nats.items()}
        gap = {k: None if v is None else 100 * results["allowed"] + v for k, v in share.items()}
    between = "" if gap["low"] is None else f" [{gap['low']:.1f}%, {gap['high']:.1f}%]"
    said = {"SUPPORTED": ": less than 5%", "REFUTED": ": more than 5%"}
    said["UNDECIDED"] = f": not decided at 5% ({verdict['why']})"
    return (
        f"LoRA at rank {arm['rank']} gives up {gap['value']:.1f}%{between} of full fine-tuning's "
        f"gain on {results['n_test']} test rows"
        + (said[verdict["outcome"]] if arm["rank"] == top else "")
    )


def _memory_gib(spec: RunSpec, request: Request) -> float:
    """Return the planned peak memory of one run on this machine."""
    return place(spec, detect.this_machine(), rows=request.exec.micro_batch_size).memory_gib


# ---------------------------------------------------------------- the folder of the best run


def _export(
    request: Request,
    store: RunStore,
    points: Sequence[Point],
    results: Mapping[str, Any],
    conclusion: Mapping[str, Any],
) -> str:
    """Write the weights of the best run, and where full fine-tuning wins, the best adapter too.

    Returns a sentence that says where they are, or why not.
    """
    from lorasweep.models import load

    out, (served, form) = Path(request.out).expanduser(), _served(request)
    tried = {arm["rank"]: arm["best_tried"] for arm in results["arms"]}
    rates, parts = [], {conclusion["rank"]: "."}
    parts.setdefault(results["best_rank"], "adapter")  # where full fine-tuning wins
    try:
        with folders.replaced(out, ANSWER) as partial:
            for rank, name in parts.items():
                by_lr = _by_lr([p for p in judged(request, points) if _rank(p) == rank], store)
                # of the seeds at the learning rate that the answer chose
                at = min(
                    by_lr, key=lambda lr: abs(math.log(lr / (tried.get(rank) or lr))), default=0
                )
                best, loss = min(by_lr.get(at, {}).items(), key=lambda b: b[1], default=(None, 0))
                if best is None or loss == math.inf:
                    continue
                folder, where = partial / name, f"in {request.out}/{name} " if name != "." else ""
                rates.append(f"{where}learning rate {at:g}")
                spec, final = best.spec, store.result(best.id) or {}
                weights = checkpoint.load_weights(store.folder(best.id))
                if weights is None:
                    raise StoreError(
                        f"the weights of run {best.id} were not kept (another command trained it, "
                        "several processes did, or the disk was nearly full): python -m lorasweep "
                        f"action=adapter run={best.id} out=FOLDER"
                    )
                if isinstance(spec.method, LoRA):
                    write_adapter(folder, spec, weights, final.get("base_commit"))
                else:
                    load.save_trained(spec.model, request.exec.models_dir, weights, folder)
                if served:
                    templates.save(served, form["stop"], folder)
                (folder / "README.md").write_text(_card(best, final, results, out.name))
            content = json.dumps({**results, "answer": conclusion, "prompt_form": form}, indent=1)
            (partial / ANSWER).write_text(content)
    except LorasweepError as error:
        return f"not written to {request.out}: {error}"
    return f"written to {request.out} ({'; '.join(rates)})"


def _rank(point: Point) -> int | None:
    """Return the rank of a LoRA run, None for full fine-tuning."""
    return getattr(point.spec.method, "rank", None)


def _card(best: Point, final: Mapping[str, Any], results: Mapping[str, Any], name: str) -> str:
    """Return the card of the written adapter or weights; `final`: the result of the run."""
    import yaml

    spec, metric = best.spec, metric_of(final)
    before = final["reward_start" if metric.higher_is_better else "nll_start"]
    unit = " nats per token" if metric == METRICS["sft"] else ""
    arm = next(a for a in results["arms"] if a["rank"] == _rank(best))
    kind = ("peft", "lora") if isinstance(spec.method, LoRA) else ("transformers", "fine-tuned")
    head: dict[str, Any] = {"library_name": kind[0], "tags": [kind[1]]}
    if spec.model.source == "hub":  # else the hub would link the card to another model
        head = {"base_model": spec.model.location, **head}
    settings = ", ".join(f"{k} {v}" for k, v in spec.method.plain().items() if k != "name")
    facts = {
        "method": f"{answer.arm_name(arm)} ({settings})",
        "base": f"{spec.model.name} ({spec.model.location or spec.model.source})",
        "trained on": f"{final.get('n_train')} rows of {spec.dataset.name}",
        "training": f"{spec.steps} updates of {spec.batch_size} rows, learning rate {spec.lr:g}, "
        f"seed {spec.seed} (run {best.id})",
        "chosen": f"the best of its arm on {results['chosen_on']} rows",
        metric.label: f"{before:.4f}{unit} before, {final[metric.name]:.4f} after, on "
        f"{final.get('n_test')} test rows",
        "weights": f"float32, as in training; the loss is measured in {spec.precision}",
        **({"against full fine-tuning": _gap_line(results, arm)} if arm["gap_percent"] else {}),
    }
    return render(
        "card.md",
        head=yaml.safe_dump(head, sort_keys=False),
        name=plain_text(name),
        facts=[(name, plain_text(str(text))) for name, text in facts.items()],
    )

"""Choose a customer's learning rate on validation rows, and measure the gain on test rows.

A customer's runs: a trial for each learning rate, measured on validation rows. When the best one is
known, a run at its learning rate takes the weights of the trial and is measured on test rows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from lorasweep.advise.rules.capacity import FULL, ROOM
from lorasweep.advise.rules.rates import APART
from lorasweep.fleet.runs import Member
from lorasweep.spec.metric import CURVE_START
from lorasweep.spec.run import LR_RANGE, RunSpec
from lorasweep.store.run_store import FINAL, TRIAL, Result, RunStore
from lorasweep.sweep.grid import Point

CHOSEN_BY = "test_nll_curve"
"""Key of a result: the final loss on validation rows."""
MOST_TRIED = 6
"""Most learning rates that are tried until the best one is neither the lowest nor the highest."""
VERDICTS = GAINED, WORSE, UNKNOWN = "gained", "got worse", "not known"


@dataclass(frozen=True)
class Tried:
    """A learning rate that was tried, with its run."""

    lr: float
    run: str
    state: str
    validation: float | None
    """Final loss on validation rows in nats per token; None: there is none."""


@dataclass(frozen=True)
class Outcome:
    """A customer and the run that was chosen for it."""

    member: Member
    tried: list[Tried]
    spec: RunSpec | None
    """The chosen run; None: no run can be chosen."""
    result: dict[str, Any]
    """The result of the chosen run; empty if no run was chosen."""
    problem: str
    """Why no run was chosen; empty if one was chosen."""
    states: dict[str, str] = field(default_factory=dict)
    """State of each run of the customer, by id: the trials, and the run that was measured."""
    seconds_used: float = 0.0
    """Seconds of training and measuring of all runs, each its share of its pack."""
    gpu_hours_used: float = 0.0
    """The part of `seconds_used` that was on GPUs, in hours."""
    hurts: bool = False
    """Whether training at any learning rate raises the loss on validation rows."""

    @property
    def base(self) -> str:
        """The name of the base on the hub, or of its folder."""
        model = self.member.points[0].spec.model
        return model.location if model.source == "hub" else model.name

    @property
    def open(self) -> bool:
        """Whether some runs are unfinished, and no run failed."""
        states = set(self.states.values())
        return not self.spec and "failed" not in states and not states <= set(FINAL)

    @property
    def gain(self) -> float | None:
        """Decrease of the loss on test rows, in nats per token."""
        if self.spec is None or not self.member.rows.held_out:
            return None
        return self.result["nll_start"] - self.result["test_nll"]

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% interval of the gain in nats per token; None if it is not known.

        Student's t over the prompts of the test rows, or over the test rows if they were not split
        by prompt (gain_se in train/objectives/held_out.py).
        """
        gain, error = self.gain, self.result.get("gain_se")
        if gain is None or error is None:
            return None
        from scipy.special import stdtrit  # takes a moment to load

        n = self.result.get("n_test_prompts", self.result["n_test"])
        half = float(stdtrit(n - 1, 0.975)) * error
        return gain - half, gain + half

    @property
    def verdict(self) -> str:
        """One of VERDICTS, from the interval of the gain."""
        low, high = self.interval or (-math.inf, math.inf)
        return GAINED if low > 0 else WORSE if high < 0 else UNKNOWN

    @property
    def edge(self) -> str:
        """'lowest' or 'highest' if this one of the learning rates tried was chosen; else ''.

        Also '' if training hurts at every learning rate.
        """
        rates = [t.lr for t in self.tried]
        if self.spec is None or len(rates) == 1 or self.hurts:
            return ""
        return {rates[0]: "lowest", rates[-1]: "highest"}.get(self.spec.lr, "")

    @property
    def room(self) -> str:
        """The problem with the amount of data; '' if there is none."""
        load = self.member.advised["load"]
        if not self.member.rows.held_out:
            return "too few unique rows to hold any out"
        if load is None or load <= ROOM:
            return ""
        share = "all" if load > FULL else "half"
        return f"the data take more than {share} of the rank's capacity"

    @property
    def stopping(self) -> str:
        """When and why training ended; '' if early stopping was not requested."""
        spec, done = self.member.points[0].spec, self.result.get("steps_done")
        patience, steps, best = spec.early_stopping, spec.steps, self.result.get("best_step")
        if not patience:
            why = self.member.not_early
            return f"off, so it made all {steps} updates: {why}" if why else ""
        if done is None:
            return ""
        if done >= steps:
            return f"made all {steps} updates; the weights are those of update {best}, the best"
        worse = f"{patience} evaluations in a row were" if patience > 1 else "one evaluation was"
        return (
            f"ended after update {done} of {steps}, because {worse} no better than update {best}; "
            "the weights are those of that update"
        )

    def plain(self) -> dict[str, Any]:
        """Return the content of the card as JSON values; without runs, only name and error."""
        m, found = self.member, self.result
        if m.problem:
            return {"name": m.name, "folder": None, "error": m.problem}
        first, advised, rows = m.points[0].spec, m.advised, m.rows
        data, method = rows.dataset, first.method
        source = f"{data.location}{f':{data.config}' if data.config else ''}"
        if data.source != "hub":  # only the last folder of the path
            source = f"{Path(data.location).name}/{data.train_split}.{data.source}".lstrip("/")
        return {
            "name": m.name,
            "folder": m.folder,
            "error": self.problem or None,
            "base": self.base,
            "run": self.spec.id if self.spec else None,
            "lr": self.spec.lr if self.spec else None,
            "tried": [vars(t) for t in self.tried],
            "edge": self.edge,
            "hurts": self.hurts,
            "rank": advised["rank"],
            "alpha": method.plain()["alpha"],
            "layers": method.plain()["layers"],
            "tied": first.model.tied and "unembedding" in method.target_layers(),
            "data": source,
            "revision": data.revision,
            "license": m.license,
            "n_train": found.get("n_train", rows.n_train),
            "n_repeated": rows.repeated,
            "n_same_prompt": rows.same_prompt,
            "n_left_out": rows.left_out,
            "prompts_shared": rows.shared,
            "n_validation": data.n_validation,
            "n_test": found.get("n_test", data.n_test) if rows.held_out else 0,
            "n_test_prompts": found.get("n_test_prompts"),
            "template": data.template if data.format == "prompt_completion" else None,
            "render": data.render,
            "mask": data.mask,
            "end": rows.end,
            "example": [{"text": text, "in_loss": in_loss} for text, in_loss in rows.example],
            "messages": rows.messages,
            "stop": rows.stop,
            "steps": first.steps,
            "steps_done": found.get("steps_done"),
            "best_step": found.get("best_step"),
            "early_stopping": self.stopping,
            "batch_size": first.batch_size,
            "max_length": data.max_length,
            "loss_before": found.get("nll_start"),
            "loss_after": found.get("test_nll"),
            "gain": self.gain,
            "gain_se": found.get("gain_se"),
            "gain_interval": self.interval,
            "gained": None if self.spec is None else self.verdict,
            "tokens": found.get("tokens"),
            "seconds": found.get("wall_s"),
            "seconds_used": self.seconds_used,
            "gpu_hours_used": self.gpu_hours_used,
            "room": self.room,
            "advised": advised["method"],
            "advised_why": advised["why"],
            "advised_lr": advised["lr_source"],
            "warnings": advised["warnings"],
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
    by_arm: dict[str, dict[float, Point]] = {}
    for p in points:
        by_arm.setdefault(p.arm, {})[p.spec.lr] = _measured(p)
    result = cache(store.result)
    found = []
    for by_lr in by_arm.values():
        runs = [by_lr[lr] for lr in sorted(by_lr)]
        if len(runs) > 1:
            runs = [_trial(p, result) for p in runs]
            while go_on and len(runs) < MOST_TRIED and (best := _best(runs, result)):
                lr = best.spec.lr * {runs[0].id: 1 / APART, runs[-1].id: APART}.get(best.id, 0)
                if not LR_RANGE[0] <= lr <= LR_RANGE[1] or hurts(runs, result):
                    break  # 0: the best is inside
                new = Point(best.arm, replace(_measured(best).spec, lr=lr))
                runs = sorted([*runs, _trial(new, result)], key=lambda p: p.spec.lr)
            best = _best(runs, result)
            if best and not best.spec.test_rows and _loss(best, result) < math.inf:
                runs.append(_measured(best))
        found += runs
    return found


def hurts(runs: Sequence[Point], result: "ResultOf") -> bool:
    """Return whether training at any learning rate raises the loss on validation rows.

    It does if the loss is lowest at the lowest learning rate, and a parabola through the losses
    there, at the next one, and before training (learning rate 0) rises from its beginning. False if
    a loss is not known.
    """
    start = (result(runs[0].id) or {}).get(CURVE_START)
    if start is None or len(runs) < 2 or _best(runs, result) != runs[0]:
        return False
    change, next_change = (_loss(p, result) - start for p in runs[:2])
    apart = runs[1].spec.lr / runs[0].spec.lr
    return next_change < math.inf and apart**2 * change >= next_change


def _measured(point: Point) -> Point:
    """Return the run with test rows at the learning rate of a trial."""
    return Point(point.arm, replace(point.spec, test_rows=True))


ResultOf = Callable[[str], Result | None]
"""Run id -> result; None: the run has not ended."""


def _trial(point: Point, result: ResultOf) -> Point:
    """Return the trial of a run; or the run itself, if it ended without one (earlier versions)."""
    trial = Point(point.arm, point.spec.trial)
    return point if result(trial.id) is None and result(point.id) is not None else trial


def _best(runs: Sequence[Point], result: ResultOf) -> Point | None:
    """Return the run with the lowest validation loss; None if some have not ended.

    In a tie it is the run with the lowest learning rate.
    """
    if not all(result(p.id) for p in runs):
        return None
    return min(runs, key=lambda p: (_loss(p, result), p.spec.lr))


def _loss(point: Point, result: ResultOf) -> float:
    """Return the validation loss of a run that has ended; infinity if it diverged."""
    both = [result(point.id) or {}, result(_measured(point).id) or {}]
    if any(found.get("state") == "diverged" for found in both):
        return math.inf
    loss = both[0].get(CHOSEN_BY)
    return math.inf if loss is None else loss


def outcome_of(member: Member, store: RunStore) -> Outcome:
    """Choose the learning rate with the lowest validation loss; in a tie, the lowest such rate.

    No learning rate is chosen before all runs of the customer have ended.
    """
    if member.problem:
        return Outcome(member, [], None, {}, member.problem)
    states, result = store.states(p.id for p in member.points), cache(store.result)
    by_lr: dict[float, Point] = {}  # the trials come first
    for p in member.points:
        by_lr.setdefault(p.spec.lr, p)
    runs = list(by_lr.values())
    tried = []
    for p in runs:
        loss = _loss(p, result) if states[p.id] == "done" else math.inf
        tried.append(Tried(p.spec.lr, p.id, states[p.id], loss if loss < math.inf else None))
    best, chosen = _best(runs, result), None
    if best and (len(runs) == 1 or _loss(best, result) < math.inf):
        chosen = _measured(best).spec
        states.setdefault(chosen.id, store.state(chosen.id))
    open_ = [i for i, state in states.items() if state not in FINAL]
    failed = next((i for i in open_ if states[i] == "failed"), None)
    if failed is not None:
        problem = f"{store.failure(failed)} (run {failed}; try again: exec.retry=true)"
    elif open_:
        problem = f"not trained yet: {len(open_)} of {len(states)} runs"
        killed = max(map(store.failures, open_))
        if killed:
            problem += (
                f"; the process of one run was killed {killed} times (out of memory? Try fewer "
                "exec.workers)"
            )
    elif chosen is None or states[chosen.id] == "diverged":
        problem = f"every learning rate diverged: {', '.join(f'{t.lr:g}' for t in tried)}"
    else:
        seconds, on_gpus = _used(states, chosen.id, store, result)
        final = result(chosen.id) or {}
        used = seconds, on_gpus / 3600
        return Outcome(member, tried, chosen, final, "", states, *used, hurts(runs, result))
    return Outcome(member, tried, None, {}, problem, states)


def _used(
    states: Mapping[str, str], chosen: str, store: RunStore, result: ResultOf
) -> tuple[float, float]:
    """Return the seconds of a customer's runs, and the part of them on GPUs."""
    trial = (result(chosen) or {}).get(TRIAL)  # the seconds of the chosen run include its trial's
    seconds = {i: (result(i) or {}).get("wall_s") or 0.0 for i in states if i != trial}
    return sum(seconds.values()), sum(s for i, s in seconds.items() if store.env(i).get("gpu"))


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

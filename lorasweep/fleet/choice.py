"""Choose a customer's learning rate among those tried, and measure the gain.

A customer's runs: a trial for each learning rate, measured on validation rows. When the best one is
known, a run at its learning rate takes the weights of the trial and is measured on test rows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from lorasweep.advise.rules import APART, FULL, ROOM
from lorasweep.fleet.runs import Member
from lorasweep.spec.metric import CURVE_START
from lorasweep.spec.run import LR_RANGE, RunSpec
from lorasweep.store.run_store import FINISHED, TRIAL, Result, RunStore
from lorasweep.sweep.grid import Point

CHOSEN_BY = "test_nll_curve"
"""Key of a result: the final loss on validation rows."""
MOST_TRIED = 6
"""Most learning rates that are tried until the best one is neither the lowest nor the highest."""
GAINED, WORSE, UNKNOWN = "gained", "got worse", "gain uncertain"
"""Verdicts on the gain on test rows. It is uncertain if its 95% interval contains 0."""
ResultOf = Callable[[str], Result | None]
"""Run id -> result; None: the run has not ended."""


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
    seconds_used: float = 0.0
    """Of training and measuring all runs."""
    hurts: bool = False
    """Whether training at any learning rate raises the loss on validation rows."""

    @property
    def open(self) -> bool:
        """Whether some runs are unfinished, and no run failed."""
        states = set(self.states.values())
        return not self.spec and "failed" not in states and not states <= set(FINISHED)

    def facts(self) -> dict[str, Any]:
        """Return the content of the card as JSON values; without an adapter, the error.

        The gain is the decrease of the loss on test rows in nats per token. Its 95% interval is by
        Student's t over the prompts of the test rows, or over the test rows if they were not split
        by prompt (gain_se in train/objectives/nll.py).
        """
        m, found, spec = self.member, self.result, self.spec
        if spec is None:
            return {"name": m.name, "error": self.problem, "tried": self.tried}
        first, rows = m.points[0].spec, m.rows
        data, method, gain, interval, verdict = first.dataset, first.method, None, None, UNKNOWN
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
        load = m.advised["load"] or 0.0
        room = f"the data take more than {'all' if load > FULL else 'half'} of the capacity"
        edge, rates = "", [t["lr"] for t in self.tried]
        if len(rates) > 1 and not self.hurts:
            edge = {rates[0]: "lowest", rates[-1]: "highest"}.get(spec.lr, "")
        stopping = m.not_early and f"off, so it made all {first.steps} updates: {m.not_early}"
        if first.early_stopping and found.get("steps_done"):
            stopping = (
                f"ended after update {found['steps_done']} of {first.steps} (patience "
                f"{first.early_stopping}); the weights are those of update {found.get('best_step')}"
            )
        of_result = ("n_test_prompts", "steps_done", "best_step", "gain_se", "tokens", "score")
        of_data = ("revision", "n_validation", "render", "mask", "max_length")
        return {
            "name": m.name,
            "folder": m.folder,
            "error": None,
            "base": first.model.location if first.model.source == "hub" else first.model.name,
            "run": spec.id,
            "lr": spec.lr,
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
            "seconds_used": self.seconds_used,
            "room": room if load > ROOM else "",
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
    unfinished = [i for i, state in states.items() if state not in FINISHED]
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
        seconds = sum((result(i) or {}).get("wall_s") or 0.0 for i in of)
        return Outcome(member, "", states, tried, chosen, final, seconds, hurts(runs, result))
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

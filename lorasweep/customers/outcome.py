"""Choose a customer's learning rate on validation rows, and measure the gain on test rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.customers.rules.capacity import FULL, ROOM
from lorasweep.customers.runs import Member
from lorasweep.spec.run import RunSpec
from lorasweep.store.run_store import FINAL, RunStore

CHOSEN_BY = "test_nll_curve"
"""Key of a result: the final loss on validation rows."""
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

    @property
    def base(self) -> str:
        """The name of the base on the hub, or of its folder."""
        model = self.member.points[0].spec.model
        return model.location if model.source == "hub" else model.name

    @property
    def open(self) -> bool:
        """Whether some runs are unfinished, and no run failed."""
        states = {t.state for t in self.tried}
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
        """'lowest' or 'highest' if this one of the learning rates tried was chosen; else ''."""
        rates = [t.lr for t in self.tried]
        if self.spec is None or len(rates) == 1:
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
            "rank": advised["rank"],
            "alpha": method.plain()["alpha"],
            "layers": method.plain()["layers"],
            "tied": first.model.tied and "unembedding" in method.target_layers(),
            "data": source,
            "revision": data.revision,
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
            "room": self.room,
            "advised": advised["method"],
            "advised_why": advised["why"],
            "advised_lr": advised["lr_source"],
            "warnings": advised["warnings"],
            **({"served": m.served} if m.served else {}),
        }


def outcome_of(member: Member, store: RunStore) -> Outcome:
    """Choose the learning rate with the lowest validation loss; in a tie, the lowest such rate.

    No learning rate is chosen before all runs of the customer have ended.
    """
    if member.problem:
        return Outcome(member, [], None, {}, member.problem)
    states = store.states(p.id for p in member.points)
    tried, found = [], []
    for p in member.points:
        result = store.result(p.id) or {}
        loss = result.get(CHOSEN_BY) if states[p.id] == "done" else None
        tried.append(Tried(p.spec.lr, p.id, states[p.id], loss))
        if loss is not None:
            found.append((loss, p.spec.lr, p.spec, result))
    open_ = [t for t in tried if t.state not in FINAL]
    failed = next((t for t in open_ if t.state == "failed"), None)
    if failed is not None:
        problem = f"{store.failure(failed.run)} (run {failed.run}; try again: exec.retry=true)"
    elif open_:
        problem = f"not trained yet: {len(open_)} of {len(tried)} runs"
        killed = max(store.failures(t.run) for t in open_)
        if killed:
            problem += (
                f"; the process of one run was killed {killed} times (out of memory? Try fewer "
                "exec.workers)"
            )
    elif not found:
        problem = f"every learning rate diverged: {', '.join(f'{t.lr:g}' for t in tried)}"
    else:
        _, _, spec, result = min(found, key=lambda f: f[:2])
        return Outcome(member, tried, spec, result, "")
    return Outcome(member, tried, None, {}, problem)


def counts(found: Sequence[Outcome]) -> dict[str, int]:
    """Count customers: all, those with an adapter, those not trained yet, those with an error."""
    trained, open_ = sum(o.spec is not None for o in found), sum(o.open for o in found)
    errors = len(found) - trained - open_
    return {"customers": len(found), "adapters": trained, "open": open_, "errors": errors}


def counts_line(values: Mapping[str, int]) -> str:
    """Return the counts in words."""
    text = (
        "{customers} customers: {adapters} adapters, {open} not trained yet, {errors} with errors"
    )
    return text.format(**values)

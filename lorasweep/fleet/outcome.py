"""What became of a customer: the rate that validation rows chose, and the gain on test rows."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.advise.advice import Failed
from lorasweep.advise.rules.capacity import FULL, ROOM
from lorasweep.fleet.members import Member
from lorasweep.spec.run import RunSpec
from lorasweep.store.run_store import FINAL, RunStore

CHOSEN_BY = "test_nll_curve"
"""Key of a result: the held-out loss at the end on the rows that choose."""

VERDICTS = GAINED, WORSE, UNKNOWN = "gained", "got worse", "not known"


@dataclass(frozen=True)
class Tried:
    """One rate."""

    lr: float
    run: str
    state: str
    validation: float | None
    """Loss at the end in nats per token, on the rows that choose; None if it has none."""


@dataclass(frozen=True)
class Outcome:
    """A customer, when nothing is trained any more."""

    member: Member
    tried: list[Tried]
    spec: RunSpec | None
    """The chosen run; None: no rate is to be chosen from."""
    result: dict[str, Any]
    """Its result; empty without one."""
    problem: str
    """Why there is no adapter; empty if there is one."""

    @property
    def name(self) -> str:
        """The customer's name."""
        return self.member.name

    @property
    def base(self) -> str:
        """What others call the base: its name on the hub, or that of a folder, without its path."""
        model = self.member.points[0].spec.model
        return model.location if model.source == "hub" else model.name

    @property
    def _data(self) -> str:
        """Where the rows are from: a name on the hub, or a file without the path of its folder."""
        data = self.member.rows.dataset
        if data.source == "hub":
            return f"{data.location}{f':{data.config}' if data.config else ''}"
        return f"{Path(data.location).name}/{data.train_split}.jsonl".lstrip("/")

    @property
    def open(self) -> bool:
        """Whether runs are still to be trained, and none failed."""
        return (
            not self.spec
            and {t.state for t in self.tried}.isdisjoint({"failed"})
            and any(t.state not in FINAL for t in self.tried)
        )

    @property
    def gain(self) -> float | None:
        """Nats per token that training took off the loss of rows that were held out."""
        if self.spec is None or not self.member.rows.held_out:
            return None
        return self.result["nll_start"] - self.result["test_nll"]

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% interval of the gain in nats per token; None if it is not known.

        By Student's t over the prompts of test rows, or over test rows where they are not divided
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
        """Whether it gained by what its interval says: one of VERDICTS."""
        low, high = self.interval or (-math.inf, math.inf)
        return GAINED if low > 0 else WORSE if high < 0 else UNKNOWN

    @property
    def edge(self) -> str:
        """Where the chosen rate is among those tried: lowest, highest, or '' in between."""
        rates = [t.lr for t in self.tried]
        if self.spec is None or len(rates) == 1:
            return ""
        return {rates[0]: "lowest", rates[-1]: "highest"}.get(self.spec.lr, "")

    @property
    def room(self) -> str:
        """Whether the data are too few or too many for the rank, by the adviser's count of bits."""
        load = self.member.advised.load
        if not self.member.rows.held_out:
            return "too few different rows to hold any out"
        if load is None or load <= ROOM:
            return ""
        return "more than the rank holds" if load > FULL else "little room in the rank"

    @property
    def stopping(self) -> str:
        """Where and why training ended; empty if it was to make all its updates."""
        patience, steps = (
            self.member.points[0].spec.early_stopping,
            self.member.points[0].spec.steps,
        )
        if not patience:
            why = self.member.not_early
            return f"left out, so it made all {steps} updates: {why}" if why else ""
        done, best = self.result.get("steps_done"), self.result.get("best_step")
        if done is None:
            return ""
        if done < steps:
            worse = (
                f"{patience} evaluations in a row were" if patience > 1 else "one evaluation was"
            )
            return (
                f"ended after update {done} of {steps}, as {worse} no better than the one after "
                f"update {best}, whose weights these are"
            )
        return f"made all {steps} updates; the weights are those after update {best}, the best"

    def plain(self) -> dict[str, Any]:
        """Return it as JSON values: what the card says."""
        m, advised, found = self.member, self.member.advised, self.result
        data, model = m.rows.dataset, m.points[0].spec.model
        return {
            "name": m.name,
            "folder": m.folder,
            "error": self.problem or None,
            "base": self.base,
            "run": self.spec.id if self.spec else None,
            "lr": self.spec.lr if self.spec else None,
            "tried": [vars(t) for t in self.tried],
            "edge": self.edge,
            "rank": advised.rank,
            "alpha": m.points[0].spec.method.plain()["alpha"],
            "layers": m.points[0].spec.method.plain()["layers"],
            "tied": model.tied and "unembedding" in m.points[0].spec.method.target_layers(),
            "data": self._data,
            "revision": data.revision,
            "n_train": found.get("n_train", m.rows.n_train),
            "n_repeated": m.rows.repeated,
            "n_same_prompt": m.rows.same_prompt,
            "n_left_out": m.rows.left_out,
            "prompts_shared": m.rows.shared,
            "n_validation": data.n_validation,
            "n_test": found.get("n_test", data.n_test) if m.rows.held_out else 0,
            "n_test_prompts": found.get("n_test_prompts"),
            "template": data.template if data.format == "prompt_completion" else None,
            "render": data.render,
            "mask": data.mask,
            "end": m.rows.end,
            "example": [{"text": text, "in_loss": in_loss} for text, in_loss in m.rows.example],
            "steps": m.points[0].spec.steps,
            "steps_done": found.get("steps_done"),
            "best_step": found.get("best_step"),
            "early_stopping": self.stopping,
            "batch_size": m.points[0].spec.batch_size,
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
            "advised": advised.method,
            "advised_why": advised.why,
            "advised_lr": advised.lr_source,
            "warnings": advised.warnings,
        }


def outcome_of(member: Member, store: RunStore) -> Outcome:
    """Choose a customer's rate: of the lowest loss on validation rows, the lower of equal ones."""
    states = store.states(p.id for p in member.points)
    tried, found = [], []
    for p in member.points:
        result = store.result(p.id) or {}
        loss = result.get(CHOSEN_BY) if states[p.id] == "done" else None
        tried.append(Tried(p.spec.lr, p.id, states[p.id], loss))
        if loss is not None:
            found.append((loss, p.spec.lr, p.spec, result))
    open_ = [t for t in tried if t.state not in FINAL]
    if open_ or not found:
        return Outcome(member, tried, None, {}, _problem(tried, open_, store))
    _, _, spec, result = min(found, key=lambda f: f[:2])
    return Outcome(member, tried, spec, result, "")


def _problem(tried: list[Tried], open_: list[Tried], store: RunStore) -> str:
    failed = next((t for t in open_ if t.state == "failed"), None)
    if failed is not None:
        return f"{store.failure(failed.run)} (run {failed.run}; try again: exec.retry=true)"
    killed = max((store.failures(t.run) for t in open_), default=0)
    if killed:
        return (
            f"not trained yet: {len(open_)} of {len(tried)} runs; a process that trained one was "
            f"killed, {killed} times (out of memory? Try fewer exec.workers)"
        )
    if open_:
        return f"not trained yet: {len(open_)} of {len(tried)} runs"
    return f"every rate diverged: {', '.join(f'{t.lr:g}' for t in tried)}"


def counts(found: "Iterable[Outcome | Failed]") -> dict[str, int]:
    """Count customers: all, those with an adapter, not trained yet, and with an error."""
    given = list(found)
    trained = sum(isinstance(o, Outcome) and o.spec is not None for o in given)
    open_ = sum(isinstance(o, Outcome) and o.open for o in given)
    errors = len(given) - trained - open_
    return {"customers": len(given), "adapters": trained, "open": open_, "errors": errors}


def counts_line(values: Mapping[str, int]) -> str:
    """Return the counts of customers in words."""
    return (
        f"{values['customers']} customers: {values['adapters']} adapters, {values['open']} not "
        f"trained yet, {values['errors']} with errors"
    )


def plain_of(found: "Outcome | Failed") -> dict[str, Any]:
    """Return a customer as JSON values, also one that could not be planned."""
    if isinstance(found, Outcome):
        return found.plain()
    return {"name": found.name, "folder": None, "error": found.error}

"""Train a claimed pack in the memory there is: less at once, then smaller packs.

Knows sessions and errors of memory. Refuses to know how anything is trained.
"""

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorasweep.errors import DataError, ModelError, SpecError, StoreError
from lorasweep.launch.out_of_memory import (
    does_not_fit,
    free_memory,
    goes_on,
    is_out_of_memory,
    request,
)
from lorasweep.launch.process import StopFlag, Stopped
from lorasweep.launch.session import Session, leave_to_new_owner
from lorasweep.launch.trainer import Report, Trainer, UnusableData
from lorasweep.plan.packing import pack_key
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.store.run_store import RunStore
from lorasweep.train.events import LEARNING, Phase, phase_of

OF_ALL = (Stopped, SpecError, ModelError, StoreError, OSError)
"""Errors that are no data set's: of the command, the base, the run folder, the machine."""


@dataclass
class Limit:
    """The largest size that may fit; None: no limit is known."""

    rows: int | None = None
    """Rows per member and forward pass."""
    members: int | None = None
    """Runs of a pack."""
    forward_parts: int = 1
    """See Exec."""

    def lower(self, rows: int, runs: int, forward_parts: int, phase: Phase) -> str:
        """Lower the limit where memory ran out; return what is tried instead, empty if nothing is.

        In learning the rows of a forward pass are halved, in sampling and evaluation what these
        hold at once: neither makes the other phases slower. Where a phase holds one row of each
        run, the pack is halved.

        Args:
            rows: of a run in a forward pass of the learner.
            runs: of the pack.
            forward_parts: see Exec.
            phase: in which memory ran out, with these sizes.
        """
        if phase.name == LEARNING and rows > 1:
            self.rows = rows // 2
            return f"{self.rows} of each"
        if phase.divisible:
            self.forward_parts = 2 * forward_parts
            return f"1/{self.forward_parts} of the usual at once in sampling and evaluation"
        if runs > 1:
            self.members = -(-runs // 2)
            return f"packs of {self.members}"
        return ""


class Limits:
    """What the packs of one worker have learnt: runs that pack alike begin at a size that fits."""

    def __init__(self) -> None:
        self._known: dict[object, Limit] = {}

    def of(self, spec: RunSpec) -> Limit:
        """Return the limit of runs like `spec`, to be read and lowered."""
        key = (pack_key(spec), spec.dataset.max_length)
        return self._known.setdefault(key, Limit())


@dataclass
class Fitting:
    """The training of a claimed pack, in as many attempts and parts as its memory needs."""

    attempts: dict[str, int]
    """Run id -> number of this process's attempt. Runs that are left or failed are removed."""
    exec: Exec
    store: RunStore
    trainer: Trainer
    report: Report
    stop: StopFlag

    def train(self, members: Sequence[RunSpec], planned_rows: int | None, limit: Limit) -> None:
        """Train `members` to the end, each attempt from the latest checkpoint.

        Out of memory halves what its phase holds at once, at one row the pack, whose halves train
        one after the other. One run alone with one row that does not fit has failed. `limit` is
        lowered.

        Raises:
            Stopped: a stop was asked for; checkpoints are written.
        """
        parts = [list(members)]
        while parts:
            part = [s for s in parts.pop(0) if self._is_mine(s.id)]
            if not part:
                continue
            if limit.members is not None and len(part) > limit.members:
                parts = [part[: limit.members], part[limit.members :], *parts]
                continue
            share = max(self.exec.forward_parts, limit.forward_parts)
            exec_ = replace(self.exec, forward_parts=share)
            session = Session(part, self.attempts, exec_, self.store, planned_rows, limit.rows)
            rows, share = session.rows, session.exec.forward_parts
            try:
                outcome = self._attempt(session)
            except Exception as error:
                if not self.exec.skip_broken_data or isinstance(error, OF_ALL):
                    raise
                parts = [*self._apart(part, error), *parts]
                outcome = None
            finally:
                del session
            if outcome is None:
                continue
            free_memory()
            if self.stop.set:
                raise Stopped
            asked, trace, phase = outcome
            instead = limit.lower(rows, len(part), share, phase)
            if not instead:
                self._fail(part[0], does_not_fit(part[0], asked), trace)
                continue
            text = goes_on(part[0], len(part), rows, asked, instead, phase.name)
            self._say(part, trace, text)
            parts.insert(0, part)

    def _apart(self, part: list[RunSpec], error: Exception) -> list[list[RunSpec]]:
        """Fail the runs whose data are to blame; return the others, in parts to be trained apart.

        Where that is not known, halves are tried, and nobody's log gets a text that may quote rows
        of another one's data.
        """
        if isinstance(error, UnusableData):
            for spec in part:
                if spec.id in error.causes:
                    self._fail(spec, error.causes[spec.id])
            return [part]
        datasets = list(dict.fromkeys(s.dataset.canonical for s in part))
        if len(datasets) == 1:
            cause = str(error)
            if not isinstance(error, DataError):
                cause = f"{type(error).__name__}: {cause}"
            for spec in part:
                self._fail(spec, cause, "".join(traceback.format_exception(error)))
            return []
        text = "the training of this pack failed: half of its data sets are trained apart"
        for rid in self.attempts.keys() & {s.id for s in part}:
            self.store.log(rid, self.attempts[rid], text)
        first = datasets[: len(datasets) // 2]
        halves: tuple[list[RunSpec], list[RunSpec]] = ([], [])
        for spec in part:
            halves[spec.dataset.canonical not in first].append(spec)
        return list(halves)

    def _is_mine(self, rid: str) -> bool:
        """Return whether a run is still to be trained here."""
        if rid not in self.attempts or self.store.result(rid) is not None:
            return False
        if self.store.owns(rid, self.attempts[rid]):
            return True
        leave_to_new_owner(rid, self.attempts, self.store)
        return False

    def _attempt(self, session: Session) -> tuple[str, str, Phase] | None:
        """Train; return the request that did not fit, the traceback and the phase, None if all did.

        The error itself is dropped here, because its frames hold the tensors of the attempt.
        """
        try:
            session.run(self.trainer, self.report, self.stop)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return request(error), traceback.format_exc(), phase_of(error)
        return None

    def _say(self, part: list[RunSpec], trace: str, text: str) -> None:
        for spec in part:
            if spec.id in self.attempts:
                self.store.log(spec.id, self.attempts[spec.id], f"{trace}{text}")
        self.report({"note": text})

    def _fail(self, spec: RunSpec, cause: str, trace: str = "") -> None:
        n = self.attempts.pop(spec.id, None)
        if n is None:
            return  # another process took over
        self.store.log(spec.id, n, trace or cause)
        self.store.write_end(spec.id, n, "failed", cause)
        self.report({"run": spec.id, "ended": "failed", "cause": cause})

"""Train one pack on this machine: claim its runs, train them, record how each ended.

Knows claims and errors. Refuses to know how anything is trained.
"""

import errno
import threading
import traceback
from collections.abc import Sequence

from lorasweep.errors import DataError, ModelError, SpecError, StoreError
from lorasweep.launch.fitting import Fitting, Limits
from lorasweep.launch.process import StopFlag, Stopped
from lorasweep.launch.trainer import Report, Trainer
from lorasweep.plan.memory import checkpoint_bytes
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.store import checkpoint
from lorasweep.store.claims import HEARTBEAT_S
from lorasweep.store.run_store import RunStore

Attempts = dict[str, int]
"""Run id -> number of this process's attempt. A run that another process took over is removed."""


def execute(
    pack: Sequence[RunSpec],
    exec_: Exec,
    store: RunStore,
    trainer: Trainer,
    report: Report,
    stop: StopFlag,
    micro_batch_size: int | None = None,
    limits: Limits | None = None,
) -> None:
    """Claim the free runs of a pack and train them to the end. Failures of runs are recorded.

    `micro_batch_size` is the plan's choice; exec.micro_batch_size and a checkpoint's value come
    before it. `limits`: what earlier packs of this process learnt of the memory.

    Raises:
        Stopped: `stop` was set; checkpoints are written.
        StoreError: the disk is full, or a file of the run folder cannot be read now.
        SpecError, DataError, ModelError: something that the user must correct.
    """
    attempts: Attempts = {}
    beats = None
    try:
        _claim(pack, store, attempts)
        if not attempts:
            return
        beats = _Heartbeats(store, attempts)
        members = [s for s in pack if s.id in attempts]
        fitting = Fitting(attempts, exec_, store, trainer, report, stop)
        fitting.train(members, micro_batch_size, (limits or Limits()).of(members[0]))
    except Stopped:
        _end_all(store, attempts, "stopped", "asked to stop")
        raise
    except (SpecError, DataError, ModelError, StoreError) as error:  # reported once, for all runs
        _end_all(store, attempts, "stopped", str(error))
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            _end_all(store, attempts, "stopped", cause, traceback.format_exc())
            raise _disk_full(store, pack) from None
        _end_all(store, attempts, "failed", cause, traceback.format_exc())
        for rid in attempts:
            if store.result(rid) is None:
                report({"run": rid, "ended": "failed", "cause": cause})
    finally:
        if beats is not None:
            beats.stop()


def _claim(pack: Sequence[RunSpec], store: RunStore, attempts: Attempts) -> None:
    for spec in pack:
        n = store.claim(spec)
        if n is not None:
            attempts[spec.id] = n
        elif not attempts:
            return  # another worker has the first member, so it takes the pack: packs stay whole


def _disk_full(store: RunStore, pack: Sequence[RunSpec]) -> StoreError:
    free = checkpoint.free_bytes(store.root) / 2**20
    need = checkpoint_bytes(pack) / 2**20
    return StoreError(
        f"the disk of {store.root} is full ({free:.0f} MiB free). The checkpoints of the "
        f"{len(pack)} run(s) in training take up to {need:.1f} MiB; action=plan shows what the "
        "whole sweep needs. Finished runs are safe. Free some space, then run the same command "
        "again: it continues from the last checkpoints."
    )


def _end_all(
    store: RunStore, attempts: Attempts, state: str, cause: str, log_text: str = ""
) -> None:
    for rid, n in attempts.items():
        try:
            if store.result(rid) is None:
                if log_text:
                    store.log(rid, n, log_text)
                store.write_end(rid, n, state, cause)
        except (OSError, StoreError):
            continue  # without end.json the run counts as interrupted, fine


class _Heartbeats:
    """A thread that writes the heartbeats of the claimed runs."""

    def __init__(self, store: RunStore, attempts: Attempts) -> None:
        self._store, self._attempts = store, attempts
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        beat = 0
        while not self._done.wait(HEARTBEAT_S if beat else 0):
            beat += 1
            for rid, n in list(self._attempts.items()):
                try:
                    self._store.heartbeat(rid, n, beat)
                except OSError:
                    continue  # the training meets the same error and reports it

    def stop(self) -> None:
        """Stop, and wait for the thread."""
        self._done.set()
        self._thread.join()

"""Take queued runs back: all of a sweep's, or those that are no longer part of it."""

from collections.abc import Callable, Sequence

from lorasweep.errors import ClusterError
from lorasweep.launch.slurm import client as slurm
from lorasweep.launch.slurm import submissions
from lorasweep.launch.slurm.reconcile import mend
from lorasweep.launch.slurm.submissions import Queue, Submission
from lorasweep.store.run_store import FINAL, RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import Request


def removed(
    queue: Queue, request: Request, points: Sequence[Point], store: RunStore
) -> dict[str, list[str]]:
    """List, by submission, the queued runs of this sweep that are no longer part of it and have not
    begun."""
    if request.sweep is None:
        return {}
    wanted = {p.id for p in points}
    found: dict[str, list[str]] = {}
    for s, k, _ in queue.live():
        if s.told["sweep"] == request.title:
            gone = [
                r
                for r in s.tasks[k]
                if r not in wanted and r not in s.withdrawn and store.state(r) == "missing"
            ]
            if gone:
                found.setdefault(s.name, []).extend(gone)
    return found


def prune(queue: Queue, gone: dict[str, list[str]], say: Callable[[str], None]) -> int:
    """Withdraw queued runs, and cancel the waiting tasks that have no others."""
    empty = []
    for s in [s for s in queue.submissions if s.name in gone]:
        submissions.withdraw(s, gone[s.name])
        waiting = [(k, j) for owner, k, j in queue.live() if owner is s and j.state == "PENDING"]
        empty += [j.label for k, j in waiting if s.withdrawn >= set(s.tasks[k])]
    if empty and (denied := slurm.cancel(empty)):
        say(f"not all of the jobs could be cancelled; they will find nothing to do ({denied})")
    return sum(map(len, gone.values()))


def cancel(request: Request, store: RunStore, say: Callable[[str], None]) -> tuple[int, int]:
    """Cancel the sweep's jobs; return how many jobs, and how many runs they had before them.
    Finished runs are kept, and those in the middle write a checkpoint first."""
    slurm.require()
    if not submissions.home(store.root).is_dir():
        return 0, 0
    with submissions.locked(store.root, say):
        queue = mend(store.root, say)
        mine = {s.name for s in queue.submissions if _concerns(s, request)}
        live = [(s, k, j) for s, k, j in queue.live() if s.name in mine]
        follows = [j.label for n, j in queue.follows.items() if n in mine and j.live]
        runs = {r for s, k, _ in live for r in s.tasks[k]} - {
            r for s, _, _ in live for r in s.withdrawn
        }
        ending = [r for r in runs if store.state(r) not in FINAL]
        denied = (
            slurm.cancel([*follows, *(j.label for _, _, j in live)]) if follows or live else None
        )
        if denied:
            users = sorted({s.told["user"] for s in queue.submissions if s.name in mine})
            raise ClusterError(
                "not all jobs could be cancelled (they are of "
                f"{', '.join(users)}, each cancels their own): {denied}"
            )
        return len(live), len(ending)


def _concerns(submission: Submission, request: Request) -> bool:
    """Say whether a submission is of this question: of the same name, with runs in common. The same
    sweep with another number of steps, say, is another question."""
    return submission.told["sweep"] == request.title and not {
        p.id for p in request.points
    }.isdisjoint(submission.told["asked"])

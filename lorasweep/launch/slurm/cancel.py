"""Cancel queued runs: all of a sweep, or those that are no longer part of it."""

from collections.abc import Callable, Sequence

from lorasweep.errors import ClusterError
from lorasweep.launch.slurm import client, submissions
from lorasweep.launch.slurm.reconcile import reconcile
from lorasweep.launch.slurm.submissions import Queue, Submission
from lorasweep.store import files
from lorasweep.store.run_store import FINAL, RunStore
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import Request


def removed(
    queue: Queue, request: Request, points: Sequence[Point], store: RunStore
) -> dict[str, list[str]]:
    """List, by submission, queued runs that are no longer part of this sweep and not started."""
    if request.sweep_name is None:
        return {}
    wanted = {p.id for p in points}
    found: dict[str, list[str]] = {}
    for s, k, _ in queue.live():
        if request.is_in_family(s.record["sweep"]):
            left = set(s.tasks[k]) - wanted - s.withdrawn
            begun = {r for r in left if store.state(r) != "missing"}
            if left - begun:
                found.setdefault(s.name, []).extend(r for r in s.tasks[k] if r in left - begun)
    return found


def prune(queue: Queue, gone: dict[str, list[str]], notify: Callable[[str], None]) -> int:
    """Withdraw queued runs, and cancel waiting tasks without other runs; return how many runs."""
    empty = []
    for s in [s for s in queue.submissions if s.name in gone]:
        submissions.withdraw(s, gone[s.name])
        waiting = [(k, j) for owner, k, j in queue.live() if owner is s and j.state == "PENDING"]
        empty += [j.label for k, j in waiting if s.withdrawn >= set(s.tasks[k])]
    if empty and (denied := client.cancel(empty)):
        notify(f"some jobs could not be cancelled; they will find nothing to do ({denied})")
    return sum(map(len, gone.values()))


def cancel(request: Request, store: RunStore, notify: Callable[[str], None]) -> tuple[int, int]:
    """Cancel the sweep's jobs; return the number of jobs and of their unfinished runs.

    Finished runs are kept, and running ones write a checkpoint first.

    Raises:
        ClusterError: there is no Slurm here, or some jobs belong to other users.
    """
    client.require()
    if files.status(submissions.home(store.root)) is None:
        return 0, 0
    with submissions.locked(store.root, notify):
        queue = reconcile(store.root, notify)
        mine = {s.name for s in queue.submissions if _same_question(s, request)}
        live = [(s, k, j) for s, k, j in queue.live() if s.name in mine]
        follows = [j.label for n, j in queue.follows.items() if n in mine and j.live]
        withdrawn = {r for s, _, _ in live for r in s.withdrawn}
        runs = {r for s, k, _ in live for r in s.tasks[k]} - withdrawn
        ending = [r for r in runs if store.state(r) not in FINAL]
        labels = [*follows, *(j.label for _, _, j in live)]
        denied = client.cancel(labels) if labels else None
        if denied:
            users = sorted({s.record["user"] for s in queue.submissions if s.name in mine})
            raise ClusterError(
                f"some jobs could not be cancelled: {denied}. The jobs belong to "
                f"{', '.join(users)}; each user must run action=cancel for their own."
            )
        return len(live), len(ending)


def _same_question(submission: Submission, request: Request) -> bool:
    """Return whether a submission belongs to this sweep: the same name, and runs in common.

    The same sweep with another number of steps has other runs.
    """
    ids = {p.id for p in request.points}
    record = submission.record
    return record["sweep"] == request.title and not ids.isdisjoint(record["asked"])

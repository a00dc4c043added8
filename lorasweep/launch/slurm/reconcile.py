"""Reconcile the records with Slurm's queue, before anything is submitted or cancelled.

A command may have died while it submitted, and Slurm holds back jobs whose node failed.
"""

import time
from collections.abc import Callable
from pathlib import Path

from lorasweep.launch.slurm import client, sbatch, submissions
from lorasweep.launch.slurm.submissions import Array, Queue, Submission

Notify = Callable[[str], None]


def reconcile(runs_dir: Path, notify: Notify) -> Queue:
    """Adopt or cancel the jobs that are not recorded, and return the queue. Needs the lock.

    An array that reached Slurm whole is adopted. One that did not is cancelled and given up, so
    that its runs are submitted anew.
    """
    queue = submissions.look(runs_dir)
    if queue.unavailable:
        return queue
    strays = {j.name: j.array for j in queue.strays}
    changed = False
    for submission in queue.submissions:
        for array in submission.arrays:
            changed |= _settle(submission, array, strays, notify)
    submissions.note_ends(queue)
    _release(queue, notify)
    return submissions.look(runs_dir) if changed else queue


def _settle(s: Submission, array: Array, strays: dict[str, str], notify: Notify) -> bool:
    """Record what became of an array whose job is not recorded; return whether it was open."""
    if array.job is not None or (array.abandoned and array.name not in strays):
        return False
    number = strays[array.name] if array.name in strays else _accounted(array)
    is_script = s.record["script"]
    whole = (
        number is not None
        and not array.abandoned
        and (is_script or sbatch.complete(s.folder, array, number))
    )
    if whole:
        notify(f"job {number} of {s.name}, submitted by a command that died, is adopted")
    elif number is not None:
        notify(f"job {number} of {s.name}, submitted in part by a command that died, is cancelled")
        denied = client.cancel([number])
        if denied:
            user = s.record["user"]
            notify(f"  it is {user}'s, who must cancel it; it will fail by itself ({denied})")
        number = None
    elif is_script and time.time() - s.record["created_s"] < submissions.GIVE_UP_S:
        return False  # its user may be about to submit it
    else:
        (s.folder / f"array-{array.part}.sh").unlink(missing_ok=True)  # its runs are planned anew
    submissions.note_array(s.folder, array.part, number)
    return True


def _accounted(array: Array) -> str | None:
    """Return the number of a job of this name that only accounting still knows."""
    found = client.named(array.name)
    return found[0].partition("_")[0] if found else None


def _release(queue: Queue, notify: Notify) -> None:
    jobs = [*(j for _, _, j in queue.live()), *queue.follows.values()]
    stuck = [j.label for j in jobs if j.stuck]
    if stuck:
        notify(f"{len(stuck)} job(s) that Slurm holds since their node failed are released")
        client.release(stuck)

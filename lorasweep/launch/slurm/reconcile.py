"""Reconcile the records with Slurm's queue, before anything is submitted or cancelled.

Needed when a command died while it was submitting, or when Slurm holds jobs after a node failure.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lorasweep.launch.slurm import client, sbatch, submissions
from lorasweep.launch.slurm.submissions import Array, Queue, Submission

Notify = Callable[[str], None]


def reconcile(runs_dir: Path, notify: Notify) -> Queue:
    """Adopt or cancel jobs that are not recorded, and return the queue. The lock must be held.

    An array that reached Slurm completely is adopted. An incomplete one is cancelled, so that its
    runs are submitted again.
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
    """Record what happened to an array without a recorded job; return whether that was open."""
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
        notify(f"adopted job {number} of {s.name}, from a command that died after submitting it")
    elif number is not None:
        notify(f"cancelled job {number} of {s.name}, from a command that died while submitting it")
        denied = client.cancel([number])
        if denied:
            user = s.record["user"]
            notify(f"  it could not be cancelled: it belongs to {user}, and will fail ({denied})")
        number = None
    elif is_script and time.time() - s.record["created_s"] < submissions.GIVE_UP_S:
        return False  # its user may be about to submit it
    else:
        with suppress(PermissionError):  # another user's: its job would be cancelled
            (s.folder / f"array-{array.part}.sh").unlink(missing_ok=True)  # planned again
    submissions.note_array(s.folder, array.part, number)
    return True


def _accounted(array: Array) -> str | None:
    """Return the number of the array's job from accounting; None if it is unknown there."""
    found = client.named(array.name)
    return found[0].partition("_")[0] if found else None


def _release(queue: Queue, notify: Notify) -> None:
    jobs = [*(j for _, _, j in queue.live()), *queue.follows.values()]
    stuck = [j.label for j in jobs if j.stuck]
    if stuck:
        notify(f"released {len(stuck)} job(s) that Slurm held after a node failure")
        client.release(stuck)

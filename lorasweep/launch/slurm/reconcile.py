"""Bring in order what a command left that died while it submitted, and what Slurm holds back after
a failure."""

import time
from collections.abc import Callable
from pathlib import Path

from lorasweep.launch.slurm import client as slurm
from lorasweep.launch.slurm import sbatch as launch
from lorasweep.launch.slurm import submissions
from lorasweep.launch.slurm.submissions import Array, Queue


def mend(runs_dir: Path, say: Callable[[str], None]) -> Queue:
    """Adopt or cancel the jobs that are not recorded, and return the queue. The lock must be held.

    An array that reached Slurm whole is adopted; one that did not is cancelled and given up, so
    that its runs are submitted anew.
    """
    queue = submissions.look(runs_dir)
    if queue.unknown:
        return queue
    known = {j.name: j for j in queue.strays}
    changed = False
    for s in queue.submissions:
        young = time.time() - s.told["created_s"] < submissions.GIVE_UP_S
        for array in s.arrays:
            if array.job is not None or (array.abandoned and array.name not in known):
                continue
            number = known[array.name].array if array.name in known else _lately(array)
            whole = number is not None and not array.abandoned
            if whole and (s.told["script"] or launch.complete(s.folder, array, number)):
                say(f"job {number} of {s.name}, submitted by a command that died, is adopted")
            elif number is not None:
                say(
                    f"job {number} of {s.name}, submitted in part by a command that died, is cancelled"
                )
                denied = slurm.cancel([number])
                if denied:
                    say(
                        f"  it is {s.told['user']}'s, who must cancel it; it will fail by itself ({denied})"
                    )
                number = None
            elif s.told["script"] and young:
                continue  # its user may be about to submit it
            else:
                (s.folder / f"array-{array.part}.sh").unlink(
                    missing_ok=True
                )  # what it would run is planned anew
            submissions.note_array(s.folder, array.part, number)
            changed = True
    submissions.note_ends(queue)
    stuck = [j.label for _, _, j in queue.live() if j.stuck] + [
        j.label for j in queue.follows.values() if j.stuck
    ]
    if stuck:
        say(
            f"{len(stuck)} job(s) that Slurm holds since their node failed at the start are released"
        )
        slurm.release(stuck)
    return submissions.look(runs_dir) if changed else queue


def _lately(array: Array) -> str | None:
    """Return the number of a job of this name that squeue has forgotten already, if accounting
    knows it."""
    found = slurm.named(array.name)
    return found[0].partition("_")[0] if found else None

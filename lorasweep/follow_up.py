"""What a follow-up job does after a sweep's jobs: submit what is left, or write the answer."""

import dataclasses
import json
import sys
import time
from pathlib import Path

from lorasweep.cli.actions import act
from lorasweep.errors import ClusterError, GaveUp, LorasweepError, StoreError
from lorasweep.launch.slurm.job import stoppable
from lorasweep.sweep.request import from_plain


def follow_up(path: str) -> int:
    """Run the request of a task file again, in a follow-up job; return the exit status.

    After an error that may be temporary it is tried again. The last line of the file is {"follow":
    request, "requeues": n, "trainer": name or null, "idle": n, "updates": n}.
    """
    task = json.loads(Path(path).read_text().splitlines()[-1])
    with stoppable(task["requeues"]):
        for pause in (30, 60, 120, 240, None):  # seconds
            try:
                act(dataclasses.replace(from_plain(task["follow"]), task=task), task["trainer"])
                return 0
            except LorasweepError as error:
                print(f"lorasweep: {error}", file=sys.stderr, flush=True)
                temporary = isinstance(error, ClusterError | StoreError)
                if not temporary or isinstance(error, GaveUp) or pause is None:
                    return 2
                time.sleep(pause)
    return 0

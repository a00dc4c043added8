"""The command of a follow-up job: run the sweep's request again, from a file.

python -m lorasweep --follow TASK.json

{"follow": REQUEST.json, "trainer": name or null, "idle": n, "finished": n}
"""

import json
import sys
from pathlib import Path

from lorasweep.cli.actions import act
from lorasweep.errors import ClusterError, GaveUp, LorasweepError, StoreError
from lorasweep.launch.slurm.job import INTERRUPTED, TRY_AGAIN, Signals
from lorasweep.sweep.request import from_plain


def main(path: str) -> int:
    """Run the request again and return the exit status.

    0: done. 2: a permanent error. TRY_AGAIN: an error that may be temporary. INTERRUPTED: a signal.
    """
    Signals()
    task = json.loads(Path(path).read_bytes())
    request = from_plain(json.loads(Path(task["follow"]).read_bytes()))
    try:
        act(request, task.get("trainer"), follow=task)
    except LorasweepError as error:
        print(f"lorasweep: {error}", file=sys.stderr, flush=True)
        passing = isinstance(error, ClusterError | StoreError) and not isinstance(error, GaveUp)
        return TRY_AGAIN if passing else 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0

"""Whether an execution of a job still runs: answers for the store, about owners that are jobs."""

import time

from lorasweep.errors import ClusterError
from lorasweep.launch.slurm import client

FRESH_S = 10.0
"""An answer of Slurm is used again for this long."""


class RunningJobs:
    """Knows which jobs run, by one query for all of them (`store.claims.RunningJobs`)."""

    def __init__(self) -> None:
        self._running: dict[str, int] | None = None
        self._asked = 0.0
        self._dead: set[tuple[str, int]] = set()

    def refresh(self) -> None:
        """Ask Slurm which jobs run, and which of their restarts."""
        states = "RUNNING,COMPLETING,STOPPED,SUSPENDED"
        fields = "JobID:|,RestartCnt:|"
        try:
            listed = client.run("squeue", "-a", "-h", "-r", "-t", states, "-O", fields)
        except ClusterError:
            self._running = None
            return
        cells = (line.split("|") for line in listed.splitlines())
        self._running = {c[0].strip(): int(c[1].strip() or 0) for c in cells}
        self._asked = time.monotonic()

    def __call__(
        self, cluster: str, job: str, restart: int, known_before: bool = False
    ) -> bool | None:
        """Return whether the execution of a job that began as its n-th restart still runs.

        None if Slurm cannot tell, or it is another cluster's. `known_before`: it was known before
        the last `refresh`, so its absence there counts. Otherwise it may have begun since, and
        Slurm is asked again.
        """
        if (job, restart) in self._dead:
            return False
        try:
            if cluster != client.setting("ClusterName"):
                return None
        except ClusterError:
            return None
        running = self._running if time.monotonic() - self._asked < FRESH_S else None
        if running is None or not (running.get(job) == restart or known_before):
            self.refresh()
        if self._running is None:
            return None
        if self._running.get(job) == restart:
            return True
        if client.hides_jobs():
            return None
        self._dead.add((job, restart))
        return False

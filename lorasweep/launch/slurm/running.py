"""Find out for the store whether a job that owns runs is still running."""

import time

from lorasweep.errors import ClusterError
from lorasweep.launch.slurm import client

FRESH_S = 10.0
"""Seconds for which a query's result is reused."""


class RunningJobs:
    """Knows which jobs are running, from one query for all (see `store.claims.RunningJobs`)."""

    def __init__(self) -> None:
        self._running: dict[str, int] | None = None
        self._asked = 0.0
        self._dead: set[tuple[str, int]] = set()

    def refresh(self) -> None:
        """Query Slurm for the running jobs and their restart counts."""
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
        """Return whether a job is still running in its `restart`-th execution.

        None if Slurm does not answer, hides it, or it belongs to another cluster. `known_before`:
        the job was known before the last `refresh`, so if that did not list it, it has ended.
        Otherwise it may have started since, and Slurm is queried again.
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

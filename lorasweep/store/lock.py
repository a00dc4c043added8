"""A lock between all processes that see a folder. The lock of a dead process is taken over."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from lorasweep.errors import StoreError
from lorasweep.store import claims, files

POLL_S = 0.2


class Lock:
    """A lock in a folder: claims are numbered, and the highest one holds the lock."""

    def __init__(self, folder: Path, jobs: claims.RunningJobs | None = None) -> None:
        """Name the folder; `jobs` knows which holders are running jobs of a cluster."""
        self._folder = folder
        self._liveness = claims.Liveness(jobs)
        self._claim: Path | None = None
        self._done = threading.Event()

    def acquire(self, wait_s: float, waiting: Callable[[str], None]) -> None:
        """Take the lock, and wait for its holder if there is one.

        `waiting` is called once, with a description of the holder.

        Raises:
            StoreError: the holder is still alive after `wait_s` seconds, or the folder cannot be
                read now.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        end, announced = time.monotonic() + wait_s, False
        while True:
            last = self._last()
            held = self._folder / str(last)
            released = files.status(held / "released") is not None
            if last == 0 or released or not self._liveness.alive(held):
                if self._try(last + 1):
                    return
                continue
            holder = _holder(held)
            if not holder:
                continue  # released in the meantime
            if not announced:
                waiting(holder)
                announced = True
            if time.monotonic() > end:
                raise StoreError(
                    f"{held} is held by {holder}, which is still running. Run the command again "
                    "when it has ended."
                )
            time.sleep(POLL_S)

    def _try(self, number: int) -> bool:
        claim = self._folder / str(number)
        owner = json.dumps(claims.this_process()).encode()
        if not files.create_folder_once(claim, {"owner.json": owner}):
            return False
        if self._last() != number:  # others took and released it meanwhile; a later one holds it
            shutil.rmtree(claim)
            return False
        self._claim = claim
        threading.Thread(target=self._beat, args=(claim,), daemon=True).start()
        return True

    def _last(self) -> int:
        return max((int(n) for n in files.names(self._folder) if n.isdigit()), default=0)

    def _beat(self, claim: Path) -> None:
        beat = 0
        while not self._done.wait(claims.HEARTBEAT_S if beat else 0):
            beat += 1
            try:
                (claim / "heartbeat").write_text(str(beat))
            except OSError:
                continue

    def release(self) -> None:
        """Release the lock, and delete the claims of earlier holders."""
        assert self._claim is not None, "release without acquire"
        self._done.set()
        files.write_atomic(self._claim / "released", b"")
        for name in files.names(self._folder):
            if name.isdigit() and int(name) < int(self._claim.name):
                shutil.rmtree(self._folder / name, ignore_errors=True)


def _holder(claim: Path) -> str:
    try:
        owner = claims.read_owner(claim)
    except OSError as error:
        return f"a process whose name cannot be read ({error.strerror})"
    return f"process {owner['pid']} on {owner['host']}" if owner else ""

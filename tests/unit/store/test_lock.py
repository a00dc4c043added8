"""The store's lock has one holder."""

import os
import subprocess
import sys
import threading

import pytest

from lorasweep.errors import StoreError
from lorasweep.store.claims import Lock
from tests.world import ROOT


def test_a_lock_has_one_holder_and_outlives_a_dead_one(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from lorasweep.store.claims import Lock\n"
        "lock = Lock(Path(sys.argv[1]) / 'lock'); total = Path(sys.argv[1]) / 'n'\n"
        "for _ in range(20):\n"
        "    lock = Lock(Path(sys.argv[1]) / 'lock'); lock.acquire(60, lambda who: None)\n"
        "    n = int(total.read_text()); time.sleep(0.002); total.write_text(str(n + 1)); lock.release()\n"
    )
    (tmp_path / "n").write_text("0")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=env) for _ in range(4)
    ]
    assert [w.wait() for w in workers] == [0] * 4 and (tmp_path / "n").read_text() == "80"
    dead = subprocess.run(
        [sys.executable, "-c", code.partition("for")[0] + "lock.acquire(9, print)", str(tmp_path)],
        env=env,
    )
    assert dead.returncode == 0
    mine = Lock(tmp_path / "lock")
    mine.acquire(5, lambda who: pytest.fail("waited for the dead"))
    waited = []
    with pytest.raises(StoreError, match=f"held by process {os.getpid()}"):
        Lock(tmp_path / "lock").acquire(0.5, waited.append)
    assert len(waited) == 1
    threading.Timer(0.5, mine.release).start()
    Lock(tmp_path / "lock").acquire(5, waited.append)

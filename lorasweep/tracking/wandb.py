"""Copy runs to Weights & Biases while they train. lorasweep reads results only from the run folder.

A process beside the command does it, so that W&B delays and fails no run. After a kill, W&B says
online which step is next; offline, a copy is hidden until it is whole, and begun again.
"""

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorasweep.errors import SpecError, check_installed
from lorasweep.store.files import check_writable, write_atomic
from lorasweep.store.run_store import RunStore

GRACE_S, SEND_S = 30.0, 1.0
"""Seconds that the command waits for W&B, and one a run; seconds between copies of records."""
HIDDEN, KEPT = ".lorasweep-", ("precision", "schedule", "objective", "layers")
"""Beginning of the name of an unfinished copy; settings whose text is sent."""
ON = ("x_disable_stats", "x_disable_meta", "x_disable_machine_info", "disable_git", "disable_code")
OFF: dict[str, Any] = {
    **dict.fromkeys((*ON, "silent"), True),
    **dict.fromkeys(("host", "username", "email", "program", "program_relpath"), ""),
    **{"console": "off", "symlink": False, "x_save_requirements": False},
}
_locks = dict[str, Any]()  # by run: the file that another command would lock


def check() -> Path:
    """Return W&B's folder. Raises SpecError without wandb, StoreError if it cannot be written."""
    check_installed("wandb", "mirror=wandb")
    if (mode := os.environ.get("WANDB_MODE", "offline")) not in ("offline", "online"):
        raise SpecError(f"WANDB_MODE={mode}: expected offline (if it is not set) or online.")
    if mode == "online":
        import wandb  # takes a moment to load

        if not wandb.api.api_key:
            raise SpecError("WANDB_MODE=online, but no key is known. Type: wandb login")
    folder = Path(os.environ.get("WANDB_DIR") or ".") / "wandb"
    check_writable(folder, "WANDB_DIR")
    return folder


def _mark(store: RunStore, rid: str) -> Path:
    return store.folder(rid) / f"mirrored-{os.environ.get('WANDB_MODE', 'offline')}.json"


@contextmanager
def mirroring(store: RunStore, group: str, words: Iterable[str]) -> Iterator[Any]:
    """Give a function that names runs to copy; `words`: names that may be sent."""
    command = [sys.executable, "-m", __name__, str(os.getpid()), str(store.root), group, *words]
    with tempfile.TemporaryFile("w+") as ids, tempfile.TemporaryFile("w+") as said:
        given: Any = {"stdin": ids, "stdout": said, "stderr": said, "start_new_session": True}
        process = subprocess.Popen(command, **given)  # files never block this one
        try:
            yield lambda new: print(*new, file=ids, flush=True)
        finally:
            ids.seek(0)
            left, until = list(store.finished(ids.read().split())), 0.0
            while left := [i for i in left if not _mark(store, i).exists()]:
                until = until or time.monotonic() + GRACE_S + len(left)
                if process.poll() is not None or time.monotonic() > until:
                    break
                time.sleep(0.1)
            process.kill()
            process.wait()
            if left:
                said.seek(0)
                why = said.read().strip().rpartition("\n")[2] or "no answer"
                text = f"not copied to W&B, run the command again: {len(left)} runs ({why})"
                print(text, file=sys.stderr)


def main(command: str, root: str, group: str, *words: str) -> None:
    """Copy the runs that the standard input names, a file that grows, until the command ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG: end with the command
    store, home = RunStore(root), check()
    runs, steps = dict[str, Any](), dict[str, int]()  # by id: W&B's run, and its next step
    while os.getppid() == int(command):  # if it was killed before prctl
        there = {path.parent.name for path in store.root.glob("*/spec.json")}
        for rid in os.pread(0, 1 << 24, 0).decode().split():
            if rid in there and not runs.get(rid) and not _mark(store, rid).exists():
                runs[rid] = _begin(store, rid, home, group, words)
            if run := runs.get(rid):
                result = store.result(rid)  # before the records, which are then complete
                for r in store.records(rid):
                    if r["step"] >= steps.setdefault(rid, run.starting_step):
                        run.log(_numbers(r), step=r["step"])
                        steps[rid] = r["step"] + 1
                if result is not None:
                    run.summary.update({**_numbers(result), "state": result["state"]})
                    run.finish()
                    for copy in home.glob(f"{HIDDEN}{rid}/wandb/offline-run-*"):
                        shutil.rmtree(copy / "logs", ignore_errors=True)  # they have paths
                        copy.rename(home / copy.name)
                    write_atomic(_mark(store, rid), b"{}\n")
                    shutil.rmtree(home / f"{HIDDEN}{rid}", ignore_errors=True)
                    del runs[rid], _locks[rid]
        time.sleep(SEND_S)


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if isinstance(v, int | float) and k != "step"}


def _begin(store: RunStore, rid: str, home: Path, group: str, words: Iterable[str]) -> Any:
    """Begin or resume a copy; return W&B's run, None if there is one or another command copies."""
    import wandb

    mode = os.environ.get("WANDB_MODE", "offline")
    partial = home / f"{HIDDEN}{rid}"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = _locks[rid] = (partial / "lock").open("wb")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):
        return None
    shutil.rmtree(partial / "wandb", ignore_errors=True)
    if mode == "offline" and any(home.glob(f"offline-run-*-{rid}")):  # killed before the mark
        return write_atomic(_mark(store, rid), b"{}\n")
    spec = store.spec(rid)
    method = spec["method"]["name"]
    given: dict[str, Any] = {"id": rid, "mode": mode, "resume": "allow", "reinit": "create_new"}
    return wandb.init(
        **given,
        dir=partial if mode == "offline" else None,
        name=f"{method if method in words else _hash(method)} lr={spec['lr']:g} {rid}",
        group=group if group in words else _hash(group),
        project=os.environ.get("WANDB_PROJECT", "lorasweep"),
        config=public(spec, words),
        settings=wandb.Settings(**OFF),
    )


def _hash(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def public(values: dict[str, Any], words: Iterable[str]) -> dict[str, Any]:
    """Return numbers, the texts in `words`, and a hash of the model and the data set (key id).

    A method or generator of another package names its own settings: of these only rank and alpha.
    """
    found = _numbers(values)
    for key, value in values.items():
        if isinstance(value, dict):
            place = values.get("location", values.get("dataset"))  # of a data set, of a recipe
            of = value.get("name") if key == "method" else place
            own = key in ("knobs", "method") and str(of) not in words and "config" not in value
            part = {k: v for k, v in value.items() if not own or k in ("rank", "alpha")}
            found[key] = public(part, words)
            found[key] |= {"id": _hash(value)} if key in ("model", "dataset") else {}
        elif isinstance(value, str) and (key in KEPT or value in words):
            found[key] = value
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])

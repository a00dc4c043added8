"""Refuse code and tasks that another user could have written, or that have changed.

    python -I -c "<this file>" JOB_FOLDER TASKS_SHA256 CODE_FOLDER CODE_DIGEST

Whoever can write the files that a job imports or unpickles can run code as the job's user. So a job
runs this check before it loads anything. The check is part of the job's script, which Slurm keeps,
so others cannot change it. It imports only the standard library.
"""

import hashlib
import os
import stat
import sys
from collections.abc import Iterable, Iterator

TASKS = "tasks.jsonl"
"""File in a job's folder with a line for each task."""
ABOUT = "snapshot.json"
"""File with the origin of a snapshot of the code. The snapshot's digest leaves it out."""


def digest(path: str) -> str:
    """Return the SHA-256 of a file, or of all files below a folder (with bytecode, not ABOUT)."""
    if not os.path.isdir(path):
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    found = {os.path.relpath(p, path): p for p in _below(path) if not os.path.isdir(p)}
    lines = (f"{digest(p)}  {name}\n" for name, p in sorted(found.items()) if name != ABOUT)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def problem(path: str, expected: str) -> str | None:
    """Return why a file or folder must not be used, or None; `expected`: its digest."""
    if why := untrusted((path, *_below(path))):
        return why
    return None if digest(path) == expected else f"{path} was changed after it was written"


def untrusted(paths: Iterable[str]) -> str | None:
    """Return why one of these files and folders is not trusted, or None."""
    for path in paths:
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode):
            return f"{path} is a link"
        if found.st_uid != os.geteuid():
            return f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}"
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"others may write {path}"
    return None


def _below(folder: str) -> Iterator[str]:
    for path, folders, names in os.walk(folder):
        for name in (*folders, *names):
            yield os.path.join(path, name)


def main(folder: str, tasks_sha256: str, code: str, code_sha256: str) -> None:
    """Exit with a message and status 1 if the job must not run."""
    array, index = map(os.environ.get, ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"))
    label = f"{array}_{index}" if array else os.environ.get("SLURM_JOB_ID")
    pickled = os.path.join(folder, f"{label}_submitted.pkl")
    why = untrusted([folder, *filter(os.path.lexists, [pickled])])
    why = why or problem(os.path.join(folder, TASKS), tasks_sha256) or problem(code, code_sha256)
    if why:
        sys.exit(
            f"lorasweep: this job is refused, because {why}. Another user could run code as you. "
            "Find out who caused this, then run the sweep's command again."
        )


if __name__ == "__main__":
    main(*sys.argv[1:])

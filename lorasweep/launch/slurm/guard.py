"""Refuse code and tasks that another user could have written, or that have changed.

    python -I -c "<this file>" JOB_FOLDER MANIFEST_SHA256 FIRST_TASK CODE_FOLDER CODE_DIGEST

Whoever can write the files that a job imports or unpickles can run code as the job's user. So a job
runs this check before it loads anything. The check is part of the job's script, which Slurm keeps,
so others cannot change it. It imports only the standard library.
"""

import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping

MANIFEST = "manifest.json"
"""File with the SHA-256 of each file that jobs read, by relative path."""
ABOUT = "snapshot.json"
"""File with the origin of a snapshot of the code. The snapshot's digest leaves it out."""


def sha256(path: str) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(sums: Mapping[str, str]) -> str:
    """Return one SHA-256 for many files, given as relative path (with /) -> SHA-256."""
    lines = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
    return hashlib.sha256(lines.encode()).hexdigest()


def digest(folder: str) -> str:
    """Return the digest (`digest_of`) of all files below a folder, also bytecode, but not ABOUT."""
    paths = (p for p in _below(folder) if not os.path.isdir(p))
    names = {os.path.relpath(p, folder).replace(os.sep, "/"): p for p in paths}
    return digest_of({name: sha256(p) for name, p in names.items() if name != ABOUT})


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


def code_problem(folder: str, expected: str) -> str | None:
    """Return why a snapshot of the code must not run, or None."""
    problem = untrusted((folder, *_below(folder)))
    if problem is None and digest(folder) != expected:
        problem = f"the code in {folder} was changed after the snapshot was made"
    return problem


def job_problem(folder: str, expected: str, task: int) -> str | None:
    """Return why the files of a task are refused, or None; `expected`: the manifest's SHA-256."""
    manifest = os.path.join(folder, MANIFEST)
    jobs = os.path.join(folder, "jobs")
    array, index = map(os.environ.get, ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"))
    label = f"{array}_{index}" if array and index else os.environ.get("SLURM_JOB_ID", "")
    pickled = os.path.join(jobs, f"{label}_submitted.pkl")
    paths = [folder, os.path.join(folder, "tasks"), jobs, manifest]
    if problem := untrusted([*paths, *filter(os.path.lexists, [pickled])]):
        return problem
    if sha256(manifest) != expected:
        return f"{manifest} was changed after the job was submitted"
    with open(manifest, encoding="utf-8") as file:
        sums = json.load(file)
    for name in {f"tasks/{task}.json", *(n for n in sums if "/" not in n)}:
        path = os.path.join(folder, name)
        if not os.path.lexists(path):
            return f"{path} is not there"
        if problem := untrusted([path]):
            return problem
        if sha256(path) != sums.get(name):
            return f"{path} was changed after the job was submitted"
    return None


def _below(folder: str) -> Iterator[str]:
    for path, folders, names in os.walk(folder):
        for name in (*folders, *names):
            yield os.path.join(path, name)


def main(folder: str, manifest: str, first: str, code: str, code_sha256: str) -> None:
    """Exit with a message and status 1 if the job must not run."""
    if not os.path.isdir(folder):
        node = os.environ.get("SLURMD_NODENAME", "?")
        sys.exit(
            f"lorasweep: {folder} is not visible on node {node}. The run folder must be on a file "
            "system that all nodes share: exec.runs_dir=FOLDER."
        )
    task = int(first) + int(os.environ.get("SLURM_ARRAY_TASK_ID") or 0)
    problem = job_problem(folder, manifest, task) or code_problem(code, code_sha256)
    if problem:
        sys.exit(
            f"lorasweep: this job is refused, because {problem}. Another user could run code as "
            "you. Find out who caused this, then run the sweep's command again."
        )


if __name__ == "__main__":
    main(*sys.argv[1:])

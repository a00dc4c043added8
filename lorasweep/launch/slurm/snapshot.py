"""Copy the current code into the run folder, so that later edits do not change queued jobs."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lorasweep.errors import ClusterError
from lorasweep.launch.slurm import guard
from lorasweep.store import files
from lorasweep.tracking import provenance

PACKAGES = ("lorasweep", "analysis")
SKIPPED = {"__pycache__", "results", ".ipynb_checkpoints"}
"""Folders that jobs do not need: caches, and kept results (tables and figures)."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of the code in a folder, and its `guard.digest`."""

    folder: Path
    sha256: str


def take(root: Path) -> Snapshot:
    """Copy the running code into a folder in `root`, unless the folder is there.

    If the running code is itself a snapshot, return that one. The folder's name is made from
    content and user. Raises ClusterError if other users changed the snapshot or could change it.
    """
    here = Path(__file__).resolve().parents[3]
    if (here / guard.ABOUT).is_file():
        sha256 = guard.digest(str(here))
        return _checked(here, sha256 if _name(sha256) == here.name else "")
    sha256 = guard.digest_of({t.as_posix(): guard.sha256(str(s)) for s, t in _files(here)})
    if not (root / _name(sha256)).is_dir():
        partial = root / f".copy.{os.getpid()}.{os.urandom(3).hex()}"
        partial.mkdir()
        for source, target in _files(here):
            path = partial / target
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, path)
            files.sync(path)
        sha256 = guard.digest(str(partial))  # files may have changed since the first digest
        folder = root / _name(sha256)
        copied = (*(f"{p}/" for p in PACKAGES), "conf/", "sweeps/")
        edited = [f for f in provenance.edited() if f.startswith(copied)]
        about = {**provenance.code(), "snapshot": folder.name, "edited": edited}
        files.write_atomic(partial / guard.ABOUT, json.dumps(about, indent=1).encode())
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(partial)  # another command was faster, with the same content
        files.sync(root)
    return _checked(root / _name(sha256), sha256)


def _name(sha256: str) -> str:
    return f"{sha256[:12]}_{os.geteuid()}"


def _checked(folder: Path, sha256: str) -> Snapshot:
    if problem := guard.code_problem(str(folder), sha256):
        raise ClusterError(
            f"code snapshot {folder} is refused: {problem}. Another user could run code as you. "
            f"Find out who caused this, then delete the snapshot (rm -r {folder}) and run the "
            "command again."
        )
    return Snapshot(folder, sha256)


def describe(snapshot: Snapshot) -> str:
    """Describe a snapshot in words: its commit, and the files edited since."""
    about = json.loads((snapshot.folder / guard.ABOUT).read_bytes())
    edited, text = about["edited"], f"code snapshot {about['snapshot']}"
    if about["commit"] is None:
        return f"{text} (the installed package)"
    names = ", ".join(edited[:4]) + (", ..." if len(edited) > 4 else "")
    changed = f", with {len(edited)} file(s) changed since ({names})" if edited else ""
    return f"{text} of commit {about['commit'][:10]}{changed}"


def _files(here: Path) -> Iterator[tuple[Path, Path]]:
    """Yield each file and its path in the snapshot, with conf/ at the top as in a checkout."""
    candidates = (here / "conf", here / "lorasweep" / "conf")
    conf = next(c for c in candidates if (c / "config.yaml").is_file())
    for top, target in (*((here / p, Path(p)) for p in PACKAGES), (conf, Path("conf"))):
        for folder, inner, names in os.walk(top, followlinks=True):
            skipped = SKIPPED | ({"conf"} if Path(folder) == here / "lorasweep" else set())
            inner[:] = sorted(set(inner) - skipped)
            for name in sorted(names):
                path = Path(folder) / name
                yield path, target / path.relative_to(top)

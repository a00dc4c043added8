"""Copy the current code into the run folder, so that later edits do not change queued jobs."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from lorasweep.errors import ClusterError
from lorasweep.launch.slurm import guard
from lorasweep.store import files
from lorasweep.tracking import provenance

SKIPPED = {"__pycache__", "results", ".ipynb_checkpoints"}
"""Folders that jobs do not need: caches, and kept results (tables and figures)."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of the code in a folder, and its `guard.digest`."""

    folder: Path
    sha256: str


def take(root: Path) -> Snapshot:
    """Copy the running code into a folder in `root`, named by its digest; keep one that is there.

    If the running code is itself a snapshot, return that one. Raises ClusterError if others changed
    the snapshot or could change it.
    """
    here = folder = Path(__file__).resolve().parents[3]
    if (here / guard.ABOUT).is_file():
        sha256 = guard.digest(str(here))
    else:
        partial = root / f".copy.{os.getpid()}.{os.urandom(3).hex()}"
        _copy(here, partial)
        sha256 = guard.digest(str(partial))
        folder = root / sha256[:12]
        about = {**provenance.code(), "snapshot": folder.name}
        files.write_atomic(partial / guard.ABOUT, json.dumps(about, indent=1).encode())
        try:
            os.rename(partial, folder)
        except OSError:  # it is there
            shutil.rmtree(partial)
    problem = guard.problem(str(folder), sha256)
    if problem or folder.name != sha256[:12]:
        raise ClusterError(
            f"code snapshot {folder} is refused: {problem or 'it was changed'}. Another user could "
            f"run code as you. Find out who caused this, then delete the snapshot (rm -r {folder}) "
            "and run the command again."
        )
    return Snapshot(folder, sha256)


def describe(snapshot: Snapshot) -> str:
    """Describe a snapshot in words: its commit, and whether files were edited since."""
    about = json.loads((snapshot.folder / guard.ABOUT).read_bytes())
    commit, edited = about["commit"], ", with files edited since" if about["dirty"] else ""
    of = f"of commit {commit[:10]}{edited}" if commit else "of the installed package"
    return f"code snapshot {about['snapshot']} {of}"


def _copy(here: Path, to: Path) -> None:
    """Copy the code, with conf/ at the top as in a checkout; permissions are those of this user."""
    candidates = (here / "conf", here / "lorasweep" / "conf")
    conf = next(c for c in candidates if (c / "config.yaml").is_file())
    for top in (here / "lorasweep", here / "analysis", conf):
        for folder, inner, names in os.walk(top, followlinks=True):
            skipped = SKIPPED | ({"conf"} if Path(folder) == here / "lorasweep" else set())
            inner[:] = set(inner) - skipped
            target = to / top.name / Path(folder).relative_to(top)
            target.mkdir(parents=True)
            for name in names:
                shutil.copyfile(Path(folder) / name, target / name)

"""The copy of the code that jobs run, in the run folder, and whether jobs can use that folder."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from lorasweep.errors import ClusterError
from lorasweep.launch.slurm import guard
from lorasweep.launch.slurm import queue as slurm
from lorasweep.launch.slurm.queue import Partition
from lorasweep.spec.execution import Cluster
from lorasweep.store import files
from lorasweep.tracking import provenance

LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")  # nodes usually do not share them
SKIPPED = {"__pycache__", "results", ".ipynb_checkpoints"}
"""Folders that jobs do not need: caches, and kept results (tables and figures)."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of the code in a folder, so that later edits do not change queued jobs."""

    folder: Path
    sha256: str  # its `guard.digest`


def take(root: Path) -> Snapshot:
    """Copy the running code into a folder in `root`, named by its digest, if it is not there.

    conf/ is at the top, as in a checkout; permissions are those of this user. Running code that is
    a snapshot is not copied. Raises ClusterError if others changed it or could change it.
    """
    here = folder = Path(__file__).resolve().parents[3]
    if (here / guard.ABOUT).is_file():
        sha256 = guard.digest(str(here))
    else:
        partial = root / f".copy.{os.getpid()}.{os.urandom(3).hex()}"
        inside = here / "lorasweep"
        conf = next(c for c in (here / "conf", inside / "conf") if (c / "config.yaml").is_file())
        for top in (inside, here / "analysis", conf):
            for path, inner, names in os.walk(top, followlinks=True):
                skipped = SKIPPED | ({"conf"} if Path(path) == inside else set())
                inner[:] = set(inner) - skipped
                target = partial / top.name / Path(path).relative_to(top)
                target.mkdir(parents=True)
                for name in names:
                    shutil.copyfile(Path(path) / name, target / name)
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


def prepare(cluster: Cluster, root: Path) -> tuple[Partition, Snapshot]:
    """Check that jobs can use the run folder (else ClusterError), and copy the code there."""
    place, owner = root.resolve(), files.status(root)
    if os.pathsep in str(root):
        raise ClusterError(
            f"exec.runs_dir={root} has a '{os.pathsep}' in its name, at which the jobs' PYTHONPATH "
            "splits. Choose a folder without it."
        )
    if owner and owner.st_uid != os.geteuid():  # root: `jobs_of` would not show its jobs
        raise ClusterError(f"exec.runs_dir={root} is of user {owner.st_uid}: submit as this user.")
    if not cluster.shared and any(place.is_relative_to(folder) for folder in LOCAL_FOLDERS):
        raise ClusterError(
            f"run folder {place}: nodes usually cannot see it, as it is local to a machine. Set "
            "exec.runs_dir=FOLDER (or LORASWEEP_RUNS) on a shared file system. If the nodes do see "
            "it, set cluster.shared=true."
        )
    partition = slurm.partition_of(cluster)
    home = slurm.home(root) / "code"
    home.mkdir(parents=True, exist_ok=True)
    return partition, take(home)

"""Run the worker processes of a job inside a container (pyxis or apptainer).

The job itself stays outside, with the Python that submitted it: only there are Slurm's commands.
"""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasweep.errors import ClusterError
from lorasweep.spec.execution import Cluster, Exec

APPTAINER, PYXIS = "apptainer", "pyxis"
VARIABLE = "LORASWEEP_CONTAINER"
"""Environment variable with the image, in jobs whose workers run inside a container."""
FORCED = ("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONDONTWRITEBYTECODE", "HF_HOME")
"""Environment variables that must not be replaced by those of the image."""


@dataclass(frozen=True)
class Container:
    """An image, and the folders that are visible inside it at the same paths."""

    image: str
    kind: str
    folders: list[str]
    """Folders of the runs; those that a node does not have are left out there."""
    mounts: list[str]
    """Folders of the user: FOLDER or FOLDER:FOLDER_INSIDE."""

    @property
    def by_srun(self) -> bool:
        """Whether srun starts processes inside the container (pyxis extends srun)."""
        return self.kind == PYXIS

    def _mounts(self) -> str:
        hub = os.environ.get("HF_HOME")  # cluster.setup may have set it
        named = [*self.folders, *([hub] if hub else ())]
        there = [folder for folder in named if Path(folder).is_dir()]
        pairs = [m if ":" in m else f"{m}:{m}" for m in (*there, *self.mounts)]
        return ",".join(dict.fromkeys(pairs))

    def srun(self) -> list[str]:
        """Return srun's options for a step inside the container; empty with apptainer."""
        if not self.by_srun:
            return []
        where = [f"--container-mounts={self._mounts()}", f"--container-workdir={os.getcwd()}"]
        return [f"--container-image={self.image}", *where, "--no-container-entrypoint"]

    def python(self, env: Mapping[str, str], more: Sequence[str] = ()) -> list[str]:
        """Return the words that start the image's Python; with pyxis, for a step with `srun`.

        `env`: the process's environment; of it, FORCED and the names in `more` also replace what
        the image or Slurm sets. Raises ClusterError without apptainer on this node.
        """
        kept = [f"{name}={env[name]}" for name in (*FORCED, *more) if name in env]
        # packages in the user's home are for the Python outside
        inside = ["env", "PYTHONNOUSERSITE=1", *kept, "python3"]
        if self.by_srun:
            return inside
        program = next(filter(shutil.which, (APPTAINER, "singularity")), None)
        if program is None:
            raise ClusterError(
                f"cluster.container={self.image}: this node has no apptainer on the PATH. Load it, "
                "such as cluster.setup=['module load apptainer']."
            )
        mounts = ["--bind", self._mounts(), "--pwd", os.getcwd()]
        return [program, "exec", "--nv", *mounts, self.image, *inside]


def container_of(cluster: Cluster, exec_: Exec) -> Container | None:
    """Return the container of a cluster's jobs, or None.

    Raises ClusterError: there is no such image, or a folder's name cannot be mounted.
    """
    image = cluster.container
    if image is None:
        return None
    if image.endswith((".sif", ".sqsh")) and not Path(image).exists():
        raise ClusterError(f"cluster.container={image}: there is no such file.")
    hub = str(Path.home() / ".cache" / "huggingface")
    here = str(Path.cwd())
    named = [exec_.runs_dir, exec_.reports_dir, *exec_.models_dir, *exec_.data_dir, hub, here]
    paths = [Path(folder).absolute() for folder in named]
    folders = list(dict.fromkeys(str(q) for p in paths for q in (p, p.resolve())))
    for folder in folders:
        if re.search("[:,]", folder):
            raise ClusterError(
                f"cluster.container: {folder} has a ':' or ',' in its name, and cannot be mounted "
                "inside a container. Choose another folder."
            )
    kind = cluster.container_kind or (APPTAINER if image.endswith(".sif") else PYXIS)
    return Container(image, kind, [f for f in folders if f != "/"], cluster.container_mounts)

"""The container in which workers of a cluster's jobs run: an image, and folders visible inside."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasweep.errors import ClusterError
from lorasweep.spec.execution import Cluster, Exec

VARIABLE = "LORASWEEP_CONTAINER"
"""Environment variable with the image, in jobs whose workers run inside a container."""
FORCED = ("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONDONTWRITEBYTECODE", "HF_HOME")
"""Environment variables that must not be replaced by those of the image."""


@dataclass(frozen=True)
class Container:
    """An image, and the folders that are visible inside it at the same paths, where they exist.

    `by_srun`: srun starts processes inside (pyxis extends srun); else apptainer. `mounts`: the
    user's FOLDER or FOLDER:FOLDER_INSIDE.
    """

    image: str
    by_srun: bool
    folders: list[str]
    mounts: list[str]

    def _mounts(self) -> str:
        # cluster.setup may have set HF_HOME
        named = [f for f in (*self.folders, os.environ.get("HF_HOME")) if f and Path(f).is_dir()]
        pairs = [m if ":" in m else f"{m}:{m}" for m in (*named, *self.mounts)]
        return ",".join(dict.fromkeys(pairs))

    def srun(self) -> list[str]:
        """Return srun's options for a step inside the container; empty with apptainer."""
        where = [f"--container-mounts={self._mounts()}", f"--container-workdir={os.getcwd()}"]
        image = [f"--container-image={self.image}", *where, "--no-container-entrypoint"]
        return image if self.by_srun else []

    def python(self, env: Mapping[str, str], more: Sequence[str] = ()) -> list[str]:
        """Return the words that start the image's Python; with pyxis, for a step with `srun`.

        FORCED and the names in `more` of the environment `env` replace what the image or Slurm
        sets. Raises ClusterError without apptainer on this node.
        """
        kept = [f"{name}={env[name]}" for name in (*FORCED, *more) if name in env]
        # packages in the user's home are for the Python outside
        inside = ["env", "PYTHONNOUSERSITE=1", *kept, "python3"]
        if self.by_srun:
            return inside
        program = next(filter(shutil.which, ("apptainer", "singularity")), None)
        if program is None:
            raise ClusterError(
                f"cluster.container={self.image}: this node has no apptainer on the PATH. Load it, "
                "such as cluster.setup=['module load apptainer']."
            )
        mounts = ["--bind", self._mounts(), "--pwd", os.getcwd()]
        return [program, "exec", "--nv", *mounts, self.image, *inside]


def container_of(cluster: Cluster, exec_: Exec) -> Container | None:
    """Return the container of a cluster's jobs, or None; raise ClusterError without the image."""
    image = cluster.container
    if image is None:
        return None
    if image.endswith((".sif", ".sqsh")) and not Path(image).exists():
        raise ClusterError(f"cluster.container={image}: there is no such file.")
    hub = str(Path.home() / ".cache" / "huggingface")
    named = [exec_.runs_dir, exec_.reports_dir, *exec_.models_dir, *exec_.data_dir, hub, "."]
    paths = [Path(folder).absolute() for folder in named]
    folders = dict.fromkeys(str(q) for p in paths for q in (p, p.resolve()) if str(q) != "/")
    kind = cluster.container_kind or ("apptainer" if image.endswith(".sif") else "pyxis")
    return Container(image, kind == "pyxis", list(folders), cluster.container_mounts)

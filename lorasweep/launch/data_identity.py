"""Refuse to train on other data than before, under one name and in one run folder.

The first worker that loads a data set notes its fingerprint; the analysis would refuse to judge the
runs of two, but only after they were trained.
"""

import hashlib
import json
from pathlib import Path

from lorasweep.errors import DataError
from lorasweep.spec.run import RunSpec
from lorasweep.store import files

FOLDER = ".data"
"""Folder in the run folder with a file for every model and data set."""


def check_same_data(root: Path, spec: RunSpec, sha256: str | None) -> None:
    """Note the fingerprint of a run's data, or compare it with the noted one.

    Does nothing outside a run folder, and for data without a fingerprint. In a folder that this
    user may only read nothing is noted, because no run of it is trained there.

    Raises:
        DataError: the data are others than before.
    """
    if sha256 is None or not root.is_dir():
        return
    key = hashlib.sha256(f"{spec.model.canonical}{spec.dataset.canonical}".encode()).hexdigest()
    path = root / FOLDER / f"{key[:16]}.json"
    mine = {"model": spec.model.name, "dataset": spec.dataset.name, "data_sha256": sha256}
    noted = (files.read_json(path) or _note(path, mine))["data_sha256"]
    if noted != sha256:
        raise DataError(
            f"dataset {spec.dataset.name!r}: these are not the data that runs in {root} were "
            f"trained on before (fingerprint {noted[:12]} then, {sha256[:12]} now). Get those data "
            f"back, or use a fresh run folder (exec.runs_dir={root}-2), or give the new data a "
            f"name of their own. If no run was trained on the old ones, delete {path}."
        )


def _note(path: Path, mine: dict[str, str]) -> dict[str, str]:
    """Write the note unless another process was faster, and return what is noted."""
    try:
        path.parent.mkdir(exist_ok=True)
        files.create_once(path, json.dumps(mine).encode())
    except OSError as error:
        if error.errno not in files.READ_ONLY:
            raise
    return files.read_json(path) or mine

"""Check store.json: the train_version of a folder's runs. Two versions are never mixed."""

import json
import os
from pathlib import Path

from lorasweep.errors import StoreError
from lorasweep.spec.run import TRAIN_VERSION
from lorasweep.store import files


def prepare(root: Path) -> None:
    """Create the folder and test that it is writable.

    Raises:
        StoreError: it cannot be written, is damaged, or belongs to another train_version.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        files.share_as(root)
        probe = root / f".probe.{os.getpid()}"
        files.write_atomic(probe, b"")
        probe.unlink()
        mark = root / "store.json"
        files.create_once(mark, json.dumps({"train_version": TRAIN_VERSION}).encode())
        version = json.loads(mark.read_bytes())["train_version"]
    except OSError as error:
        raise StoreError(
            f"run folder {root} cannot be written ({error.strerror or error}). "
            "Choose another: exec.runs_dir=FOLDER, or set LORASWEEP_RUNS."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise StoreError(
            f'{mark} is damaged. Replace its content by {{"train_version": {TRAIN_VERSION}}}.'
        ) from None
    if version != TRAIN_VERSION:
        raise StoreError(
            f"run folder {root} was written with train_version {version}; this lorasweep has "
            f"version {TRAIN_VERSION}, and the two are never mixed. "
            "Use another folder: exec.runs_dir=FOLDER."
        )

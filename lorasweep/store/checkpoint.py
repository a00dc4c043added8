"""Checkpoints of one run: two slots, each a safetensors file and a JSON description.

If several processes train the run, a slot has a folder with one safetensors file per process. A
kill during a write leaves the other slot intact. Nothing is unpickled; checksums are verified.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from lorasweep.store import files

if TYPE_CHECKING:
    from torch import Tensor

SLOTS = ("a", "b")
PARAM = "param/"
"""Prefix of the names of trained tensors in a state. Other tensors belong to the optimizer."""
WEIGHTS = "weights.safetensors"
"""File with the trained weights in the folder of a finished run (exec.keep_weights)."""
FILES = "files"
"""Key in the description of a checkpoint of several processes: file name -> SHA-256."""


class State(TypedDict):
    """State that one run resumes from."""

    tensors: dict[str, "Tensor"]
    """Empty if several processes train the run: each holds or reads its own part."""
    meta: dict[str, Any]
    """JSON values, at least `step`."""
    write: NotRequired[Callable[[Path], dict[str, str]]]
    """Makes all processes write their tensors into an empty folder; returns file -> SHA-256."""
    path: NotRequired[Path]
    """File that the tensors were read from, or folder with the files of several processes."""


def save(folder: Path, state: State) -> None:
    """Write a state into the older slot."""
    folder.mkdir(exist_ok=True)
    steps = {slot: step for step, (slot, _) in described(folder).items()}
    slot = min(SLOTS, key=lambda s: steps.get(s, -1))
    (folder / f"{slot}.json").unlink(missing_ok=True)  # without it the slot is invalid
    path, parts = folder / f"{slot}.safetensors", folder / f"{slot}.parts"
    shutil.rmtree(parts, ignore_errors=True)
    if "write" in state:
        path.unlink(missing_ok=True)
        parts.mkdir()
        meta = {**state["meta"], FILES: state["write"](parts)}
    else:
        _save_file(state["tensors"], path)
        meta = {**state["meta"], "sha256": files.sha256(path)}
    files.write_atomic(folder / f"{slot}.json", json.dumps(meta).encode())


def _save_file(tensors: dict[str, "Tensor"], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    except SafetensorError as error:  # the operating system's error number is in its text
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error
    files.sync(path)


def weights_of(state: State) -> dict[str, "Tensor"]:
    """Return the trained tensors of a state, by name."""
    named = state["tensors"].items()
    return {k.removeprefix(PARAM): v for k, v in named if k.startswith(PARAM)}


def save_weights(run: Path, state: State) -> None:
    """Write the trained tensors of a state into a run's folder, all of them or none."""
    partial = run / f".{WEIGHTS}.{os.getpid()}"
    try:
        _save_file(weights_of(state), partial)
        os.replace(partial, run / WEIGHTS)
    finally:
        partial.unlink(missing_ok=True)


def load_weights(run: Path) -> dict[str, "Tensor"] | None:
    """Return the tensors that `save_weights` wrote; None if there are none."""
    from safetensors.torch import load_file

    path = run / WEIGHTS
    return files.patiently(path, lambda: load_file(path) if path.exists() else None)


def described(folder: Path) -> dict[int, tuple[str, dict[str, Any]]]:
    """Map step to slot and description, where that is valid. Reads no tensors."""
    found = {}
    for slot in SLOTS:
        meta = files.read_json(folder / f"{slot}.json")
        if isinstance(meta, dict) and isinstance(meta.get("step"), int):
            found[meta["step"]] = (slot, meta)
    return found


def keep_only(folder: Path, step: int | None) -> None:
    """Invalidate all checkpoints except the one at `step`. Later ones belong to deleted records."""
    for at, (slot, _) in described(folder).items():
        if at != step:
            (folder / f"{slot}.json").unlink(missing_ok=True)


def layout(folder: Path) -> tuple[str, ...]:
    """Return the ids of the runs in the pack at the latest checkpoint; empty without one."""
    _, (_, meta) = max(described(folder).items(), default=(0, ("", {"layout": ()})))
    return tuple(meta["layout"])


def load(folder: Path, step: int) -> State | None:
    """Load the checkpoint of `step`; None if missing or damaged. Raises StoreError like `files`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if (found := described(folder).get(step)) is None:
        return None
    slot, meta = found
    if FILES in meta:
        parts, sums = folder / f"{slot}.parts", meta[FILES].items()
        valid = files.patiently(
            parts, lambda: all(files.sha256(parts / n) == sha for n, sha in sums)
        )
        return {"tensors": {}, "meta": meta, "path": parts} if valid else None
    path = folder / f"{slot}.safetensors"

    def read_verified() -> "dict[str, Tensor] | None":
        if files.sha256(path) != meta["sha256"]:
            return None
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            # safetensors reports any file that it cannot open as missing; this one exists
            raise OSError(errno.EIO, str(error), str(path)) from error

    tensors = files.patiently(path, read_verified)
    return None if tensors is None else {"tensors": tensors, "meta": meta, "path": path}


def load_pack(folders: dict[str, Path]) -> dict[str, State] | None:
    """Load the latest step for which every run has a valid checkpoint; None if there is none.

    The runs of a pack write the same steps, so two slots hold a common step even if the pack was
    killed between the writes of two runs. Raises StoreError if a checkpoint cannot be read now.
    """
    common = set.intersection(*({*described(f)} for f in folders.values()))
    for step in sorted(common, reverse=True):
        loaded = {rid: load(f, step) for rid, f in folders.items()}
        states = {rid: state for rid, state in loaded.items() if state is not None}
        if len(states) == len(folders):
            return states
    return None

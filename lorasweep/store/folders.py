"""Write folders of results without touching files that lorasweep did not write.

A marker in each folder lists the names and SHA-256 of our files. Lines are only added to it, before
files are moved in, so neither a kill nor a second command makes our files look like the user's.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lorasweep.errors import SpecError, StoreError
from lorasweep.spec.execution import Exec
from lorasweep.spec.model import ModelSpec
from lorasweep.store import files

MARK, PARTIAL = ".lorasweep.jsonl", ".lorasweep.partial"
WEIGHTS = "adapter_model.safetensors"
KINDS = {"facts.json", "lorasweep.json", "fleet.json"}
"""Files that say what a folder is: of a customer, of a search, of a fleet."""
LOCK_S = 600.0
"""Seconds to wait for another command that writes the folder."""
NO_RESULTS = ("lost+found", "Thumbs.db", "desktop.ini", "@eaDir")
"""Names that a new folder may have, beside those that begin with a dot."""


def check(
    folder: Path,
    last: str,
    exec_: Exec,
    models: Iterable[ModelSpec],
    inputs: Iterable[str | Path] = (),
) -> None:
    """Raise SpecError or StoreError unless a folder can be written and `replaced`.

    It must not be or contain the run folder, a local model or an input, nor lie in the run folder.
    """
    here, store = (Path(os.path.realpath(path)) for path in (folder, exec_.runs_dir))
    dirs = [*exec_.data_dir, *exec_.models_dir]
    local = {m.location for m in models if m.source in ("folder", "gguf")}
    for path in (store, *inputs, *dirs, *(Path(d, name) for d in dirs for name in local)):
        real = Path(os.path.realpath(path))
        if here in (real, *real.parents) or (real == store and store in here.parents):
            raise SpecError(
                f"out={folder} would be mixed with {path}, which this command reads or writes. "
                "Name another folder."
            )
    files.check_writable(folder, "out")
    _unchanged(folder, last)


@contextmanager
def replaced(folder: Path, last: str, whole: bool = True) -> Iterator[Path]:
    """Yield a new folder, whose files replace our files in `folder` when the block ends.

    The file `last` is moved last: a folder that has it is complete. `whole`: remove our other
    files, and refuse a folder of another kind, or one that has files and no marker.

    Raises SpecError if a file is not ours or was changed, StoreError as on a full disk.
    """
    partial = folder / PARTIAL
    try:
        with files.locked(folder / MARK, LOCK_S):
            shutil.rmtree(partial, ignore_errors=True)  # of a command that was killed
            try:
                partial.mkdir()
                yield partial
                _move(folder, partial, last, whole)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except Exception as error:  # libraries name the operating system's error in the text
        if not isinstance(error, OSError) and not re.search(r"os error \d+", str(error)):
            raise
        raise StoreError(
            f"{folder} cannot be written ({getattr(error, 'strerror', None) or error}). Free space "
            "or name another folder with out=, and run the command again; finished runs are kept."
        ) from error


def _move(folder: Path, partial: Path, last: str, whole: bool) -> None:
    new = {}
    for path in filter(Path.is_file, partial.rglob("*")):
        files.sync(path)
        new[path.relative_to(partial).as_posix()] = files.sha256(path)
    there = _unchanged(folder, last, new, whole)
    gone = there.keys() - new.keys() if whole else set()
    if gone or not there.items() >= new.items():
        files.append(folder / MARK, f"\n{json.dumps(there)}\n{json.dumps(new)}\n".encode())
        files.sync(folder / MARK)
        for name in {*gone, last} & there.keys():
            (folder / name).unlink()
        for name in sorted(new, key=lambda name: name == last):
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(partial / name, folder / name)
        files.sync(folder)


def _unchanged(
    folder: Path, last: str, new: Mapping[str, str] = {}, whole: bool = True
) -> dict[str, str]:
    """Return our files in a folder with SHA-256; SpecError: one was changed or is in the way."""
    if folder.is_symlink():
        raise SpecError(f"out={folder} is a link. Name a folder.")
    listed: dict[str, set[str]] = {}
    for line in (files.read(folder / MARK) or b"").splitlines():
        with suppress(ValueError, AttributeError, TypeError):  # a line that was cut off
            for name, digest in json.loads(line).items():
                listed.setdefault(name, set()).add(digest)
    results = [n for n in files.names(folder) if n[0] != "." and n not in NO_RESULTS]
    if not listed and results and whole:
        raise SpecError(
            f"{folder} has files, and no {MARK} that says which of them lorasweep wrote. Nothing "
            "in it is replaced: name a new folder with out=, or move the files away."
        )
    other = KINDS & listed.keys() - {last}
    if not other and last in KINDS and last not in listed:
        other = {WEIGHTS} & listed.keys()  # an adapter alone, of action=adapter
    if whole and other and any(map(os.path.lexists, (folder / name for name in listed))):
        raise SpecError(
            f"out={folder} is the folder of a fleet, of a customer, of a search or of an adapter "
            f"({min(other)}). Name another folder."
        )
    there = {}
    for name in sorted({*listed, *new}):
        path = folder / name
        if os.path.lexists(path) or path.parent.is_symlink():
            real = os.path.join(os.path.realpath(folder), name)  # "": a link or a folder
            there[name] = (
                files.sha256(path) if os.path.realpath(path) == real and path.is_file() else ""
            )
            if there[name] not in {*listed.get(name, ()), new.get(name)}:
                raise SpecError(
                    f"{path} is not as lorasweep wrote it, so it is not replaced. Move it away, or "
                    "name another folder with out=."
                )
    return there

"""Write folders of results without touching files that lorasweep did not write.

A marker in each folder lists the names and SHA-256 of our files. Lines are only added to it, before
files are moved in, so neither a kill nor a second command makes our files look like the user's.
"""

import fcntl
import hashlib
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
CARD, OLD_CARD, WEIGHTS = "README.md", "README.0.2.md", "adapter_model.safetensors"
"""OLD_CARD: a card of version 0.2 is kept by this name, as it may have been edited."""
ADAPTER = r"README\.md|adapter_config\.json|adapter_model\.safetensors"
MODEL = r"README\.md|(generation_)?config\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
KINDS = {
    "facts.json": (
        "run",
        rf"{ADAPTER}|facts\.json|chat_template\.jinja|generation_config\.json"
        r"|tokenizer(_config)?\.json|special_tokens_map\.json",
    ),
    "lorasweep.json": ("answer", rf"{ADAPTER}|lorasweep\.json"),
    "fleet.json": ("mask", r"fleet\.json|index\.html"),
}
"""File that says what a folder is -> a key in it, and the names of our files in such a folder of
version 0.2, which has no marker."""
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
    partial, mark = folder / PARTIAL, folder / MARK
    try:
        with _locked(mark):
            shutil.rmtree(partial, ignore_errors=True)  # of a command that was killed
            try:
                partial.mkdir()
                yield partial
                _move(folder, partial, last, whole)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
                with suppress(OSError):  # leave no new folder without files
                    if not mark.stat().st_size:
                        mark.unlink()
                        folder.rmdir()
    except Exception as error:  # libraries name the operating system's error in the text
        if not isinstance(error, OSError) and not re.search(r"os error \d+", str(error)):
            raise
        raise StoreError(
            f"{folder} cannot be written ({getattr(error, 'strerror', None) or error}). Free space "
            "or name another folder with out=, and run the command again; finished runs are kept."
        ) from error


@contextmanager
def _locked(mark: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made, in its marker."""
    while True:
        mark.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = mark.open("ab")
        except FileNotFoundError:  # a command that failed has deleted the folder
            continue
        with lock:
            with suppress(OSError):  # without locks on the file system, the slower command fails
                fcntl.flock(lock, fcntl.LOCK_EX)
            now = files.status(mark)
            if now and now.st_ino == os.fstat(lock.fileno()).st_ino:
                yield
                return


def _move(folder: Path, partial: Path, last: str, whole: bool) -> None:
    new = {}
    for path in filter(Path.is_file, partial.rglob("*")):
        files.sync(path)
        new[path.relative_to(partial).as_posix()] = _sha256(path)
    there = _unchanged(folder, last, new, whole)
    for name in there.keys() & {CARD, f"adapter/{CARD}"}:
        if not (folder / MARK).stat().st_size:
            os.rename(folder / name, (folder / name).with_name(OLD_CARD))
            del there[name]
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
    if not listed and results:
        old = _of_02(folder)
        if whole and (not old or (CARD in results and OLD_CARD in results)):
            raise SpecError(
                f"{folder} has files, and no {MARK} that says which of them lorasweep wrote. "
                "Nothing in it is replaced: name a new folder with out=, or move the files away."
            )
        listed = {path.relative_to(folder).as_posix(): {_sha256(path)} for path in old}
    other = KINDS.keys() & listed.keys() - {last}
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
            there[name] = _sha256(path) if os.path.realpath(path) == real and path.is_file() else ""
            if there[name] not in {*listed.get(name, ()), new.get(name)}:
                raise SpecError(
                    f"{path} is not as lorasweep wrote it, so it is not replaced. Move it away, or "
                    "name another folder with out=."
                )
    return there


def _of_02(folder: Path) -> list[Path]:
    """Return our files in a folder of version 0.2."""
    found: list[Path] = []
    for name, (key, pattern) in KINDS.items():
        values = files.read_json(folder / name)
        if isinstance(values, dict) and key in values:
            answer = values[key] if name == "lorasweep.json" else None
            if isinstance(answer, dict) and answer.get("method") == "fullft":
                pattern = rf"{MODEL}|lorasweep\.json"
                found += [p for p in folder.glob("adapter/*") if re.fullmatch(ADAPTER, p.name)]
            found += [p for p in folder.glob("*") if re.fullmatch(pattern, p.name)]
    return [path for path in found if path.is_file()]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

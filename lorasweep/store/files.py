"""Durable file operations, and reads that distinguish "not there" from "cannot be read now".

The store writes only through these functions. A reader sees the old or the new content of a file,
never a part. A failed read is retried, then raises: it must not make a run look free or a
checkpoint lost. Tests replace `os` in this module to make each operation fail in turn.
"""

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from lorasweep.errors import StoreError

T = TypeVar("T")
Notify = Callable[[str], None]
"""Prints a line for the user."""
LOCK_POLL_S = 0.2
NOT_THERE = (FileNotFoundError, NotADirectoryError)
PAUSES_S = (0.1, 0.5, 2.0)
"""Pauses before the retries of a failed read."""


def patiently(path: str | Path, read: Callable[[], T]) -> T | None:
    """Return `read()`, retried if it fails; None if there is no such file or folder.

    Raises StoreError if every try fails for another reason. So do the functions below that read.
    """
    pauses = list(PAUSES_S)
    while True:
        try:
            return read()
        except NOT_THERE:
            return None
        except OSError as error:
            if not pauses:
                raise StoreError(
                    f"{path} cannot be read ({error.strerror or error}). Run the command again "
                    "when the file system answers and you have permission to read it."
                ) from error
            time.sleep(pauses.pop(0))


def read(path: Path) -> bytes | None:
    """Return a file's content; None if it is not there."""
    return patiently(path, path.read_bytes)


def read_json(path: Path) -> Any:
    """Return a file's JSON value; None if it is not there or not JSON."""
    content = read(path)
    try:
        return None if content is None else json.loads(content)
    except ValueError:
        return None


def safetensors_header(path: Path) -> tuple[dict[str, Any], int] | None:
    """Return a safetensors file's tensors (name -> dtype, shape, data_offsets) and expected size.

    None without a valid header. Raises OSError if the file cannot be read. Source of the format:
    github.com/huggingface/safetensors (8 bytes with the header's length, JSON header, tensors).
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 1 << 28)))
        header.pop("__metadata__", None)
        ends = [tensor["data_offsets"][1] for tensor in header.values()]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
    return header, 8 + length + max(ends, default=0)


def names(folder: Path) -> list[str]:
    """Return the names in a folder; empty if it is not there."""
    return patiently(folder, lambda: os.listdir(folder)) or []


def status(path: str | Path) -> os.stat_result | None:
    """Return a file's status; None if it is not there."""
    return patiently(path, lambda: os.stat(path))


def check_writable(folder: Path, setting: str) -> None:
    """Raise StoreError unless a folder, which need not exist, can be written.

    `setting`: the name of the setting that names the folder.
    """
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        why = "you may not write there" if there.is_dir() else "it is no folder"
        raise StoreError(f"{setting}={folder}: {there}: {why}. Choose another folder.")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, content: bytes) -> None:
    """Replace `path` with `content`: temporary file, fsync, rename, fsync of the folder."""
    partial = _partial(path)
    try:
        _write_new(partial, content)
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            os.unlink(partial)
        error.filename = str(path)  # which a full disk does not say
        raise
    sync(path.parent)


def create_once(path: Path, content: bytes) -> bool:
    """Create `path` atomically unless it exists; return whether this call created it."""
    partial = _partial(path)
    _write_new(partial, content)
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    finally:
        os.unlink(partial)
    sync(path.parent)
    return True


def create_folder_once(path: Path, files: dict[str, bytes]) -> bool:
    """Create the folder `path` with `files` atomically; return whether this call created it."""
    partial = _partial(path)
    os.mkdir(partial)
    for name, content in files.items():
        _write_new(partial / name, content)
    try:
        os.rename(partial, path)  # fails if `path` has files: only one process succeeds
    except OSError:
        if not path.is_dir():
            raise
        shutil.rmtree(partial)
        return False
    sync(path.parent)
    return True


def make_own(folder: Path) -> None:
    """Create a folder if there is none; only this user writes it, and what this process creates.

    Raises StoreError if others may write it: they could change what jobs of this user run.
    """
    os.umask(os.umask(0o077) | 0o022)
    folder.mkdir(parents=True, exist_ok=True)
    found = os.stat(folder)
    others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if others or os.geteuid() not in (found.st_uid, 0):
        why = "others may write it" if others else "it belongs to another user"
        raise StoreError(
            f"exec.runs_dir={folder}: {why}. "
            "Only its owner writes a run folder, because jobs run what it says. Name a folder of "
            f"your own, or type: chmod -R go-w {folder}. Anyone may read it, as action=status does."
        )


def append(path: Path, content: bytes) -> None:
    """Append lines to a log. A kill may leave an incomplete last line, which readers skip."""
    with _opened(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as fd:
        _write_all(fd, content)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    with _opened(path, os.O_RDONLY) as fd:
        os.fsync(fd)


def truncate(path: Path, size: int) -> None:
    """Cut a log back to `size` bytes; a missing file counts as empty."""
    with _opened(path, os.O_WRONLY | os.O_CREAT) as fd:
        os.ftruncate(fd, size)


@contextmanager
def locked(path: Path, wait_s: float, notify: Notify = lambda text: None) -> Iterator[None]:
    """Hold the lock of a file, which is created; a process that ends loses its locks.

    While another process holds it, wait, and say so once. Raises StoreError after `wait_s`. On a
    file system without locks nobody waits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        for turn in itertools.count():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not turn:
                    notify(f"waiting for another command, which holds {path}")
            except OSError:
                break
            if turn * LOCK_POLL_S > wait_s:
                raise StoreError(
                    f"another command holds {path}. Run this one again when that one has ended."
                )
            time.sleep(LOCK_POLL_S)
        yield


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags, 0o666)
    try:
        yield fd
    finally:
        os.close(fd)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(3).hex()}")


def _write_new(path: Path, content: bytes) -> None:
    with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
        _write_all(fd, content)
        os.fsync(fd)


def _write_all(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]

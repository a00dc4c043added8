"""Copy the current code to where cluster nodes can run it.

Later edits then do not change queued jobs. A snapshot is named by its content, so an existing one
is used again. Knows only files.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lorasweep.store import files
from lorasweep.tracking import provenance

PACKAGES = ("lorasweep", "analysis")
SKIPPED = {"__pycache__", "results", ".ipynb_checkpoints"}
"""Folders that jobs do not need: caches, and kept results (tables and figures)."""


def take(root: Path) -> Path:
    """Copy the running code into a folder in `root` and return that folder.

    Nothing is copied if the snapshot exists, or if this code is a snapshot itself. A snapshot has
    the packages, the configuration, and `snapshot.json`: the commit, and the files that differ from
    it.

    Raises:
        OSError: it cannot be written.
    """
    here = Path(__file__).resolve().parents[3]
    if (here / "snapshot.json").is_file():
        return here
    name = _name(here)
    folder = root / name
    if folder.is_dir():
        return folder
    partial = root / f".{name}.{os.getpid()}.{os.urandom(3).hex()}"
    for source, target in _files(here):
        path = partial / target
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
        files.sync(path)
    about = {**provenance.code(), "snapshot": name, "edited": _edited()}
    files.write_atomic(partial / "snapshot.json", json.dumps(about, indent=1).encode())
    try:
        os.rename(partial, folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(partial)  # another command was faster, with the same content
    files.sync_folder(root)
    return folder


def describe(folder: Path) -> str:
    """Describe a snapshot for people: its commit, and the files that differ from it."""
    about = json.loads((folder / "snapshot.json").read_bytes())
    text = f"code snapshot {about['snapshot']}"
    if about["commit"] is None:
        return f"{text} (the installed package)"
    text += f" of commit {about['commit'][:10]}"
    edited = about["edited"]
    if edited:
        names = ", ".join(edited[:4]) + (", ..." if len(edited) > 4 else "")
        text += f", with {len(edited)} file(s) changed since ({names})"
    return text


def _edited() -> list[str]:
    copied = (*(f"{p}/" for p in PACKAGES), "conf/", "sweeps/")
    return [f for f in provenance.edited() if f.startswith(copied)]


def _files(here: Path) -> Iterator[tuple[Path, Path]]:
    """Yield each file and its path in the snapshot.

    The configuration goes to the top level, as in a checkout.
    """
    candidates = (here / "conf", here / "lorasweep" / "conf")
    conf = next(c for c in candidates if (c / "config.yaml").is_file())
    for top, target in (*((here / p, Path(p)) for p in PACKAGES), (conf, Path("conf"))):
        for folder, inner, names in os.walk(top, followlinks=True):
            skipped = SKIPPED | ({"conf"} if Path(folder) == here / "lorasweep" else set())
            inner[:] = sorted(set(inner) - skipped)
            for name in sorted(names):
                path = Path(folder) / name
                yield path, target / path.relative_to(top)


def _name(here: Path) -> str:
    digest = hashlib.sha256()
    for path, target in _files(here):
        digest.update(f"{target}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]

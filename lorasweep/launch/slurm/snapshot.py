"""The code as it is now, kept where cluster nodes can run it: editing the tree changes nothing that
is queued.

A snapshot is named by its content, so one that is there already is used again. Knows files only.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorasweep.store import files
from lorasweep.tracking import provenance

PACKAGES = ("lorasweep", "analysis")
SKIPPED = {"__pycache__", "results", ".ipynb_checkpoints"}
"""Folders that no job needs: caches, and the kept results (tables and figures)."""


def take(root: Path) -> Path:
    """Copy the running code below `root`, unless it is there or this already is a snapshot; return
    its folder.

    It holds the packages, the configuration, and `snapshot.json`: commit, whether the code differed
    from it, and in which files. Raises OSError if it cannot be written.
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
    told: dict[str, Any] = {**provenance.code(), "snapshot": name, "edited": _edited()}
    files.write_atomic(partial / "snapshot.json", json.dumps(told, indent=1).encode())
    try:
        os.rename(partial, folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(partial)  # another command was faster, with the same content
    files.sync_folder(root)
    return folder


def say(folder: Path) -> str:
    """Say for people what a snapshot holds."""
    told = json.loads((folder / "snapshot.json").read_bytes())
    what = f"code snapshot {told['snapshot']}"
    if told["commit"] is None:
        return f"{what} (the installed package)"
    what += f" of commit {told['commit'][:10]}"
    if told["edited"]:
        shown = ", ".join(told["edited"][:4]) + (", ..." if len(told["edited"]) > 4 else "")
        what += f", with your {len(told['edited'])} file(s) that are not committed as they are now ({shown})"
    return what


def _edited() -> list[str]:
    return [
        f
        for f in provenance.edited()
        if f.startswith((*(f"{p}/" for p in PACKAGES), "conf/", "sweeps/"))
    ]


def _files(here: Path) -> Iterator[tuple[Path, Path]]:
    """Yield (file, its place in the snapshot); the configuration goes one level up, as in a
    checkout."""
    conf = next(
        c for c in (here / "conf", here / "lorasweep" / "conf") if (c / "config.yaml").is_file()
    )
    for top, place in (*((here / p, Path(p)) for p in PACKAGES), (conf, Path("conf"))):
        for folder, inner, names in os.walk(top, followlinks=True):
            inner[:] = sorted(
                set(inner) - SKIPPED - ({"conf"} if Path(folder) == here / "lorasweep" else set())
            )
            for name in sorted(names):
                path = Path(folder) / name
                yield path, place / path.relative_to(top)


def _name(here: Path) -> str:
    digest = hashlib.sha256()
    for path, place in _files(here):
        digest.update(f"{place}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]

"""What tests build their worlds from: the composed configuration, rows, users, the command line."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from lorasweep.config.compose import compose_request, composer
from lorasweep.errors import NotAtScale

ROOT = Path(__file__).resolve().parent.parent
_smoke_spec = cache(lambda: compose_request(["scale=smoke"]).points[0].spec)


def tiny_spec(**changes):
    """A RunSpec on the shipped 0.2M-parameter base with short sequences; fields by keyword."""
    return dataclasses.replace(_smoke_spec(), **changes)


def planted_end(spec, start, nll, curve, **more):
    """How a run ends whose NLLs are planted (diverged where the last is not finite), and its result."""
    done = math.isfinite(nll)
    return "done" if done else "diverged", {
        "nll_start": start,
        "test_nll": nll if done else None,
        "curve": curve,
        "steps_done": spec.steps if done else 1,
        "base_sha256": "planted",
        "data_sha256": "planted",
        "floor_nats": None,
        "n_trainable": spec.method.n_trainable(spec.model),
        **more,
    }


SWEEPS = sorted(p.stem for p in (ROOT / "sweeps").glob("*.yaml") if p.stem != "study")
SCALES = [
    pytest.param(p.stem, marks=pytest.mark.xdist_group(f"scale {p.stem}"))  # composed once
    for p in sorted((ROOT / "conf/scale").glob("*.yaml"))
]


@cache
def shipped(scale):
    """The request of each sweep that has a scale, by the sweep's name."""
    found = {}
    with composer() as compose:
        for sweep in SWEEPS:
            try:
                found[sweep] = compose([f"+sweep={sweep}", f"scale={scale}"])
            except NotAtScale as error:
                assert "Its file has: smoke" in str(error)
    return found


def write_json(path, rows):
    """Write a file of JSON Lines, a row that is text as it is; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_splits(folder, rows):
    """Write the same rows as train.jsonl and as test.jsonl."""
    for split in ("train", "test"):
        write_json(folder / f"{split}.jsonl", rows)


OTHER_USER = 4321
"""Number of a user and of its group."""


def as_another_user(folder: Path, do: Callable[[], object]) -> None:
    """Call `do` in a process of another user, who can reach `folder`; its failure is ours."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    for parent in (folder, *folder.parents):
        if parent.stat().st_uid == 0 and str(parent).startswith(("/tmp/", "/dev/shm/")):
            parent.chmod(parent.stat().st_mode | 0o011)
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(OTHER_USER)
            os.setuid(OTHER_USER)
            do()
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def environment(cwd):
    """The variables of a command whose outputs lie below `cwd`."""
    folders = {f"LORASWEEP_{name.upper()}": f"{cwd}/{name}" for name in ("runs", "reports")}
    return {**os.environ, "PYTHONPATH": str(ROOT), **folders}


def start(*arguments, cwd, env=None, **options):
    """Start Python with these arguments in a new process, its output in pipes."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**environment(cwd), **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_for(condition, timeout=400, every=0.05):
    """Wait until a condition holds; return its value. An idle machine needs a few seconds."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(every)
    raise AssertionError(f"nothing after {timeout} s")


def cli(*args, cwd, env=None, timeout=300, check=True):
    """Run `python -m lorasweep ...`; returns the finished process."""
    done = subprocess.run(
        [sys.executable, "-m", "lorasweep", *map(str, args)],
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=timeout,
        env={**environment(cwd), **(env or {})},
    )
    said = f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert not (check and done.returncode), said
    return done

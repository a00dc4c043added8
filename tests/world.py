"""What tests build their worlds from: the composed configuration, small float64 models, the command
line."""

import dataclasses
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from lorasweep.config.compose import compose_request

ROOT = Path(__file__).resolve().parent.parent


def tiny_spec(**changes):
    """A RunSpec on the shipped 0.2M-parameter base with short sequences; fields by keyword, method
    too."""
    return dataclasses.replace(_smoke_spec(), **changes)


@cache
def _smoke_spec():
    return compose_request(["scale=smoke"]).points[0].spec


def cli(*args, cwd, env=None, timeout=300, check=True):
    """Run `python -m lorasweep ...`; returns the finished process."""
    done = subprocess.run(
        [sys.executable, "-m", "lorasweep", *map(str, args)],
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=timeout,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "LORASWEEP_RUNS": str(Path(cwd) / "runs"),
            "LORASWEEP_REPORTS": str(Path(cwd) / "reports"),
            **(env or {}),
        },
    )
    if check and done.returncode:
        raise AssertionError(
            f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return done

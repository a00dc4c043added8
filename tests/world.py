"""What tests build their worlds from: the composed configuration, small float64 models, the command line."""

import copy
import dataclasses
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def compose_request(overrides):
    """Run compose.request on the shipped configuration inside a Hydra context, as `python -m lorasweep` does."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import flag_override

    from lorasweep import compose

    compose.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(compose.conf_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        cfg = loader.load_configuration("config", list(overrides), run_mode=RunMode.RUN)
        HydraConfig.instance().set_config(cfg)
        cfg = copy.deepcopy(cfg)
        with flag_override(cfg, ["struct", "readonly"], False):
            del cfg["hydra"]
        return compose.request(cfg)


def tiny_spec(**changes):
    """A RunSpec on the shipped 0.2M-parameter base with short sequences; fields by keyword, method too."""
    return dataclasses.replace(_smoke_spec(), **changes)


@cache
def _smoke_spec():
    return compose_request(["scale=smoke"]).points[0].spec


def cli(*args, cwd, env=None, timeout=300, check=True):
    """Run `python -m lorasweep ...`; returns the finished process."""
    done = subprocess.run(
        [sys.executable, "-m", "lorasweep", *map(str, args)], cwd=cwd, text=True, capture_output=True, timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LORASWEEP_RUNS": str(Path(cwd) / "runs"),
             "LORASWEEP_REPORTS": str(Path(cwd) / "reports"), **(env or {})},
    )
    if check and done.returncode:
        raise AssertionError(f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done

"""Refuse settings that would have no effect: values that a grid replaces, shadowed files."""

import copy
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorasweep.config.folders import conf_dir
from lorasweep.errors import SpecError
from lorasweep.sweep.grid import fields_of
from lorasweep.sweep.question import Sweep, axes_of


def refuse_overwritten(overrides: list[str], name: str, sweep: Sweep) -> None:
    """Refuse values on the command line that the sweep's axes replace.

    Raises:
        SpecError: there is one.
    """
    for text in overrides:
        key = text.lstrip("+~").partition("=")[0]
        axis = key.removeprefix("method.")
        arms = [arm for arm, axes in sweep.arms.items() if axis in fields_of(axes_of(axes))]
        shared = axis in fields_of(sweep.axes)
        in_arms = bool(arms) and not key.startswith(("sweep.", "scale."))
        if key != "method" and not shared and not in_arms:
            continue
        if axis in sweep.axes:
            hint = f"Write sweep.axes.{axis}=[...] instead."
        elif arms:
            hint = f"Write sweep.arms.{arms[0]}.{axis}=[...] instead."
        else:
            hint = "Remove an arm with ~sweep.arms.NAME instead."
        raise SpecError(f"{text!r} has no effect: the grid of sweep {name!r} sets {axis!r}. {hint}")


def refuse_unread(overrides: list[str], name: str, cfg: DictConfig) -> None:
    """Refuse settings of the scale on the command line that nothing in the configuration reads.

    A sweep may have values of its own at a scale, in its `at`.

    Args:
        cfg: the composed configuration with its interpolations not yet resolved.

    Raises:
        SpecError: there is one.
    """
    for text in overrides:
        key = text.lstrip("+~").partition("=")[0]
        if not key.startswith("scale.") or key == "scale.name":  # the name is in the title
            continue
        value = OmegaConf.select(cfg, key)
        empty: Any = type(value)() if isinstance(value, (str, int, float)) else []
        if value == empty or _all_but_scale(cfg, key, empty) != _all_but_scale(cfg, key, value):
            continue
        raise SpecError(
            f"{text!r} has no effect: sweep {name!r} does not read {key} at scale "
            f"{cfg.scale.name}. Its file, sweeps/{name}.yaml, says where its values come from; "
            "sweep.axes.AXIS=[...] and sweep.arms.ARM.AXIS=[...] replace any of them."
        )


def _all_but_scale(cfg: DictConfig, key: str, value: Any) -> Any:
    """Return all but the scale as it is with this value of a key; None if it cannot be resolved."""
    changed = copy.deepcopy(cfg)
    OmegaConf.update(changed, key, value, merge=False)
    try:
        OmegaConf.resolve(changed)
    except OmegaConfBaseException:  # something reads it, and needs another value
        return None
    plain: Any = OmegaConf.to_container(changed)
    del plain["scale"]
    return plain


def refuse_shadows(user_folders: list[Path]) -> None:
    """Refuse files in the user's --config-dir that have the name of a shipped file.

    Hydra would silently use the shipped file.

    Raises:
        SpecError: there is one.
    """
    shipped = conf_dir()
    for folder in user_folders:
        for path in sorted(folder.rglob("*.yaml")) if folder.is_dir() else []:
            relative = path.relative_to(folder)
            if (shipped / relative).exists() and not path.samefile(shipped / relative):
                raise SpecError(
                    f"{path} has the name of a shipped file and would be ignored. Rename it, "
                    f"for example to {relative.with_stem('my_' + relative.stem)}."
                )

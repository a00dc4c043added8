"""Refuse settings that would have no effect: values that a grid replaces, shadowed files."""

from pathlib import Path

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
        in_arms = bool(arms) and not key.startswith("sweep.")
        if key != "method" and not shared and not in_arms:
            continue
        if axis in sweep.axes:
            hint = f"Write sweep.axes.{axis}=[...] instead."
        elif arms:
            hint = f"Write sweep.arms.{arms[0]}.{axis}=[...] instead."
        else:
            hint = "Remove an arm with ~sweep.arms.NAME instead."
        raise SpecError(f"{text!r} has no effect: the grid of sweep {name!r} sets {axis!r}. {hint}")


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

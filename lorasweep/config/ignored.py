"""Refuse what would be ignored in silence: values that a grid replaces, copies of shipped files."""

from pathlib import Path

from lorasweep.config.folders import conf_dir
from lorasweep.errors import SpecError
from lorasweep.sweep.grid import fields_of
from lorasweep.sweep.question import Sweep


def refuse_overwritten(overrides: list[str], name: str, sweep: Sweep) -> None:
    """Raise SpecError for a value on the command line that the sweep's axes replace."""
    for text in overrides:
        key = text.lstrip("+~").partition("=")[0]
        axis = key.removeprefix("method.")
        arms = [arm for arm, axes in sweep.arms.items() if axis in fields_of(axes)]
        shared = axis in fields_of(sweep.axes)
        in_arms = bool(arms) and not key.startswith(("sweep.", "scale."))
        if key != "method" and not shared and not in_arms:
            continue
        if axis in sweep.axes:
            hint = f"Write sweep.axes.{axis}=[...] instead."
        elif arms:
            hint = f"Write sweep.arms.{arms[0]}.{axis}=[...] instead."
        else:
            hint = "Drop an arm with ~sweep.arms.NAME instead."
        raise SpecError(
            f"{text!r} has no effect on sweep {name!r}, whose grid sets {axis!r}. {hint}"
        )


def refuse_shadows(user_folders: list[Path]) -> None:
    """Raise SpecError for a file of a user's --config-dir that has a shipped file's name.

    Hydra would take the shipped file.
    """
    shipped = conf_dir()
    for folder in user_folders:
        for path in sorted(folder.rglob("*.yaml")) if folder.is_dir() else []:
            relative = path.relative_to(folder)
            if (shipped / relative).exists() and not path.samefile(shipped / relative):
                raise SpecError(
                    f"{path} has the name of a shipped file and would be ignored: rename it "
                    f"(for example {relative.with_stem('my_' + relative.stem)})."
                )

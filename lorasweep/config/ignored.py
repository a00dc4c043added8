"""Refuse settings that would have no effect: values that a grid replaces, shadowed files."""

from pathlib import Path
from typing import Any

from lorasweep.config.folders import conf_dir
from lorasweep.config.schema import Config
from lorasweep.errors import SpecError
from lorasweep.sweep.grid import fields_of
from lorasweep.sweep.question import Sweep, axes_of

OF_CUSTOMERS = ("plan", "status", "cancel", "fetch", "measure_packs")
"""Actions that customers=FILE makes about a fleet."""


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


def refuse_advice(config: Any, sweep_name: str | None) -> None:
    """Refuse settings of customers with actions that do not read them, and a sweep with them.

    Raises:
        SpecError: there is one.
    """
    about = {"measure": "one model and one data set", "advise": "customers", "fleet": "customers"}
    what = about.get(config.action, "customers" if config.customers else "")
    if what and sweep_name is not None:
        raise SpecError(f"action={config.action} is about {what}. Leave +sweep={sweep_name} out.")
    if config.data and config.action != "measure":
        raise SpecError(
            "data is only for action=measure. Add it, or leave data out (of a customer: "
            "+customer.data)."
        )
    of_fleet = ("fleet", *(OF_CUSTOMERS if config.customers else ()))
    if config.rates != Config.rates and config.action not in ("measure", *of_fleet):
        raise SpecError(
            "rates is only for action=measure and action=fleet. Add one, or leave rates out."
        )
    if config.instead_of_full and config.action not in of_fleet:
        raise SpecError("instead_of_full is only for action=fleet. Add it, or leave it out.")
    if config.action == "fleet" and not config.customers:
        raise SpecError(
            "action=fleet trains an adapter for each row of a table. Add customers=FILE (CSV or "
            "YAML, with the columns name, model, task and data)."
        )
    for name in ("customers", "customer", "why", "write_sweep"):
        if getattr(config, name) and config.action != "advise":
            if name == "customers" and config.action in of_fleet:
                continue
            raise SpecError(f"{name} is only for action=advise. Add it, or leave {name} out.")

"""Before runs start on given GPUs: how each is trained, which are left out, which are refused."""

import dataclasses
from collections.abc import Iterable, Sequence

from lorasweep.errors import SpecError
from lorasweep.plan.gpu.forecast import Forecaster, Kind
from lorasweep.plan.gpu.placement import Misfit, Placement, place
from lorasweep.plan.hardware import Hardware
from lorasweep.spec.execution import Exec
from lorasweep.sweep.grid import Point


def within_limit(points: Sequence[Point], hardware: Hardware, exec_: Exec) -> list[Point]:
    """Return the runs that need no more GPUs than exec.max_gpus."""
    planner = Forecaster(hardware, exec_)
    return [p for p in points if not planner.kind(p.spec).left_out]


def settings_of(
    points: Sequence[Point], hardware: Hardware, exec_: Exec
) -> list[tuple[Exec, list[Point]]]:
    """Group runs by the settings that the plan chooses for them; what the user set stays.

    These are the number of processes, the size of packs, rows a forward pass, and whether
    activations are computed again. Without the figures that `Hardware.has_speeds` asks for nothing
    is chosen.

    Raises:
        SpecError: runs that fit on no number of GPUs; the message says which, and what would help.
    """
    if not hardware.has_speeds:
        return [(exec_, list(points))]
    planner = Forecaster(hardware, exec_)
    kinds = [planner.kind(p.spec) for p in points]
    _refuse(_misfit(kind.place) for kind in _each(kinds))
    groups: dict[tuple[int, int, int, bool], list[Point]] = {}
    for point, kind in zip(points, kinds, strict=True):
        assert isinstance(kind.place, Placement)
        layout = kind.place.layout
        key = (layout.gpus, kind.members, layout.rows, layout.checkpointing)
        groups.setdefault(key, []).append(point)
    found = []
    for (gpus, members, rows, again), some in groups.items():
        chosen = dataclasses.replace(
            exec_,
            world_size=gpus,
            pack_size=members,
            micro_batch_size=rows,
            activation_checkpointing=again,
        )
        _refuse(chosen.problems())
        found.append((chosen, some))
    return found


def refuse_unfit(points: Sequence[Point], hardware: Hardware, exec_: Exec) -> None:
    """Check that every run fits as it is trained with these settings.

    Raises:
        SpecError: some do not; the message says which, and what would make them fit.
    """
    planner = Forecaster(hardware, exec_)
    again, gpus, rows = exec_.activation_checkpointing, exec_.world_size, exec_.micro_batch_size
    found = (
        place(
            [kind.spec],
            hardware,
            rows,
            gpus=gpus,
            checkpointing=(again,),
            join_rows=exec_.join_rows,
        )
        for kind in _each(planner.kind(p.spec) for p in points)
    )
    _refuse(map(_misfit, found))


def _each(kinds: Iterable[Kind]) -> list[Kind]:
    return list({id(kind): kind for kind in kinds}.values())


def _misfit(found: Placement | Misfit) -> str | None:
    """Return why runs do not fit, and what would help; None if they do."""
    return f"{found.why}. It fits with {found.remedy}." if isinstance(found, Misfit) else None


def _refuse(problems: Iterable[str | None]) -> None:
    lines = [f"  {text}" for text in problems if text]
    if lines:
        raise SpecError(
            "\n".join(
                [
                    "runs that cannot be trained so, and nothing was started:",
                    *lines,
                    "  Or choose larger GPUs (hardware=...), or leave them out: exec.max_gpus=N, "
                    "~sweep.arms.NAME or sweep.axes.model=[...].",
                ]
            )
        )

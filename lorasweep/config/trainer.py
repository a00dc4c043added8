"""Read the settings of a trainer that is not ours, and what they say about a request."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasweep.errors import SpecError
from lorasweep.methods.lora import LoRA
from lorasweep.spec.method import parse_layers
from lorasweep.spec.trainer import TrainerSpec
from lorasweep.spec.values import build
from lorasweep.store.files import sha256
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import Request

LISTS = ("command", "full", "lora", "resume", "files")


def trainer_of(values: dict[str, Any]) -> tuple[TrainerSpec, list[str], Any]:
    """Return the trainer, the paths of its files, and max_h, in hours.

    The files are `script`, `files`, and the arguments that name a file. The identity of a run has
    their contents, not their paths.

    Raises:
        SpecError: a list is no list, or a file is missing.
    """
    values = dict(values)
    for key in LISTS:
        if not isinstance(values[key], list):
            raise SpecError(f"trainer.{key}={values[key]!r}: expected a list, [WORD,WORD,...].")
        values[key] = [str(word) for word in values[key]]
    script, max_h = str(values.pop("script") or ""), values.pop("max_h")
    given = [script] * bool(script) + values["files"]
    words = [word for key in LISTS[:-1] for word in values[key][key == "command" :]]
    paths = [os.path.abspath(os.path.expanduser(f)) for f in given]
    paths += [os.path.abspath(word) for word in words if os.path.isfile(word)]
    if not values["command"]:  # ours has no files
        return build(TrainerSpec, {**values, "files": given}), [], max_h
    paths = [*dict.fromkeys(paths)]
    if missing := [path for path in paths if not os.path.isfile(path)]:
        raise SpecError(f"trainer.script or trainer.files: no file {missing[0]}. Correct the path.")
    return build(TrainerSpec, {**values, "files": [sha256(Path(p)) for p in paths]}), paths, max_h


def checked(request: Request, paths: list[str], max_h: Any) -> Request:
    """Return the request for a trainer that is not ours: one run at a time with all GPUs.

    Raises:
        SpecError: a setting is of our loop only.
    """
    exec_, cluster = request.exec, request.cluster
    per_node = cluster.gpus_per_node or cluster.gpus
    for wrong, said in (
        (exec_.world_size > 1, f"exec.world_size={exec_.world_size}: the trainer starts its own"),
        (cluster.gpus > per_node, f"cluster.gpus={cluster.gpus}: several nodes are not supported"),
        (request.hardware, "hardware=...: nothing is known of the trainer's speed; use"),
        (request.customers, "customers=...: a fleet is trained by trainer=builtin"),
        (not isinstance(max_h, int | float) or max_h <= 0, f"trainer.max_h={max_h!r}: not hours"),
    ):
        if wrong:
            raise SpecError(
                f"{said}. Leave it out. Several processes on one machine: write `accelerate launch`"
                " or `torchrun` into trainer.command; {gpus} is the number of GPUs of a run."
            )
    more: dict[str, Any] = {"trainer_files": paths, "trainer_max_h": float(max_h), "pack_size": 1}
    if cluster.kind == "slurm":
        cluster = dataclasses.replace(cluster, workers=cluster.workers or 1)
    exec_ = dataclasses.replace(exec_, **more, workers=exec_.workers or 1)
    return dataclasses.replace(request, exec=exec_, cluster=cluster)


def without_unembedding(points: Sequence[Point]) -> list[Point]:
    """Return runs whose LoRA, if it is not trained by us, leaves out the unembedding.

    So do the defaults of TRL and PEFT: they name attention and MLP. On a tied unembedding PEFT also
    saves the embedding.
    """
    found: dict[str, Point] = {}
    for p in points:
        method = p.spec.method
        if p.spec.trainer.command and isinstance(method, LoRA):
            layers = [k for k in parse_layers(method.layers) if k != "unembedding"]
            if not layers:
                raise SpecError("layers=unembedding is trained by trainer=builtin only.")
            method = dataclasses.replace(method, layers="+".join(layers))
            p = Point(p.arm, dataclasses.replace(p.spec, method=method))
        found.setdefault(p.id, p)
    return list(found.values())

"""Read the settings of a trainer that is not ours, and what they say about a request."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorasweep.errors import SpecError
from lorasweep.launch.external import without_secrets
from lorasweep.methods.lora import LoRA
from lorasweep.spec.method import parse_layers
from lorasweep.spec.trainer import TrainerSpec, places_in
from lorasweep.spec.values import build
from lorasweep.store.files import sha256
from lorasweep.sweep.grid import Point
from lorasweep.sweep.request import Request

LISTS = ("command", "full", "lora", "resume", "files")


def trainer_of(values: dict[str, Any]) -> tuple[TrainerSpec, list[str], Any]:
    """Return the trainer, the paths of its files, and max_h; SpecError: wrong, or a missing file.

    The files are `script`, `files`, and those that words name, also behind a = or with {method}.
    Ids have their contents. Of programs in a folder bin the versions are recorded instead.
    """
    values = dict(values)
    for key in LISTS:
        if not isinstance(values[key], list):
            raise SpecError(f"trainer.{key}={values[key]!r}: expected a list, [WORD,WORD,...].")
        values[key] = [str(word) for word in values[key]]
        if secret := [k for k, w in enumerate(values[key]) if without_secrets(w) != w]:
            raise SpecError(
                f"trainer.{key}: word {secret[0]} has the value of a secret variable, and would be "
                "stored. The program has your environment: let it read the variable."
            )
    script, max_h = values.pop("script"), values.pop("max_h")
    given = [*[str(script)] * bool(script), *values["files"]]
    words = [w.partition("=")[2] or w for key in LISTS[:-1] for w in values[key]]
    words = [w.replace("{method}", m) for w in words for m in ("fullft", "lora")]
    words = [w for w in words if os.path.isfile(w) and Path(w).parent.name != "bin"]
    paths = [*dict.fromkeys(Path(f).expanduser().absolute() for f in (*given, *words))]
    if missing := [path for path in paths if not path.is_file()]:
        raise SpecError(f"trainer.script or trainer.files: no file {missing[0]}. Correct the path.")
    trainer = build(TrainerSpec, {**values, "files": [*map(sha256, paths)]})
    places = places_in(*trainer.command, *trainer.full, *trainer.lora)
    if bool(script) != ("script" in places) and trainer.command:
        # another of the files would run as the script, or the script would never run
        raise SpecError(
            f"trainer.script={script}: trainer={trainer.name}'s command has no place {{script}}. "
            f"Use trainer=hf, or trainer.files=[{script}] if its command runs the file."
            if script
            else "trainer.script: missing. The command has {script}: trainer.script=FILE.py."
        )
    return trainer, [*map(str, paths)], max_h


def checked(request: Request, paths: list[str], max_h: Any) -> Request:
    """Return the request for one run at a time with all GPUs; SpecError: a setting of our loop."""
    exec_, cluster = request.exec, request.cluster
    wrong = [f"exec.world_size={exec_.world_size}"] * (exec_.world_size > 1)
    nodes = cluster.gpus > (cluster.gpus_per_node or cluster.gpus)
    wrong += [f"cluster.gpus={cluster.gpus} on several nodes"] * nodes
    wrong += [f"hardware={request.hardware.get('name')}"] * bool(request.hardware)
    wrong += [f"customers={request.customers}"] * bool(request.customers)
    wrong += [f"action={a}" for a in ("measure", "verify") if a == request.action]  # of our loop
    wrong += [f"trainer.max_h={max_h}"] * (not isinstance(max_h, int | float) or max_h <= 0)
    for given in wrong:
        raise SpecError(
            f"{given} is not supported by another trainer. Leave it out (max_h: hours above 0). "
            "For several processes write `torchrun` or the like into trainer.command."
        )
    more: dict[str, Any] = {"trainer_files": paths, "trainer_max_h": float(max_h), "pack_size": 1}
    exec_ = dataclasses.replace(exec_, **more, workers=exec_.workers or 1)
    if cluster.kind == "slurm":
        cluster = dataclasses.replace(cluster, workers=cluster.workers or 1)
    return dataclasses.replace(request, exec=exec_, cluster=cluster)


def without_unembedding(points: Sequence[Point]) -> list[Point]:
    """Return the runs; SpecError: with another trainer, some differ in the unembedding alone.

    Its LoRA leaves out the unembedding beside other layers, as the defaults of TRL and PEFT do. On
    a tied one PEFT would also save the embedding.
    """
    found, given = dict[str, Point](), dict[str, str]()
    for p in points:
        method = p.spec.method
        if p.spec.trainer.command and isinstance(method, LoRA):
            layers = [k for k in parse_layers(method.layers) if k != "unembedding"]
            less = dataclasses.replace(method, layers="+".join(layers) or method.layers)
            p = Point(p.arm, dataclasses.replace(p.spec, method=less))
            if (other := given.setdefault(p.id, method.layers)) != method.layers:
                why = f"are the same with trainer={p.spec.trainer.name}. Leave one out."
                raise SpecError(f"method.layers={other} and method.layers={method.layers} {why}")
        found.setdefault(p.id, p)
    return list(found.values())

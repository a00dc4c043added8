"""Measure what a foreign trainer left: find it, check that it is what was asked, load it.

Nothing of it is unpickled or executed, and no link is followed: only regular JSON and safetensors
files are read.
"""

import hashlib
import json
import math
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lorasweep.data.examples import Data
from lorasweep.errors import TrainingError
from lorasweep.models.find import INDEX, SINGLE
from lorasweep.models.forward import backend, frozen_in_bf16
from lorasweep.models.load import Base, find_targets, model_at
from lorasweep.spec.run import RunSpec
from lorasweep.store.checkpoint import PARAM, State
from lorasweep.train.events import Event, Record
from lorasweep.train.loop import DIVERGENCE_RULE, attached, measure
from lorasweep.train.objectives.sft import SupervisedFineTuning

ADAPTER, CONFIGS = "adapter_model.safetensors", ("adapter_config.json", "config.json")
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
"""Name of a folder that a run can resume from, as transformers names them."""
STATE = "trainer_state.json"
LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)(?:\.default)?\.weight")
CHANGED = {
    *("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "use_bdlora"),
    *("fan_in_fan_out", "target_parameters", "layer_replication", "trainable_token_indices"),
    *("lora_bias", "use_qalora", "alora_invocation_tokens", "arrow_config"),
}
"""Settings of an adapter of which each makes it another method."""
OWN_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of PEFT's initializations that change the base."""
Tensors = dict[str, torch.Tensor]


def find_output(out: Path) -> Path:
    """Return the folder with the adapter or model: `out`, or its only folder that has one.

    Raises:
        TrainingError: there is none, or several; or a file of it is a link, a pickle or code.
    """
    below = sorted(f for f in out.iterdir() if f.is_dir() and not CHECKPOINT.fullmatch(f.name))
    for folders in ([out], below):
        found = [f for f in folders if any((f / name).exists() for name in CONFIGS)]
        if len(found) == 1:
            _check_files(found[0], out)
            return found[0]
        if found:
            names = ", ".join(f.name for f in found)
            raise TrainingError(
                f"the trainer left several results: {names}. Leave one, in {{out}} itself."
            )
    left = ", ".join(sorted(f.name for f in out.iterdir() if f.name != "run.json")) or "nothing"
    raise TrainingError(
        f"the trainer left no result ({left}). Expected in {{out}}: {CONFIGS[0]} with {ADAPTER}, "
        f"or config.json with {SINGLE}."
    )


def _check_files(folder: Path, out: Path) -> None:
    """Refuse links, weights that are pickles, and code."""
    is_adapter, names = (folder / CONFIGS[0]).exists(), [SINGLE]
    if folder != out and folder.is_symlink():
        raise TrainingError(f"{folder.name} is a link. Expected a folder with regular files.")
    if is_adapter:
        names = [ADAPTER]
    elif (folder / INDEX).exists():
        _regular(folder / INDEX)
        names = sorted(
            {*map(str, json.loads((folder / INDEX).read_bytes())["weight_map"].values())}
        )
    for name in (CONFIGS[0] if is_adapter else CONFIGS[1], *names):
        if "/" in name or not (folder / name).exists():
            pickles = [f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth")]
            hint = f"; {', '.join(pickles)} would have to be unpickled" if pickles else ""
            raise TrainingError(
                f"the trainer left no {name} (safetensors){hint}. Save as safetensors."
            )
        _regular(folder / name)
    for name in () if is_adapter else ("config.json",):
        if "auto_map" in json.loads((folder / name).read_bytes()):
            raise TrainingError(f"{name} names code of its own (auto_map), which is never run.")


def _regular(path: Path) -> None:
    if not stat.S_ISREG(path.lstat().st_mode):
        raise TrainingError(f"{path.name} is a link or no regular file, so it is not read.")


# ---------------------------------------------------------------- was it obeyed


def read_weights(folder: Path, run: RunSpec, base: Base) -> Tensors:
    """Return the trained tensors by the names of our states; compare them with what was asked.

    Raises:
        TrainingError: rank, alpha, adapted matrices or changed tensors are not those of the run.
    """
    is_adapter, lora = (folder / CONFIGS[0]).exists(), run.method.name == "lora"
    if is_adapter != lora:
        left, asked = ("an adapter", "a model") if is_adapter else ("a model", "an adapter")
        raise TrainingError(
            f"the trainer left {left}, and was asked for {asked} ({run.method.name})."
        )
    wrong = list[str]()
    if lora:
        found = _adapter(folder, run, base, wrong)
    else:
        found = _changed(folder, run, base, wrong)
    if wrong:
        raise TrainingError(f"the trainer did not do what it was asked: {'; '.join(wrong)}.")
    return found


def _adapter(folder: Path, run: RunSpec, base: Base, wrong: list[str]) -> Tensors:
    method: Any = run.method
    config, found = json.loads((folder / CONFIGS[0]).read_bytes()), Tensors()
    for key, asked in (("peft_type", "LORA"), ("r", method.rank), ("lora_alpha", method.alpha)):
        if config.get(key) != asked:
            wrong.append(f"{key} is {config.get(key)}, asked was {asked}")
    given = {key: config.get(key) for key in CHANGED} | {"bias": config.get("bias")}
    given |= {"init_lora_weights": str(config.get("init_lora_weights", "")).startswith(OWN_BASE)}
    wrong += [f"{k} is {v}, asked was plain LoRA" for k, v in given.items() if v not in PLAIN]
    targets: dict[str, Any] = find_targets(base.model, run.model, method.target_layers())
    for key, tensor in load_file(folder / ADAPTER).items():
        if named := LORA_KEY.fullmatch(key):
            found[f"{named[1]}.{named[2]}"] = tensor
        else:
            wrong.append(f"{key} is no factor of LoRA")
    expected = {
        f"{name}.{factor}": shape
        for name, module in targets.items()
        for factor, shape in (
            ("A", (method.rank, module.in_features)),
            ("B", (module.out_features, method.rank)),
        )
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    wrong += _differences(shapes, expected, "is adapted", method.layers)
    if not wrong and not any(t.any() for name, t in found.items() if name.endswith(".B")):
        wrong.append("every B of the adapter is 0, so nothing was trained")
    return found


PLAIN: tuple[Any, ...] = (None, False, "none", {}, [], "")


def _changed(folder: Path, run: RunSpec, base: Base, wrong: list[str]) -> Tensors:
    model = model_at(run.model, folder, use_safetensors=True)
    found = {name: p.data for name, p in model.named_parameters()}
    before = {name: p.data for name, p in base.model.named_parameters()}
    shapes, expected = ({n: tuple(p.shape) for n, p in some.items()} for some in (found, before))
    wrong += _differences(shapes, expected, "is there", "the base")
    if not wrong:
        same = [n for n, p in found.items() if torch.equal(p, before[n].to(p))]
        # norms and biases may be equal after rounding
        kept = [n for n in same if found[n].dim() > 1]
        if kept:
            whole = "every matrix" if len(same) == len(found) else _some(kept)
            wrong.append(f"{whole} is as in the base, asked was full fine-tuning")
    return found


def _differences(
    found: Mapping[str, Any], expected: Mapping[str, Any], verb: str, asked: str
) -> Iterator[str]:
    """Yield what is too much, missing or of another shape; `asked`: what says which."""
    if more := sorted(found.keys() - expected.keys()):
        yield f"{_some(more)} {verb}, which was not asked ({asked})"
    if less := sorted(expected.keys() - found.keys()):
        yield f"{_some(less)} is missing, which was asked ({asked})"
    for name in sorted(found.keys() & expected.keys()):
        if found[name] != expected[name]:
            yield f"{name} is {list(found[name])}, asked was {list(expected[name])}"
            return


def _some(names: list[str]) -> str:
    return f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"


def weights_sha256(weights: Tensors) -> str:
    """Hash the names and the float32 values of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


# ---------------------------------------------------------------- its own account


def reported(out: Path) -> list[Record]:
    """Return the losses that the trainer logged, {step, train_nll}; shown, and never judged.

    From transformers' trainer_state.json, or lines {step, loss} of metrics.jsonl.
    """
    places = [out / STATE, *(f / STATE for f in checkpoints(out)), out / "metrics.jsonl"]
    for path in (p for p in places if p.is_file() and not p.is_symlink()):
        try:
            if path.name == STATE:
                lines = json.loads(path.read_bytes())["log_history"]
            else:
                lines = [json.loads(line) for line in path.read_text().splitlines()]
            given = [(int(v["step"]), float(v["loss"])) for v in lines if "loss" in v]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return [{"step": step, "train_nll": loss} for step, loss in given]
    return []


def checkpoints(out: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, the last first.

    A complete one has trainer_state.json, which transformers writes after the other files.
    """
    there = out.iterdir() if out.is_dir() else ()
    found = {f: CHECKPOINT.fullmatch(f.name) for f in there if (f / STATE).is_file()}
    return sorted((f for f, n in found.items() if n), key=lambda f: -int(found[f][1]))


# ---------------------------------------------------------------- the measures


def judge(
    run: RunSpec, base: Base, data: Data, weights: Tensors, parts: int, curve: list[Record]
) -> Event:
    """Measure the base and the trained weights on our rows; return the event that ends the run.

    Weights that are not finite, or a loss that is not, end it as diverged.

    Args:
        parts: Exec.forward_parts.
        curve: what the trainer logged (`reported`); of it the result has the last loss.
    """
    objective = SupervisedFineTuning({run.id: data}, run.precision, None, parts)
    metric = objective.metric
    none: Record = {"step": 0, "examples": 0, "tokens": 0}
    points = [none | start for start in objective.start(base, [run])]
    objective.batches(base.model, 0, [run])  # counts the loss tokens of an update
    n = run.steps * run.batch_size
    last: Record = {"step": run.steps, "examples": n}
    last |= {"tokens": sum(len(row.tokens) for row in data.train(run.seed, 0, n))}
    found: Record = {}
    if all(bool(t.isfinite().all()) for t in weights.values()):
        with (
            attached([run], base, [weights]) as trainables,
            frozen_in_bf16(base.model, run.precision),
        ):
            found = measure(
                base.model, objective, trainables, base.mesh, [run], {run.id}, final=True
            )[run.id]
            (more,), (spectra,) = objective.at_end(base.model, [run]), trainables.spectra()
        del found["code_nats"]  # a prequential code needs the losses of all updates
        points.append(last | found)
        last |= found
        found = {**found, **more, "spectra": spectra}
    state = "done" if math.isfinite(found.get(metric.name, math.nan)) else "diverged"
    result = {
        **objective.facts(run),
        **metric.stored(),
        "backend": backend(base.model, 1),
        "steps_done": run.steps,
        "tokens": last["tokens"],
        **({"train_nll": curve[-1]["train_nll"]} if curve else {}),
        "curve": points,
        "base_sha256": base.sha256,
        "divergence_rule": DIVERGENCE_RULE,
        **({"base_commit": base.commit} if base.commit else {}),
        **(found if state == "done" else {}),
        "weights_sha256": weights_sha256(weights),
    }
    tensors = {f"{PARAM}{name}": tensor for name, tensor in weights.items()}

    def snapshot() -> dict[str, State]:
        return {run.id: {"tensors": tensors, "meta": {"step": run.steps, "layout": [run.id]}}}

    return Event(run.steps, {run.id: last}, {run.id: (state, result)}, snapshot, result["backend"])

"""Measure what a foreign trainer left: find it, check that it is what was asked, load it.

Nothing of it is unpickled or executed, and no link is followed: only regular JSON and safetensors
files are read.
"""

import hashlib
import json
import math
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lorasweep.data.examples import Data
from lorasweep.errors import TrainingError
from lorasweep.models.find import INDEX, SINGLE, weight_files
from lorasweep.models.forward import backend
from lorasweep.models.load import Base, find_targets, model_at
from lorasweep.spec.run import RunSpec
from lorasweep.store.checkpoint import PARAM, State
from lorasweep.train.events import Event, Record
from lorasweep.train.loop import DIVERGENCE_RULE, log_p, measure_trials
from lorasweep.train.objectives.sft import SupervisedFineTuning

ADAPTER, OF_ADAPTER, OF_MODEL = "adapter_model.safetensors", "adapter_config.json", "config.json"
STATE, CURVE = "trainer_state.json", "metrics.jsonl"
LORA_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
OTHERS = (
    *("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "use_bdlora"),
    *("fan_in_fan_out", "target_parameters", "layer_replication", "trainable_token_indices"),
    *("lora_bias", "use_qalora", "alora_invocation_tokens", "arrow_config", "bias"),
)
"""Settings of PEFT's adapters of which each makes another method than plain LoRA."""
OFF: tuple[Any, ...] = (None, False, "none", {}, [])
OWN_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of PEFT's initializations that change the base."""
ROWS, LAST, SURE, SLACK, OTHER_UNIT = 32, 8, 4.0, 0.01, 3.0
"""Training rows and last logged losses that are compared; standard errors and share of the base's
loss by which ours may be higher; first logged loss over the base's from which its unit is another
(sums). 50 honest variants of a trainer stay below, see docs/log/2026-12-03.md."""
ALIKE, FAR = 0.1, 9.0
"""Below this cosine with the base's, matrices count as another base's, unless the sum of their
squares is FAR times the base's: training that moves them so far also makes them larger."""
Tensors = dict[str, torch.Tensor]


def read_weights(folder: Path, run: RunSpec, base: Base) -> Tensors:
    """Return the trained tensors by the names of our states; compare them with what was asked.

    Raises:
        TrainingError: there is no adapter or model; a file of it is a link, a pickle or code; or
            its rank, alpha, adapted matrices or changed tensors are not those of the run.
    """
    method: Any = run.method
    lora, adapter = method.name == "lora", (folder / OF_ADAPTER).exists()
    kind = _checked(folder, OF_ADAPTER if adapter else OF_MODEL)
    index = [INDEX] * (folder / INDEX).exists()
    for name in [ADAPTER] if adapter else [*index, *weight_files(folder)]:
        _checked(folder, name)
    if adapter != lora:
        left, asked = ("an adapter", "a model") if adapter else ("a model", "an adapter")
        raise TrainingError(f"the trainer left {left}, and was asked for {asked}.")
    found, wrong = Tensors(), list[str]()
    if lora:
        try:
            config, tensors = dict(json.loads(kind.read_bytes())), load_file(folder / ADAPTER)
        except (ValueError, TypeError, RecursionError, SafetensorError) as error:
            raise TrainingError(f"{OF_ADAPTER} or {ADAPTER} cannot be read: {error}") from None
        values = {"peft_type": "LORA", "r": method.rank, "lora_alpha": method.alpha}
        given = {k: (config.get(k), v) for k, v in values.items()}
        wrong += [f"{k} is {is_}, asked was {v}" for k, (is_, v) in given.items() if is_ != v]
        others = {k: config[k] for k in OTHERS if config.get(k) not in OFF}
        if str(start := config.get("init_lora_weights")).startswith(OWN_BASE):
            others["init_lora_weights"] = start
        wrong += [f"{k} is {v}, asked was plain LoRA" for k, v in others.items()]
        for key, tensor in tensors.items():
            named = LORA_KEY.fullmatch(key)
            found[f"{named[1]}.{named[2]}" if named else key] = tensor
        targets: dict[str, Any] = find_targets(base.model, run.model, method.target_layers())
        shapes = {f"{n}.A": (method.rank, m.in_features) for n, m in targets.items()}
        shapes |= {f"{n}.B": (m.out_features, method.rank) for n, m in targets.items()}
        wrong += _differences(found, shapes, f"asked were the layers {method.layers}")
        if zero := [n for n, t in found.items() if n.endswith(".B") and not wrong and not t.any()]:
            wrong.append(f"{len(zero)} of {len(targets)} B are 0, not trained, such as {zero[0]}")
    else:
        how = {"config": deepcopy(base.model.config), "use_safetensors": True}
        try:  # its own config.json may name code, such as kernels of the hub, or another model
            of = base.model.generation_config
            model = model_at(run.model, folder, generation_config=of, **how)
        except Exception as error:  # transformers and models raise any kind
            raise TrainingError(f"the trainer's model cannot be loaded: {error}") from None
        found = {name: p.data for name, p in model.named_parameters()}
        before = {name: p.data for name, p in base.model.named_parameters()}
        wrong += _differences(found, {n: tuple(p.shape) for n, p in before.items()}, "of the base")
        # norms and biases may be equal after rounding
        matrices = [n for n, p in found.items() if p.dim() > 1 and not wrong]
        types = (torch.float32, torch.bfloat16, torch.float16)  # in which it may be saved
        alike = ((n, before[n].to(t).to(found[n])) for n in matrices for t in types)
        if kept := [*dict.fromkeys(n for n, rounded in alike if found[n].equal(rounded))]:
            wrong.append(f"{len(kept)} matrices unchanged, such as {kept[0]}")
    if wrong:
        raise TrainingError(f"the trainer did not do what it was asked: {'; '.join(wrong)}.")
    return found


def _checked(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder; TrainingError: it is no regular file there."""
    left = sorted(f.name for f in folder.glob("*") if f.name != "run.json")
    if name not in left:
        raise TrainingError(
            f"the trainer left no {name}. Expected in {{out}}: {OF_ADAPTER} and {ADAPTER}, or "
            f"{OF_MODEL} and {SINGLE}; no pickles. There: {', '.join(left) or 'nothing'}."
        )
    if folder.is_symlink() or not stat.S_ISREG((folder / name).lstat().st_mode):
        raise TrainingError(f"{name} is a link or no regular file, so it is not read.")
    return folder / name


def _differences(found: Tensors, expected: Mapping[str, Any], asked: str) -> Iterator[str]:
    """Yield which tensors are too many, missing or of another shape, the first of each kind."""
    extra, absent = found.keys() - expected.keys(), expected.keys() - found.keys()
    for names, what in ((sorted(extra), "too many"), (sorted(absent), "missing")):
        if names:
            yield f"{len(names)} tensors {what} ({asked}): {names[0]}"
    for name in sorted(found.keys() & expected.keys()):
        is_ = tuple(found[name].shape)
        if is_ != expected[name] or not found[name].is_floating_point():
            yield f"{name} is {found[name].dtype} {[*is_]}, asked was float {[*expected[name]]}"
            return


def checkpoints(out: Path) -> list[Path]:
    """Return the folders checkpoint-N with a trainer_state.json, their last file, newest first."""
    found = {f: re.fullmatch(r"checkpoint-(\d+)", f.parent.name) for f in out.glob(f"*/{STATE}")}
    return sorted((f.parent for f, n in found.items() if n), key=lambda f: -int(f.name[11:]))


def reported(out: Path) -> list[Record]:
    """Return the losses that the trainer logged, from trainer_state.json or metrics.jsonl."""
    for folder, name in ((out, STATE), *((f, STATE) for f in checkpoints(out)), (out, CURVE)):
        with suppress(Exception):  # only shown: no log fails a run
            text, given = _checked(folder, name).read_text(), list[Record]()
            for line in json.loads(text)["log_history"] if name == STATE else text.splitlines():
                with suppress(Exception):  # an entry of another kind, or one that a kill cut off
                    entry: Any = line if name == STATE else json.loads(line)
                    given.append({"step": int(entry["step"]), "train_nll": float(entry["loss"])})
            return given
    return []


def doubt(start: Sequence[np.ndarray], end: Sequence[np.ndarray], logged: Sequence[float]) -> str:
    """Return why a trainer's logged losses are not of the weights that it left, or nothing.

    Doubted are only losses of ours above those that it logged, by more than both vary: dropout,
    label smoothing, long windows and losses that still fall make what it logs larger than ours.
    Fewer than six logged losses do not show how they vary, and none has the last update.

    Args:
        start, end: nats of the loss tokens of some training rows, by row: of the base and of the
            weights. Losses are averaged over tokens or over rows, whichever is lower.
        logged: losses in any unit. One of another unit than ours is compared with its first ones.
    """
    first, rows = np.concatenate(start).mean(), np.array([*map(np.mean, end)])
    ours, n = min(rows.mean(), np.concatenate(end).mean()), min(LAST, len(logged) // 3) or 1
    last, unit = np.array(logged[-n:]), np.mean(logged[:n]) / first
    # losses of a high learning rate may rise at first
    unit = min(logged[:n]) / first if unit > OTHER_UNIT else unit
    unit = unit if unit > OTHER_UNIT else min(unit, 1.0)
    if not 0 < unit < math.inf:
        return ""
    of_log, of_rows = last.std() / unit / math.sqrt(n), rows.std() / math.sqrt(len(rows))
    most, harm = last.mean() / unit, rows - [*map(np.mean, start)]
    vary = SURE * math.hypot(of_log, of_rows)
    # the difference from the base on the same rows has a smaller error than either loss
    harmed = harm.mean() > SURE * harm.std() / math.sqrt(len(rows)) and most < first - vary
    if not (n > 1 and ours - most - SLACK * first > vary) and not (n > 2 and harmed):
        return ""
    return (
        "its loss is not ours: another base, scale or template? "
        f"({ours:.4f} nats on {len(rows)} training rows, the base's are {first:.4f}, and it "
        f"logged {last.mean():.4f} at last)"
    )


def judge(
    run: RunSpec, base: Base, data: Data, weights: Tensors, parts: int, curve: list[Record]
) -> Event:
    """Measure the base and the trained weights on our rows; return the event that ends the run.

    If weights or loss are not finite, it ends as diverged. `parts`: Exec.forward_parts. `curve`:
    what the trainer logged (`reported`), of which the result has the last loss.
    """
    objective, n = SupervisedFineTuning({run.id: data}, run.precision, None, parts), run.batch_size
    start: Record = {"step": 0, "examples": 0, "tokens": 0} | objective.start(base, [run])[0]
    objective.batches(base.model, 0, [run])  # counts the loss tokens of an update
    tokens = sum(len(e.tokens) for e in data.train(run.seed, 0, run.steps * n))
    last: Record = {"step": run.steps, "examples": run.steps * n, "tokens": tokens}
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.to("cpu", torch.float32).contiguous().numpy().data)
    finite = all(bool(t.isfinite().all()) for t in weights.values())
    doubts = list[str]()
    if curve and finite:
        rows = data.train(run.seed, run.steps * n, ROWS)  # whose loss it would log next
        cuts = np.cumsum([int(row.loss.sum()) for row in rows])[:-1]
        start_nats, nats = (np.split(-log_p(base, run, rows, w), cuts) for w in (None, weights))
        logged = [float(record["train_nll"]) for record in curve]
        doubts += filter(None, [doubt(start_nats, nats, logged)])
    both, was, now = 0.0, 0.0, 0.0  # of all matrices, one at a time: they fill the memory
    for k, p in base.model.named_parameters():
        if finite and p.dim() > 1 and k in weights:
            a, b = p.data.flatten(), weights[k].to(p).flatten()
            both, was, now = both + float(a @ b), was + float(a @ a), now + float(b @ b)
    if both < ALIKE * math.sqrt(was * now) and now < FAR * was:
        doubts.append("its matrices are not like the base's: trained from another base?")
    result = {
        **objective.facts(run),
        **objective.metric.stored(),
        "backend": backend(base.model, 1),
        "steps_done": run.steps,
        "tokens": tokens,
        **({"train_nll": curve[-1]["train_nll"]} if curve else {}),
        **({"doubt": "; ".join(doubts)} if doubts else {}),
        "curve": [start, last],
        "code_nats": math.nan,  # which needs the losses of all updates
        "base_sha256": base.sha256,
        "divergence_rule": DIVERGENCE_RULE,
        **({"base_commit": base.commit} if base.commit else {}),
        "weights_sha256": digest.hexdigest(),
    }
    meta = {"step": run.steps, "layout": [run.id], "result": result, "last": last}
    tensors = {f"{PARAM}{name}": tensor for name, tensor in weights.items()}
    state: dict[str, State] = {run.id: {"tensors": tensors, "meta": meta}}
    if finite:
        return next(measure_trials([run], base, objective, state))
    ended = {run.id: ("diverged", {**result, "curve": [start]})}
    return Event(run.steps, {run.id: last}, ended, lambda: state, result["backend"])

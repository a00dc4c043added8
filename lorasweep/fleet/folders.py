"""Check an adapter's folder against its base and a server, from headers and JSON alone.

Nothing is unpickled, and no weight is read.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorasweep.fleet.serving import Profile
from lorasweep.spec.model import LAYER_SETS, ROUTER, ModelSpec
from lorasweep.store import files

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PICKLED = ("adapter_model.bin", "adapter_model.pt")
PREFIX = "base_model.model."
FACTOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")
NEEDED = ("r", "lora_alpha", "target_modules")
EXPERTS = {"experts.base_layer": "mlp.experts.gate_up_proj", "experts": "mlp.experts.down_proj"}
"""End of a module's name in PEFT's layout of experts -> the parameter that it adapts."""
NAMED = 3
"""Modules or tensors that a sentence names."""


def problems(
    folder: Path,
    profile: Profile,
    model: ModelSpec,
    rank: int | None = None,
    architecture: str = "",
) -> list[str]:
    """Return what a server would refuse or silently ignore in an adapter's folder, as sentences.

    Args:
        model: the base that is served.
        rank: the server's largest rank (--max-lora-rank); None: the highest that it can have.
        architecture: the class that the base's config.json names; '': not known, so only a tied
            unembedding is judged.

    Raises:
        OSError: a file is there and cannot be read.
    """
    config = _config(folder)
    found = [config] if isinstance(config, str) else [*_of_config(config, profile, model)]
    tensors = _tensors(folder)
    if isinstance(tensors, str):
        return [*found, tensors]
    settings = {} if isinstance(config, str) else config
    limit = rank if rank is not None else profile.ranks[-1] if profile.ranks else None
    return [*found, *_of_tensors(tensors, settings, profile, model, limit, architecture)]


def _config(folder: Path) -> dict[str, Any] | str:
    """Return the content of adapter_config.json, or the problem with the file."""
    try:
        found = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError:
        return f"{CONFIG} is missing."
    except ValueError:
        found = None
    return found if isinstance(found, dict) else f"{CONFIG} is truncated, or no JSON object."


def _tensors(folder: Path) -> dict[str, Any] | str:
    """Return the tensors in the header of the weights, or the problem with the file."""
    path = folder / ADAPTER
    if not path.is_file():
        if pickled := next((name for name in PICKLED if (folder / name).is_file()), None):
            return f"{ADAPTER} is missing. {pickled} is a pickle, which can run code when read."
        return f"{ADAPTER} is missing."
    read = files.safetensors_header(path)
    if read is None or not all(isinstance(t.get("shape"), list) for t in read[0].values()):
        return f"{ADAPTER} is truncated, or no safetensors file: it has no valid header."
    tensors, size = read
    if path.stat().st_size != size:
        return f"{ADAPTER} is truncated: {path.stat().st_size:,} bytes, its header says {size:,}."
    return tensors


def _of_config(config: dict[str, Any], profile: Profile, model: ModelSpec) -> Iterator[str]:
    if config.get("peft_type") != "LORA":
        yield f"peft_type is {config.get('peft_type')!r}, not LORA."
    for key in NEEDED:
        if config.get(key) is None:
            yield f"{CONFIG} has no {key}."
    base = config.get("base_model_name_or_path")
    if base not in (None, model.name, model.location):
        yield f"{CONFIG} names the base {base!r}, which is not {model.location or model.name!r}."
    for keys, verb in ((profile.refuses, "refuses"), (profile.ignores, "ignores")):
        for key, _, start in (entry.partition("=") for entry in keys):
            value = config.get(key)
            unset = value in (None, False, "none") or value in ([], {}, "")
            if str(value).lower().startswith(start) if start else not unset:
                yield f"{key} is {json.dumps(value)}, which {profile.server} {verb}."


def _of_tensors(
    tensors: Mapping[str, Any],
    config: dict[str, Any],
    profile: Profile,
    model: ModelSpec,
    limit: int | None,
    architecture: str,
) -> Iterator[str]:
    found: dict[str, list[str]] = {}  # kind of problem -> modules or tensors
    shapes, ranks = _shapes(model), {0}
    factors: dict[str, set[str]] = {}  # module -> A and B
    layers: dict[str, set[int]] = {}  # end of a module's name -> layers
    for name, tensor in tensors.items():
        if tensor["dtype"] not in profile.weights:
            found.setdefault(f"tensors of a type that {profile.server} refuses", []).append(name)
        match = FACTOR.fullmatch(name)
        if match is None:
            what = "tensors that are neither A nor B of a matrix"
            if not name.startswith(PREFIX):
                what = f"keys without the prefix {PREFIX!r}"
            elif "lora_magnitude_vector" in name:
                what = "DoRA's lora_magnitude_vector"
            found.setdefault(what, []).append(name)
            continue
        module, which = match.groups()
        factors.setdefault(module, set()).add(which)
        kind, layer = _kind(module), [int(part) for part in module.split(".") if part.isdigit()]
        in_head = kind in model.unembedding
        inside = not layer if in_head else len(layer) == 1 and layer[0] < model.n_layers
        shape = tensor["shape"][:: -1 if which == "A" else 1]  # width, rank x experts
        if kind not in shapes or not inside or [shapes[kind][which == "B"]] != shape[:-1]:
            where = f"{module}.{which} {tensor['shape']}"
            found.setdefault(f"weights of another base than {model.name!r}", []).append(where)
            continue
        layers.setdefault(kind, set()).update(layer)
        n_experts, stated = shapes[kind][2], _rank_of(config, module)
        if stated is not None and shape[1] != stated * n_experts:
            what = f"another rank in the tensors than in {CONFIG}"
            where = f"{module}.{which} has {shape[1] // n_experts}, not {stated}"
            found.setdefault(what, []).append(where)
        ranks |= {shape[1] // n_experts, stated or 0}
    if alone := [module for module, both in factors.items() if len(both) < 2]:
        found["A without B, or B without A"] = alone
    for kind, there in layers.items():
        if kind not in model.unembedding and len(there) < model.n_layers:
            where = f"{kind} in {len(there)} of {model.n_layers} layers"
            found.setdefault("not every layer is adapted", []).append(where)
    for what, names in found.items():
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        yield f"{what}: {', '.join(names[:NAMED])}{more}."
    if not tensors:
        yield f"{ADAPTER} has no tensors."
    if limit is not None and max(ranks) > limit:
        yield f"rank {max(ranks)} is above the largest of the server, {limit}."
    why = profile.why_no_head(model, architecture) if model.tied or architecture else ""
    if why and layers.keys() & {*model.unembedding}:
        tied = "tied " if model.tied else ""
        yield f"an adapter of the {tied}unembedding {model.unembedding[0]}: {why}."
    if profile.no_experts and layers.keys() & EXPERTS.keys():
        yield f"adapters of experts: {profile.no_experts}."


def _shapes(model: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return inputs, outputs and number of experts of a base's modules, by the end of the name."""
    names = [n for layer_set in LAYER_SETS for n in model.modules(layer_set)[0] if n != "experts"]
    found: dict[str, tuple[int, ...]] = {n: (*model.known_shapes[n], 1) for n in names}
    if n := model.n_experts:
        found[model.modules(ROUTER)[0][0]] = (model.hidden_size, n, 1)
        found["experts.base_layer"] = (model.hidden_size, 2 * model.mlp_size, n)
        found["experts"] = (model.mlp_size, model.hidden_size, n)
    return found


def _kind(module: str) -> str:
    """Return the last part of a module's name; that of experts' gate and up has two."""
    return next((k for k in EXPERTS if module.endswith(f".{k}")), module.rpartition(".")[2])


def _rank_of(config: dict[str, Any], module: str) -> int | None:
    """Return a module's rank by adapter_config.json; None if it states none.

    A key of rank_pattern is a regular expression for the end of the name (peft/utils/other.py,
    get_pattern_key).
    """
    kind, pattern = _kind(module), config.get("rank_pattern")
    name = module.removesuffix(kind) + EXPERTS.get(kind, kind).removeprefix("mlp.")
    for key, rank in pattern.items() if isinstance(pattern, dict) else ():
        with suppress(re.error):
            if re.fullmatch(rf"(.*\.)?({key})", name):
                return rank
    stated = config.get("r")
    return stated if isinstance(stated, int) else None

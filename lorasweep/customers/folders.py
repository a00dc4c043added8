"""Check an adapter's folder against its base and a server, from headers and JSON alone.

Nothing is unpickled, and no weight is read.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorasweep.customers.serving import Profile
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
"""Names in a sentence."""


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
    other = [name for name in tensors if not FACTOR.fullmatch(name)]
    if odd := [name for name in other if not name.startswith(PREFIX)]:
        yield f"keys without the prefix {PREFIX!r}: {_some(odd)}."
    if dora := [name for name in other if "lora_magnitude_vector" in name]:
        yield f"DoRA's lora_magnitude_vector, which is neither A nor B: {_some(dora)}."
    if left := [name for name in other if name not in {*odd, *dora}]:
        yield f"tensors that are neither A nor B of a matrix: {_some(left)}."
    pairs: dict[str, dict[str, list[int]]] = {}
    for name in tensors:
        if match := FACTOR.fullmatch(name):
            pairs.setdefault(match[1], {})[match[2]] = tensors[name]["shape"]
    if not pairs and not odd:
        yield f"{ADAPTER} holds no A and B."
    types = {tensors[name]["dtype"] for name in tensors} - {*profile.weights}
    if types:
        yield f"tensors of type {_some(types)}. Expected {', '.join(profile.weights)}."
    if alone := [name for name, both in pairs.items() if len(both) < 2]:
        yield f"A without B, or B without A: {_some(alone)}."
    shapes, covered = _shapes(model), dict[str, set[int]]()
    foreign, unequal, ranks = [], [], {0}
    for module, both in pairs.items():
        kind, layer = _kind(module), [int(p) for p in module.split(".") if p.isdigit()]
        in_head = kind in model.unembedding
        inside = not layer if in_head else len(layer) == 1 and layer[0] < model.n_layers
        if kind not in shapes or not inside:
            foreign.append(module)
            continue
        covered.setdefault(kind, set()).update(layer)
        wide_in, wide_out, n_experts = shapes[kind]
        rows, columns = both.get("A"), both.get("B")
        fits_in = rows is None or (len(rows) == 2 and rows[1] == wide_in)
        fits_out = columns is None or (len(columns) == 2 and columns[0] == wide_out)
        if not fits_in or not fits_out:
            foreign.append(f"{module} {rows} {columns}")
            continue
        stated = _rank_of(config, module)
        of_module = {rows[0]} if rows else set()
        of_module |= {columns[1]} if columns else set()
        if stated is not None and of_module != {stated * n_experts}:
            unequal.append(f"{module} has {_some(n // n_experts for n in of_module)}, not {stated}")
        ranks |= {n // n_experts for n in of_module} | ({stated} if stated else set())
    if foreign:
        yield f"weights of another base, which do not fit {model.name!r}: {_some(foreign)}."
    if unequal:
        yield f"the rank of the tensors differs from the rank in {CONFIG}: {_some(unequal)}."
    if limit is not None and max(ranks) > limit:
        yield f"rank {max(ranks)} is above the largest of the server, {limit}."
    short = [
        f"{kind} in {len(layers)} of {model.n_layers} layers"
        for kind, layers in covered.items()
        if kind not in model.unembedding and len(layers) < model.n_layers
    ]
    if short:
        yield f"not every layer is adapted: {_some(short)}."
    targets = config.get("target_modules")
    there = {_kind(module).split(".")[0] for module in pairs}
    if isinstance(targets, list) and (absent := {*map(str, targets)} - there) and pairs:
        yield f"target_modules names {_some(absent)}, of which there are no tensors."
    if covered.keys() & {*model.unembedding}:
        judged = model.tied or architecture
        if judged and (why := profile.why_no_head(model, architecture)):
            tied = "tied " if model.tied else ""
            yield f"an adapter of the {tied}unembedding {model.unembedding[0]}: {why}."
    if profile.no_experts and any(kind in EXPERTS for kind in covered):
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


def _some(names: Collection[Any] | Iterator[Any]) -> str:
    """Name the first few of many."""
    listed = sorted(map(str, names))
    more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return ", ".join(listed[:NAMED]) + more

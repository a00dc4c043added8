"""Rules of a server for adapters: what it takes, the command to serve, and the check of a folder.

A profile is a file of conf/serve, in which every rule has its source. A folder is checked by its
headers and JSON alone: nothing is unpickled, and no weight is read.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lorasweep.errors import SpecError
from lorasweep.spec.method import parse_layers
from lorasweep.spec.model import LAYER_SETS, ROUTER, ModelSpec
from lorasweep.spec.values import Value
from lorasweep.store import files

HEAD = "unembedding"
BASE = "BASE"
"""What a command names in place of a base that is not on the hub."""
IN_BATCH = 8
"""Largest number of adapters in a batch that a command asks for; each takes GPU memory. A
convention; vLLM's default is 1."""


@dataclass(frozen=True)
class Profile(Value):
    """What a server takes. The defaults take all that a fleet writes, as PEFT does."""

    WHERE: ClassVar[str] = "serve."

    name: str = "peft"
    server: str = "PEFT"
    """The server, with the version whose files were read."""
    ranks: tuple[int, ...] = ()
    """Allowed values of the server's largest rank, ascending; empty: every rank."""
    heads: tuple[str, ...] | None = None
    """Architectures whose unembedding takes an adapter; None: all."""
    no_tied_heads: str = ""
    """Why an unembedding that is tied to the embedding is left out; empty: it is not."""
    no_experts: str = ""
    """Why experts are refused; empty: they are served."""
    weights: tuple[str, ...] = ("F64", "F32", "F16", "BF16")
    """Types of tensors, as safetensors names them."""
    refuses: tuple[str, ...] = ()
    """Keys of adapter_config.json with which the server refuses an adapter; KEY=START: values."""
    ignores: tuple[str, ...] = ()
    """Keys that change the adapter in PEFT, and that the server ignores."""
    command: str = ""
    """Template of the command to serve; empty: there is none."""
    chat_template: str = ""
    """Template of the option with a chat template other than the base's own."""

    def largest_rank(self, rank: int) -> int:
        """Return the lowest largest rank of the server for adapters up to `rank`.

        Raises:
            SpecError: the server takes no such rank.
        """
        if not self.ranks:
            return rank
        found = next((allowed for allowed in self.ranks if allowed >= rank), None)
        if found is None:
            raise SpecError(
                f"rank {rank}: {self.server} takes ranks up to {self.ranks[-1]}, set to one of "
                f"{', '.join(map(str, self.ranks))}. Add serve=peft, or another server's profile."
            )
        return found

    def why_no_head(self, model: ModelSpec, architecture: str) -> str:
        """Return why the unembedding of a base gets no adapter; '' if it gets one.

        `architecture`: the class that config.json names; '' if it is not known.
        """
        if model.tied and self.no_tied_heads:
            return self.no_tied_heads
        if self.heads is None or architecture in self.heads:
            return ""
        which = f"{architecture} is not among them" if architecture else "the base's is not known"
        return f"{self.server} takes it for some architectures, and {which}"


PEFT = Profile()


def adapted(profile: Profile, layers: str, model: ModelSpec, architecture: str) -> tuple[str, str]:
    """Return the layer sets to adapt for a server, and why the unembedding was left out of them.

    Raises:
        SpecError: the server takes none of these layers, or no experts.
    """
    sets = parse_layers(layers)
    if profile.no_experts and model.n_experts and {"mlp", ROUTER} & set(sets):
        raise SpecError(
            f"serve={profile.name}, and model {model.name!r} has experts: {profile.no_experts}. "
            "Add method.layers=attention, or serve=peft."
        )
    why = profile.why_no_head(model, architecture) if HEAD in sets else ""
    left = "+".join(s for s in sets if s != HEAD)
    if why and not left:
        raise SpecError(
            f"serve={profile.name}: the unembedding is left out, as {why}, and method.layers="
            f"{layers} has nothing else. Add method.layers=attention+mlp, or serve=peft."
        )
    return (left, why) if why else (layers, "")


def serve_command(
    profile: Profile, base: str, folders: Mapping[str, str], rank: int, template: str = ""
) -> str:
    """Return the command that serves adapters on one base; '' for a profile without a server.

    Args:
        folders: name of each adapter -> its folder.
        rank: the largest rank of the adapters.
        template: file with the chat template of the adapters; '': the base's own.
    """
    modules = (shlex.quote(f"{name}={folder}") for name, folder in folders.items())
    command = profile.command.format(
        base=shlex.quote(base),
        rank=profile.largest_rank(rank),
        in_batch=min(len(folders), IN_BATCH),
        adapters=len(folders),
        modules=" ".join(modules),
    )
    option = profile.chat_template.format(file=shlex.quote(template)) if template else ""
    return f"{command} {option}".rstrip()


# ---------------------------------------------------------------- the check of a folder

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
    config: dict[str, Any] = {}
    try:
        config = json.loads((folder / CONFIG).read_text())
        found = [*_of_config(config, profile, model)]
    except FileNotFoundError:
        found = [f"{CONFIG} is missing."]
    except (ValueError, AttributeError):
        config, found = {}, [f"{CONFIG} is truncated, or no JSON object."]
    limit = rank if rank is not None else profile.ranks[-1] if profile.ranks else None
    path = folder / ADAPTER
    read = files.safetensors_header(path) if path.is_file() else None
    if not path.is_file():
        pickled = next(
            (
                f" {n} is a pickle, which can run code when read."
                for n in PICKLED
                if (folder / n).is_file()
            ),
            "",
        )
        return [*found, f"{ADAPTER} is missing.{pickled}"]
    if read is None or not all(isinstance(t.get("shape"), list) for t in read[0].values()):
        return [*found, f"{ADAPTER} is truncated, or no safetensors file: it has no valid header."]
    if (size := path.stat().st_size) != read[1]:
        return [*found, f"{ADAPTER} is truncated: {size:,} bytes, its header says {read[1]:,}."]
    return [*found, *_of_tensors(read[0], config, profile, model, limit, architecture)]


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
    shapes, ranks, strange, wrong = _shapes(model), {0}, [], []
    there: dict[str, set[tuple[int, str]]] = {}  # end of a module's name -> layer, and A or B
    for name, tensor in tensors.items():
        module, which = m.groups() if (m := FACTOR.fullmatch(name)) else ("", "")
        kind, layer = _kind(module), [int(part) for part in module.split(".") if part.isdigit()]
        if kind not in shapes or len(layer) > 1 or tensor["dtype"] not in profile.weights:
            strange.append(f"{name} ({tensor['dtype']})")
            continue
        there.setdefault(kind, set()).add((layer[0] if layer else 0, which))
        *sides, n_experts = shapes[kind]
        shape = tensor["shape"][:: -1 if which == "A" else 1]  # width, rank x experts
        rank = _rank_of(config, module) or (shape or [0])[-1] // n_experts
        if shape != [sides[which == "B"], rank * n_experts]:
            wrong.append(f"{name} {tensor['shape']}")
        ranks |= {rank, (shape or [0])[-1] // n_experts}
    for kind, found in there.items():
        n = 1 if kind in model.unembedding else model.n_layers
        if found != {(k, which) for k in range(n) for which in "AB"}:
            wrong.append(f"{kind} has {len(found)} A and B in {n} layers")
    for what, names in (
        (
            f"tensors that are no A or B of {model.name!r}, or that {profile.server} refuses",
            strange,
        ),
        (
            f"tensors of another base than {model.name!r}, or of another rank than in {CONFIG}",
            wrong,
        ),
    ):
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        if names:
            yield f"{what}: {', '.join(names[:NAMED])}{more}."
    if not tensors:
        yield f"{ADAPTER} has no tensors."
    if limit is not None and max(ranks) > limit:
        yield f"rank {max(ranks)} is above the largest of the server, {limit}."
    why = profile.why_no_head(model, architecture) if model.tied or architecture else ""
    if why and there.keys() & {*model.unembedding}:
        tied = "tied " if model.tied else ""
        yield f"an adapter of the {tied}unembedding {model.unembedding[0]}: {why}."
    if profile.no_experts and there.keys() & EXPERTS.keys():
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

"""Load base models, from the hub, a folder, a GGUF file or a recipe; check shape and matrices.

A recipe describes a small model that `lorasweep.train.pretrain` trains. The weights of some recipes
come with the package.
"""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from lorasweep.errors import ModelError, check_installed, from_hub
from lorasweep.methods import peft
from lorasweep.methods.lora import LoRA
from lorasweep.methods.stacked import experts_forward, save_peft
from lorasweep.methods.trainables import Experts, Target
from lorasweep.models import find
from lorasweep.models.forward import MASTER_DTYPES, bf16_matrices, set_numerics, use_short_rows
from lorasweep.models.sharding import Mesh
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import RunSpec
from lorasweep.store.files import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass
class Base:
    """A loaded base model."""

    model: Any
    tokenizer: Any
    sha256: str
    """Hash of the weights. Runs with equal hashes share a base."""
    at_start: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Cached held-out measures before training, by data set, draw and precision."""
    commit: str | None = None
    """The hub's commit; None for other sources."""
    mesh: Mesh = field(default_factory=Mesh)


def load(
    spec: ModelSpec, models_dirs: Sequence[str], precision: str = "fp32", mesh: Mesh | None = None
) -> Base:
    """Load a base model in the master type of `precision`, in eval mode, and check its shape.

    Under bf16, matrices published in bf16 stay in bf16. With several processes, process 0 has the
    weights on the CPU; the other processes have only the shapes (`sharding.shard`). ModelError: the
    weights are missing, or do not have the described shape.
    """
    mesh = mesh or Mesh()
    if mesh.rank:
        config, tokenizer, digest, commit = mesh.broadcast()
        model = without_weights(config, spec, precision)
        return Base(model, tokenizer, digest, commit=commit, mesh=mesh)
    model, tokenizer, commit = _read(spec, models_dirs)
    check_shape(model, spec)
    config = copy.deepcopy(model.config)  # other processes build the model from it
    model = prepared(model, spec, precision)
    if torch.cuda.is_available() and mesh.size == 1:
        model = model.cuda()
    digest = weights_sha256(model)
    mesh.broadcast((config, tokenizer, digest, commit))
    return Base(model, tokenizer, digest, commit=commit, mesh=mesh)


def _read(spec: ModelSpec, models_dirs: Sequence[str]) -> tuple[Any, Any, str | None]:
    """Read a model and its tokenizer; from the hub, both at one commit, which is also returned."""
    from safetensors.torch import load_file
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if spec.source == "recipe":
        path = find.recipe_weights(spec, models_dirs)
        if path is None:
            raise ModelError(
                f"model {spec.name!r}: no weights {find.recipe_file_name(spec)} in "
                f"{', '.join(models_dirs) or 'any folder'}. Pretrain it first: "
                "lorasweep.train.pretrain.ensure(spec, models_dirs)."
            )
        model = empty_model(spec)
        state = {k: v.float() for k, v in load_file(path).items()}
        tied = {"lm_head.weight": state["model.embed_tokens.weight"]} if spec.tied else {}
        model.load_state_dict(state | tied)
        return model, None, None
    place, more = _place(spec, models_dirs)
    try:
        return model_at(spec, place, **more), _tokenizer_at(place, **more), more.get("revision")
    except OSError as error:
        if spec.source != "hub":
            raise
        raise ModelError(from_hub(f"model {spec.name!r}", spec.location, error)) from error


def _place(spec: ModelSpec, models_dirs: Sequence[str]) -> tuple[Path | str, dict[str, str]]:
    """Return where transformers finds a model: a folder; or a name on the hub and its commit."""
    if spec.source == "hub":
        return spec.location, {"revision": find.cached_config(spec).name}
    return _folder(spec, models_dirs), {}


def transformers_folder(spec: ModelSpec, models_dirs: Sequence[str], new: Path) -> Path:
    """Return a folder of transformers with a base; a recipe is written to `new`."""
    if spec.source != "recipe":
        return find.cached_config(spec) if spec.source == "hub" else _folder(spec, models_dirs)
    _read(spec, models_dirs)[0].save_pretrained(new)
    return new


def save_trained(
    spec: ModelSpec, models_dirs: Sequence[str], weights: "dict[str, torch.Tensor]", folder: Path
) -> None:
    """Write a fully fine-tuned model and its tokenizer as a folder of transformers.

    `weights`: the trained tensors by the names of the model's parameters. ModelError: the base is
    missing, or does not have these parameters.
    """
    model, tokenizer, _ = _read(spec, models_dirs)
    model.to(next(iter(weights.values())).dtype)  # rounding to the base's bf16 loses small changes
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise ModelError(f"model {spec.name!r} has no parameters {', '.join(unknown)}.")
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def write_adapter(
    folder: Path,
    spec: RunSpec,
    weights: "dict[str, torch.Tensor]",
    commit: str | None,
    models_dir: Sequence[str] = (),
) -> None:
    """Write a run's adapter as a folder that PEFT loads, without local paths; or its weights.

    Args:
        commit: the base's commit on the hub.
        models_dir: where the base lies; needed except for LoRA.
    """
    base = spec.model.location if spec.model.source == "hub" else spec.model.name
    if isinstance(spec.method, LoRA):
        save_peft(folder, weights, spec.method, base, commit, spec.model.n_experts)
    elif isinstance(spec.method, peft.PEFT):
        model = load(spec.model, models_dir).model
        targets = find_targets(model, spec.model, spec.method.target_layers())
        peft.save(folder, model, targets, spec, weights, (base, commit))
    else:
        save_trained(spec.model, models_dir, weights, folder)


def tokenizer_of(spec: ModelSpec, models_dirs: Sequence[str], fetched: bool = False) -> Any:
    """Load only the tokenizer; None if there is none. ModelError as from `find.check_available`."""
    if not find.check_available(spec, models_dirs, fetched):
        return None
    place, more = _place(spec, models_dirs)
    return _tokenizer_at(place, **more)


def _tokenizer_at(place: Path | str, **more: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **more)


def model_at(spec: ModelSpec, place: Path | str, **more: Any) -> Any:
    """Load a model in fp32 and run no code of its own. ModelError: weights differ (not: tied)."""
    from transformers import AutoModelForCausalLM

    more |= {"dtype": torch.float32, "trust_remote_code": False}
    more |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below
    try:
        model, loaded = cast(Any, AutoModelForCausalLM).from_pretrained(place, **more)
    except (KeyError, TypeError) as error:  # such as an index without metadata
        why = f"transformers cannot read its weights ({type(error).__name__}: {error})"
        raise ModelError(f"model {spec.name!r}: {why}. Get the complete files.") from error
    wrong = [f"{len(keys)} {kind}: {min(map(str, keys))}" for kind, keys in loaded.items() if keys]
    if wrong:
        raise ModelError(
            f"model {spec.name!r}: its weights do not fit its config.json ({'; '.join(wrong)}). "
            "Get the complete weights, or the config.json that belongs to them."
        )
    return model


def architecture_of(spec: ModelSpec, models_dirs: Sequence[str]) -> str:
    """Return the class that a model's config.json names, or ''. ModelError: it is missing."""
    folder = find.cached_config(spec) if spec.source == "hub" else _folder(spec, models_dirs)
    config = read_json(folder / "config.json") or {}
    return next(iter(config.get("architectures") or ()), "")


def without_weights(config: Any, spec: ModelSpec, precision: str) -> Any:
    """Build a model from transformers' config as `load` does, but on the device 'meta'."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return prepared(model, spec, precision)


def prepared(model: Any, spec: ModelSpec, precision: str) -> Any:
    """Return the model with the tensor types and numerics of `precision`, converted in place."""
    use_grouped_experts(model, spec)
    model = model.to(MASTER_DTYPES[precision]).eval()
    set_numerics(model, precision, spec.weights_dtype == "bf16")
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # sdpa of some releases drops the softcap
    if not torch.cuda.is_available():
        use_short_rows(model)
    return model


def _folder(spec: ModelSpec, models_dirs: Sequence[str]) -> Path:
    """Return a local model's folder; of a GGUF file a conversion, cached in models_dirs[0]."""
    path = find.pinned_path(spec, models_dirs)
    converted = path if path.is_dir() else find.converted_at(path, models_dirs[0])
    if (converted / "config.json").is_file():
        return converted
    check_installed("gguf", f"model {spec.name!r}")
    quantised = model_at(spec, path.parent, gguf_file=path.name)
    # transformers refuses to save a model loaded from GGUF, so a new model gets the weights
    config = quantised.config.to_dict()
    config.pop("quantization_config", None)
    model = type(quantised)(type(quantised.config)(**config))
    model.load_state_dict(quantised.state_dict())
    partial = converted.with_name(f".{converted.name}.{os.getpid()}")
    model.save_pretrained(partial)
    _tokenizer_at(path.parent, gguf_file=path.name).save_pretrained(partial)
    try:
        os.rename(partial, converted)
    except OSError:  # another process was faster
        shutil.rmtree(partial, ignore_errors=True)
        if not (converted / "config.json").is_file():
            raise
    return converted


def check_shape(model: Any, spec: ModelSpec) -> None:
    """Raise ModelError if a loaded model differs from `spec` in shape or type of weights."""
    config = model.config
    active = getattr(config, "num_experts_per_tok", None) if spec.n_experts else 0
    values = {
        "hidden_size": (config.hidden_size, spec.hidden_size),
        "n_layers": (config.num_hidden_layers, spec.n_layers),
        "vocab_size": (config.vocab_size, spec.vocab_size),
        "tied": (bool(config.tie_word_embeddings), spec.tied),
        "parameters": (sum(p.numel() for p in model.parameters()), spec.n_params),
        "active experts": (active, spec.n_active_experts),
    }
    wrong = [
        f"{k} is {got}, described as {want}" for k, (got, want) in values.items() if got != want
    ]
    if spec.weights_dtype == "bf16":
        for name, p in bf16_matrices(model).items():
            parts = p.detach().split(8192)
            if not all(torch.equal(part.to(torch.bfloat16).to(part), part) for part in parts):
                wrong.append(f"weights_dtype is fp32 ({name}), described as bf16")
                break
    if wrong:
        raise ModelError(
            f"model {spec.name!r} differs from its file in conf/model or {spec.location}/config."
            f"json: {'; '.join(wrong)}. Correct the file, or get the weights that it describes."
        )


def weights_sha256(model: Any) -> str:
    """Hash names, shapes and float32 values of all parameters."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        digest.update(json.dumps([name, list(p.shape)]).encode())
        digest.update(p.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


# ---------------------------------------------------------------- target modules and experts


def find_targets(model: nn.Module, spec: ModelSpec, layers: tuple[str, ...]) -> dict[str, Target]:
    """Map module names to the nn.Linear or Experts with matrices of the layer sets.

    ModelError: a module is missing, or its kind or shape differs from `spec`.
    """
    n_experts, hidden, width = spec.n_experts, spec.hidden_size, spec.mlp_size
    stacks = {"gate_up_proj": (n_experts, 2 * width, hidden)}
    stacks["down_proj"] = (n_experts, hidden, width)

    def target(module: Any, experts: bool) -> Target | None:
        """Return the Target of a module; None if its kind or shape differs from `spec`."""
        if not experts:
            return module if isinstance(module, nn.Linear) else None
        fits = (
            {n: tuple(p.shape) for n, p in module.named_parameters()} == stacks
            and not getattr(module, "is_transposed", False)
            and getattr(module, "is_concatenated", True)
        )
        return Experts(module, spec.n_active_experts) if fits else None

    found: dict[str, Target] = {}
    for layer_set in layers:
        (names, count), experts, kind = spec.modules(layer_set), False, "nn.Linear"
        if layer_set == "mlp" and n_experts:
            shapes = ", gate before up, and ".join(f"{n} {[*s]}" for n, s in stacks.items())
            experts, kind = True, f"experts with {shapes}, without biases"
        matching = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in names}
        known = {n: t for n, m in matching.items() if (t := target(m, experts)) is not None}
        wrong = sorted(matching.keys() - known.keys())
        if wrong or len(matching) != count:
            raise ModelError(
                f"model {spec.name!r}: layer set {layer_set!r}: expected {count} modules named "
                f"{sorted(names)} that are {kind}, found {len(matching)} with these names. Not of "
                f"that kind: {wrong[:3] or 'none'}. Correct the model's file in conf/model (a "
                "model with experts needs n_experts and n_active_experts), or leave this layer "
                "set out of method.layers."
            )
        found |= known
    return found


def use_grouped_experts(model: Any, spec: ModelSpec) -> None:
    """Let the model compute its experts by `experts_forward`, with and without adapters.

    The default of transformers fails in float64, and computes in fp32 under autocast. Raises
    ModelError if the experts have another layout, or biases.
    """
    if spec.n_experts:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        find_targets(model, spec, ("mlp",))
        ALL_EXPERTS_FUNCTIONS.register("sorted_by_run", experts_forward)
        model.set_experts_implementation("sorted_by_run")


# ---------------------------------------------------------------- recipes


def config_of(spec: ModelSpec, **more: Any) -> "PretrainedConfig":
    """Return a Llama config; with qk_norm a Qwen3 config, with experts a Qwen3-MoE config."""
    from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig

    kind: Any = Qwen3MoeConfig if spec.n_experts else Qwen3Config if spec.qk_norm else LlamaConfig
    if spec.n_experts:
        more |= {"num_experts": spec.n_experts, "num_experts_per_tok": spec.n_active_experts}
        more |= {"moe_intermediate_size": spec.mlp_size, "norm_topk_prob": True}
    more |= {"num_attention_heads": spec.n_heads, "num_key_value_heads": spec.n_kv_heads}
    more |= {"hidden_size": spec.hidden_size, "intermediate_size": spec.mlp_size}
    more |= {"num_hidden_layers": spec.n_layers, "head_dim": spec.head_size}
    return kind(vocab_size=spec.vocab_size, tie_word_embeddings=spec.tied, **more)


def empty_model(spec: ModelSpec) -> "PreTrainedModel":
    """Build an untrained model of the described shape, with transformers' random weights."""
    from transformers import AutoModelForCausalLM

    more: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    more |= {"max_position_embeddings": 512, "rms_norm_eps": 1e-5}
    more |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    return AutoModelForCausalLM.from_config(config_of(spec, **more))

"""Describe a model without a file in conf/model: a folder, a GGUF file, or a name on the hub.

Its matrices are counted in transformers' modules, built from its config without weights.
"""

import copy
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.errors import ModelError, check_installed
from lorasweep.models import find
from lorasweep.spec.model import EXPERT_MATRICES, LAYER_SETS, ModelSpec

if TYPE_CHECKING:
    from torch import nn

HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")
"""A model of the hub: owner/name, with an optional @revision."""
CAUSAL = ("ForCausalLM", "LMHeadModel")
"""Ends of the names of architectures that predict the next token."""
KINDS = ("attention", "mlp", "experts")
"""Kinds of matrices in a layer that can be adapted."""


def describe_model(given: str, models_dirs: Sequence[str] = ()) -> tuple[ModelSpec, str]:
    """Return a model's spec, and the folder to append to exec.models_dir ('' for the hub).

    `given`: a folder of transformers, a .gguf file, or a name on the hub with @revision.
    `models_dirs`: folders in which a relative path is also looked for. ModelError: there is no such
    model, or its architecture cannot be adapted.
    """
    paths = [Path(given), *(Path(folder) / given for folder in models_dirs)]
    tried = [Path(p) for p in dict.fromkeys(os.path.abspath(p.expanduser()) for p in paths)]
    path = next((p for p in sorted(tried, key=_is_model, reverse=True) if p.exists()), None)
    if path is not None:
        spec = ModelSpec(given, "folder" if path.is_dir() else "gguf", path.name)
        described = _described(spec, path, [*models_dirs, str(path.parent)])
        pin = find.content_pin(path)
        name = f"{path.name.removesuffix('.gguf')}-{pin.removeprefix('sha256:')[:8]}"
        return replace(described, name=name, revision=pin), str(path.parent)
    problem, match = "", HUB_NAME.fullmatch(given)
    if match and not given.endswith(".gguf") and not given.startswith(("/", ".", "~")):
        spec = ModelSpec(given, "hub", match[1], match[2] or "")
        try:
            folder = find.cached_config(spec)
        except ModelError as error:
            problem = f" As a name, {str(error).removeprefix(f'model {given!r}: ')}"
        else:
            described = _described(spec, folder, models_dirs)
            return replace(described, name=match[1].replace("/", "-"), revision=folder.name), ""
    raise ModelError(
        f"model {given!r}: no folder or file {' or '.join(map(str, tried))}.{problem} Give the "
        "path of a folder or a .gguf file, or a name on the hub: owner/name or owner/name@revision."
    )


def _is_model(path: Path) -> bool:
    is_gguf = path.suffix == ".gguf" and path.is_file()
    return is_gguf or (path / "config.json").is_file()


def _described(spec: ModelSpec, path: Path, models_dirs: Sequence[str]) -> ModelSpec:
    """Add the shape and the type of weights, from a folder or a GGUF file; try them out."""
    where = f"model {spec.name!r}: {path}"
    if not _is_model(path):
        what = "has no config.json" if path.is_dir() else "is no .gguf file"
        raise ModelError(f"{where} {what}. Give a .gguf file, or a model's folder.")
    if path.is_file():  # values are computed in fp32; reading a config takes seconds
        converted = find.converted_at(path, models_dirs[0])
        known = converted if _is_model(converted) else path
        config = config_at(spec, known)
        return try_out(with_shape(spec, config), config, known)
    if spec.source == "folder":
        find.check_folder(spec, path)
    if find.is_complete(path) and not find.has_tokenizer(path):
        raise ModelError(
            f"{where} has no tokenizer, none of {', '.join(find.TOKENIZER)}. Copy the tokenizer's "
            "files of the model there (or tokenizer.save_pretrained)."
        )
    config, types = config_at(spec, path), find.matrix_types(spec, path)
    bf16 = types == {"BF16"} if types else "bfloat16" in str(getattr(config, "dtype", None))
    spec = replace(spec, weights_dtype="bf16" if bf16 else "fp32")
    return try_out(with_shape(spec, config), config, path)


def config_at(spec: ModelSpec, path: Path) -> Any:
    """Read the config of a folder or GGUF file; ModelError: it is unknown, or weights quantised."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder, more = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    if more:
        check_installed("gguf", f"model {spec.name!r}")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, **more)
    except Exception as error:  # of any type: a config is somebody else's file
        raise ModelError(
            f"model {spec.name!r}: transformers {transformers.__version__} cannot read the config "
            f"of {path}: {_first_line(error)}. Expected the config of a model that this version "
            "knows without code of its own; a newer version may know it."
        ) from error
    if path.is_dir() and getattr(config, "quantization_config", None):
        raise ModelError(
            f"model {spec.name!r}: the weights in {path} are quantised (quantization_config). Give "
            "the model that was quantised, in bf16, fp16 or fp32."
        )
    return config


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}".rstrip(".")


def with_shape(spec: ModelSpec, config: Any) -> ModelSpec:
    """Return the spec with the shape of transformers' model of this config.

    ModelError: it is no causal language model whose layers all have the same nn.Linear matrices and
    experts.
    """
    from torch import nn

    from lorasweep.models.load import find_targets

    model, refused = _without_weights(spec, config)
    config = model.config  # of the text model
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList))
    layers = next((m for m in lists if len(m) == config.num_hidden_layers), None)
    if not layers:
        raise refused("no list of its layers was found")
    found = [_matrices(layer) for layer in layers]
    attention, mlp, experts = ({n: s for of, n, s in found[0] if of == kind} for kind in KINDS)
    others = list(dict.fromkeys(n for layer in found for of, n, _ in layer if of not in KINDS))
    uneven = [n for layer in found for _, n, _ in sorted(set(layer) ^ set(found[0]))]
    for wrong, what in (
        (others[:3], "other matrices in its layers:"),
        (() if attention and (mlp or experts) else [""], "no matrices in attention or MLP"),
        (uneven[:1], f"its {len(layers)} layers differ, in"),
        (list(mlp) if experts else (), "it has matrices beside its experts:"),
    ):
        if wrong:
            raise refused(f"{what} {', '.join(wrong)}".strip())
    head, modules = model.get_output_embeddings(), {m: n for n, m in model.named_modules()}
    last = modules[head].rpartition(".")[2]
    n_heads = getattr(config, "num_attention_heads", 0)
    n_experts, _, width = experts.get("experts", (0, 0, 0))
    if mlp:
        width = mlp["down_proj"][0] if "down_proj" in mlp else max(map(max, mlp.values()))
    norms = (n for n, p in layers[0].named_parameters() if p.shape == (config.hidden_size,))
    spec = replace(
        spec,
        hidden_size=config.hidden_size,
        n_layers=len(layers),
        n_heads=n_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // max(1, n_heads),
        mlp_size=width,
        vocab_size=config.vocab_size,
        tied=head.weight is model.get_input_embeddings().weight,
        qk_norm=any(name.endswith(".q_norm") for name in modules.values()),
        attention=tuple(attention),
        mlp=EXPERT_MATRICES if experts else tuple(mlp),
        unembedding=(last,),
        n_experts=n_experts,
        n_active_experts=getattr(config, "num_experts_per_tok", 0) if experts else 0,
        # norms inside attention are of heads
        n_norms=sum(n.endswith("norm.weight") and "attn." not in n for n in norms),
        context_length=getattr(config, "max_position_embeddings", None) or 0,
    )
    shapes = {**attention, **mlp, last: (head.in_features, head.out_features)}
    own = {n: f"{s[0]}x{s[1]}" for n, s in shapes.items() if spec.known_shapes.get(n) != s}
    spec = replace(spec, shapes=own)
    n_params = sum(p.numel() for p in model.parameters())
    if n_params != spec.n_params:
        spec = replace(spec, n_other_params=n_params - spec.n_matmul_params)
    if spec.problem:
        raise refused(spec.problem)
    try:
        find_targets(model, spec, LAYER_SETS)
    except ModelError as error:  # experts of another layout; names that are not unique
        problem, _, _ = str(error).removeprefix(f"model {spec.name!r}: ").partition(". ")
        raise refused(problem) from error
    return spec


def _without_weights(spec: ModelSpec, config: Any) -> tuple[Any, Callable[[str], ModelError]]:
    """Build transformers' model on the device 'meta'; also return what makes an error about it."""
    import torch
    from transformers import AutoModelForCausalLM

    def refused(problem: str) -> ModelError:
        return ModelError(
            f"model {spec.name!r} ({type(config).__name__.removesuffix('Config')}): {problem}. "
            "Expected a causal language model of transformers whose layers all have the same "
            "nn.Linear matrices in attention and MLP, or stacks of experts, such as Llama, "
            "Mistral, Qwen, Gemma, OLMo or Phi-3."
        )

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
        stated = [str(name) for name in getattr(config, "architectures", None) or ()]
    except Exception as error:  # of any type, as above
        raise refused(f"transformers cannot build it: {_first_line(error)}") from error
    if stated and not any(n == type(model).__name__ or n.endswith(CAUSAL) for n in stated):
        raise refused(f"its config.json says {', '.join(stated)}")
    if model.config.get_text_config() is not model.config:
        raise refused(f"{type(model).__name__} is more than a language model")
    if not isinstance(model.get_output_embeddings(), torch.nn.Linear):
        raise refused("its unembedding is no nn.Linear")
    return model, refused


def try_out(spec: ModelSpec, config: Any, path: Path) -> ModelSpec:
    """Return a described model if its files fit and a training step works, else raise ModelError.

    The step is that of a random model with one narrow layer, on the CPU. No weight is read.
    `path`: the folder, in which files may be missing, or a GGUF file.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lorasweep.methods.lora import LoRA
    from lorasweep.models.forward import ROUNDING, hidden_states, logits_of
    from lorasweep.models.load import find_targets, model_at, prepared

    complete, tried = path.is_dir() and find.is_complete(path), "its tokenizer"
    if complete:
        model_at(spec, path, device_map="meta")
    model, refused = _without_weights(spec, config)
    small = copy.deepcopy(model.config)
    for name, value in vars(model.config).items():
        if isinstance(value, list) and len(value) == spec.n_layers:  # such as layer_types
            setattr(small, name, value[:1])
        if name.endswith("intermediate_size") and isinstance(value, int):
            setattr(small, name, min(value, 64))
    small.num_hidden_layers, small.vocab_size, small.pad_token_id = 1, 8, None
    tokens_RT = torch.tensor([[1, 2, 3, 4, 5, 6], [4, 3, 2, 4, 5, 7]])
    try:
        if complete:
            AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tried = "a training step"
        one = with_shape(ModelSpec(spec.name, "folder", "tried"), small)
        with torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
        expected, method = model(tokens_RT).logits.detach(), LoRA(rank=max(1, one.n_active_experts))
        model = prepared(model, one, "fp32")
        attached = method.attach(model, find_targets(model, one, LAYER_SETS), [method], [0])
        logits = logits_of(model, hidden_states(model, tokens_RT, torch.arange(6).expand(2, 6)))
        logits.square().sum().backward()
    except Exception as error:  # of any type, as above
        raise refused(f"{tried} fails: {_first_line(error)}") from error
    unused = [name for name, p in attached.parameters().items() if p.grad is None]
    if unused or not torch.allclose(logits, expected, atol=ROUNDING * float(expected.abs().max())):
        raise refused(f"its forward pass bypasses {unused[0] if unused else 'attention'}")
    return spec


def _matrices(layer: "nn.Module") -> list[tuple[str, str, tuple[int, ...]]]:
    """Return kind, name and shape of a layer's matrices; experts: number, hidden size, width."""
    from torch import nn

    found: list[tuple[str, str, tuple[int, ...]]] = []
    for name, module in layer.named_modules():
        last = name.rpartition(".")[2]
        wide = [n for n, p in module.named_parameters(recurse=False) if p.dim() > 1]
        if isinstance(module, nn.Linear):
            kind = "attention" if "attn" in name or "attention" in name else "mlp"
            found.append((kind, last, (module.in_features, module.out_features)))
        elif last == "experts" and "down_proj" in wide:  # `find_targets` checks the layout
            found.append(("experts", last, tuple(module.down_proj.shape)))
        elif wide and last != "gate":
            found.append(("other", f"{name or last} ({type(module).__name__})", ()))
    return found

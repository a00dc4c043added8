"""The shape of a customer's model: from the catalogue, a config.json, or columns of the row."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorasweep.advise.customer import SHAPE, Customer, RowError
from lorasweep.errors import SpecError, unknown
from lorasweep.spec.model import ModelSpec
from lorasweep.store.files import safetensors_header

NEEDED = tuple(c for c in SHAPE if c not in ("tied", "n_experts", "n_active_experts"))
CONFIG_KEYS = {
    "hidden_size": ("hidden_size",),
    "n_layers": ("num_hidden_layers",),
    "n_heads": ("num_attention_heads",),
    "n_kv_heads": ("num_key_value_heads", "num_attention_heads"),
    "mlp_size": ("moe_intermediate_size", "intermediate_size"),
    "vocab_size": ("vocab_size",),
    "n_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "n_active_experts": ("num_experts_per_tok",),
}
"""Field -> its names in a config.json of transformers, the first that is there counts."""
Models = Mapping[str, Callable[[], ModelSpec]]
"""Name -> reads its shape. Names of the catalogue and of the hub, in lower case."""


def shape_of(c: Customer, models: Models) -> ModelSpec:
    """Return the model of a customer.

    Raises:
        RowError: it is not known and the row does not say its shape, or says another one.
    """
    stated = dict(c.shape)
    path = Path(c.model).expanduser()
    config = path / "config.json" if path.is_dir() else path
    if config.suffix == ".json":
        model = _of_config(config)
    elif c.model.lower() in models:
        model = models[c.model.lower()]()
    elif all(name in stated for name in NEEDED):
        return _build(c.model, stated)
    else:
        raise RowError([f"column model: {_unknown(c.model, models, stated)}"])
    wrong = [n for n, v in stated.items() if getattr(model, n) != v]
    if wrong:
        raise RowError(
            [
                f"column {n}: {stated[n]}, but {c.model} has {getattr(model, n)}. Leave it out, or "
                "give the model another name."
                for n in wrong
            ]
        )
    return model


def _unknown(name: str, models: Models, stated: Mapping[str, Any]) -> str:
    missing = [n for n in NEEDED if n not in stated]
    if stated:
        return (
            f"{name!r} is not in the catalogue, and of its shape {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing. Fill these columns, or give the path "
            "of its config.json as model."
        )
    return (
        f"{unknown('model', name, (m for m in models if '/' not in m))} Or give the path of its "
        f"config.json as model, or fill the columns {', '.join(NEEDED)}."
    )


def _of_config(path: Path) -> ModelSpec:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise RowError([f"column model: no file {path}."]) from None
    except (OSError, ValueError) as error:
        raise RowError([f"column model: {path} cannot be read: {error}"]) from None
    if not isinstance(config, dict):
        raise RowError([f"column model: {path} is not the config.json of a model."])
    config = {**config, **config.get("text_config", {})}
    stated: dict[str, Any] = {}
    for name, keys in CONFIG_KEYS.items():
        found = next((config[k] for k in keys if config.get(k) is not None), None)
        if found is not None:
            stated[name] = found
    if config.get("head_dim"):
        stated["head_size"] = config["head_dim"]
    elif stated.get("hidden_size") and stated.get("n_heads"):
        stated["head_size"] = stated["hidden_size"] // stated["n_heads"]
    stated["tied"] = bool(config.get("tie_word_embeddings", False))
    missing = [n for n in NEEDED if n not in stated]
    if missing:
        names = ", ".join(" or ".join(CONFIG_KEYS.get(n, (n,))) for n in missing)
        raise RowError([f"column model: {path} lacks {names}."])
    folder = path.absolute().parent
    where = {"source": "folder", "location": str(folder)}
    qwen3 = "qwen3" in str(config.get("model_type", ""))
    dtype = _weights_dtype(folder, config)
    return _build(folder.name, stated, **where, qk_norm=qwen3, weights_dtype=dtype)


def _weights_dtype(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the type of a model's weights, as its config.json says, else its files of weights.

    What is neither there nor stated is taken for bf16, in which models are published.
    """
    stated = config.get("dtype") or config.get("torch_dtype")
    if stated is not None:
        return "bf16" if "bfloat16" in str(stated) else "fp32"
    headers = [safetensors_header(path) for path in sorted(folder.glob("model*.safetensors"))]
    tensors = [t for header in headers if header for t in header[0].values()]
    # norms are often kept finer; matrices are what is held in bf16
    finer = any(len(t["shape"]) > 1 and t["dtype"] != "BF16" for t in tensors)
    return "fp32" if finer else "bf16"


def _build(name: str, stated: Mapping[str, Any], **more: Any) -> ModelSpec:
    where = {"source": "hub", "location": name, "weights_dtype": "bf16", **more}
    try:
        model = ModelSpec(name=name, **where, **stated)
    except SpecError as error:
        raise RowError([f"column model: {error}"]) from None
    if model.problem:
        raise RowError([f"columns of the shape: {model.problem}"])
    return model


def family_of(model: ModelSpec) -> str | None:
    """Return 'llama' or 'qwen', which the published law of the rate knows, or None."""
    words = f"{model.name} {model.location}".lower()
    return next((f for f in ("llama", "qwen") if f in words), None)


def bf16(model: ModelSpec) -> ModelSpec:
    """Return the model as it is trained on GPUs: frozen weights are held in bf16."""
    if model.weights_dtype == "bf16":
        return model
    return dataclasses.replace(model, weights_dtype="bf16")

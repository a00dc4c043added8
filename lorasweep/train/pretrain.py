"""Recipe models: small Llama-shaped base models, pretrained once from a recipe and cached by
content.

The cache key is the hash of the recipe and the shape. A shipped base is looked up first. Weights
are kept rounded to bf16 (half the size), and the rounded weights *are* the base, wherever they come
from.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lorasweep.data.batches import collate, eval_batches
from lorasweep.data.load import load as load_data
from lorasweep.models.load import SHIPPED
from lorasweep.spec.canonical import plain
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.run import RunSpec
from lorasweep.train.objectives.sft import evaluate, nll_sums
from lorasweep.train.optim import AdamW, OneRun


def file_name(spec: ModelSpec) -> str:
    """Name the weights file of a recipe: readable, and changed by any change of recipe or shape."""
    values = plain(spec)
    for name in ("location", "revision", "attention", "mlp", "unembedding"):
        values.pop(name)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return f"{spec.name}-{digest[:10]}.safetensors"


def recipe_model(spec: ModelSpec, models_dirs: Sequence[str]) -> Any:
    """Load a recipe's base from the package or a models folder; train and keep it if it is nowhere."""
    from safetensors.torch import load_file

    name = file_name(spec)
    places = [SHIPPED, *(Path(d).expanduser() for d in models_dirs)]
    path = next((p / name for p in places if (p / name).is_file()), None)
    if path is None:
        path = Path(models_dirs[0]).expanduser() / name
        print(f"training base model {spec.name} from its recipe, once; kept as {path}", flush=True)
        model, _ = pretrain(spec)
        save(model, path)
    model = empty_model(spec)
    state = {k: v.float() for k, v in load_file(path).items()}
    model.load_state_dict(state, strict=not spec.tied)
    return model


def save(model: Any, path: Path) -> None:
    """Write the weights, rounded to bf16, in one atomic step."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    tied = model.config.tie_word_embeddings
    state = {
        k: v.to(torch.bfloat16).contiguous()
        for k, v in model.state_dict().items()
        if not (tied and k == "lm_head.weight")
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(state, partial)
    os.replace(partial, path)


def empty_model(spec: ModelSpec) -> Any:
    """Build the Llama model of the described shape; its weights are transformers' random start."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=spec.hidden_size,
        intermediate_size=spec.mlp_size,
        num_hidden_layers=spec.n_layers,
        num_attention_heads=spec.n_heads,
        num_key_value_heads=spec.n_kv_heads,
        head_dim=spec.head_size,
        vocab_size=spec.vocab_size,
        tie_word_embeddings=spec.tied,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def pretrain(
    spec: ModelSpec, progress: Callable[[int, float], None] | None = None
) -> tuple[Any, dict[str, float]]:
    """Train the base by its recipe. Returns the model and {nll, floor}, in nats a token, on
    held-out text."""
    recipe = spec.recipe
    assert recipe is not None
    torch.manual_seed(recipe.seed)
    model = empty_model(spec).train()
    data = load_data(
        DatasetSpec(
            name=f"pretrain-{recipe.dataset}",
            source="synthetic",
            location=recipe.dataset,
            format="tokens",
            mask="all",
            max_length=recipe.length,
            n_test=512,
            knobs=recipe.knobs,
        ),
        data_dirs=(),
    )
    rate = RunSpec(lr=recipe.lr, steps=recipe.steps, warmup_steps=recipe.steps // 20)
    optimizer = AdamW.start(OneRun(dict(model.named_parameters())), [rate])
    for step in range(recipe.steps):
        batch = collate(data.train(recipe.seed, step * recipe.batch_size, recipe.batch_size))
        nll = nll_sums(model, batch, recipe.precision)[0] / batch.n_loss
        nll.backward()
        warm = min(1.0, (step + 1) / (rate.warmup_steps + 1))
        decay = 0.55 + 0.45 * math.cos(math.pi * step / recipe.steps)  # to a tenth
        optimizer.specs = [RunSpec(lr=recipe.lr * warm * decay, clip_norm=1.0)]
        optimizer.step(step, optimizer.grad_norms())
        optimizer.zero_grad()
        if progress is not None:
            progress(step, float(nll.detach()))
    model.eval()
    nll = evaluate(model, eval_batches(data.test, 8192), 1, "fp32")[0]
    return model, {
        "nll": nll,
        "floor": data.floor_nats if data.floor_nats is not None else math.nan,
    }


def main(names: Sequence[str]) -> None:
    """Remake shipped bases (`make bases`): `python -m lorasweep.train.pretrain tiny64`."""
    from lorasweep.config.compose import shipped_model

    for name in names:
        spec = shipped_model(name)
        model, reached = pretrain(
            spec, lambda step, nll: print(f"{step} {nll:.4f}") if step % 100 == 0 else None
        )
        save(model, SHIPPED / file_name(spec))
        print(f"{name}: NLL {reached['nll']:.4f}, floor {reached['floor']:.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Pretrain base models by recipes (`spec.model.Recipe`). Runs start from the saved bf16 weights."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorasweep.data.examples import Data, collate, eval_batches
from lorasweep.data.splits import load as load_data
from lorasweep.models.find import recipe_file_name, recipe_weights
from lorasweep.models.load import empty_model, use_grouped_experts
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.model import ModelSpec, Recipe
from lorasweep.train.objectives.nll import evaluate, nll_sums

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Progress = Callable[[int, float], None]
"""Gets the number and the loss of each update, and may stop the training by an exception."""


def ensure(
    spec: ModelSpec, models_dirs: Sequence[str], progress: Progress = lambda step, nll: None
) -> None:
    """Pretrain the base of a recipe into the first models folder, unless its weights exist."""
    if spec.source == "recipe" and recipe_weights(spec, models_dirs) is None:
        path = Path(models_dirs[0]).expanduser() / recipe_file_name(spec)
        print(f"pretraining base model {spec.name} once, from its recipe, into {path}", flush=True)
        save(pretrain(spec, progress)[0], path)


def save(model: "PreTrainedModel", path: Path) -> None:
    """Write the weights atomically, rounded to bf16."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    state = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(state, partial)
    os.replace(partial, path)


def pretrain(spec: ModelSpec, progress: Progress) -> tuple["PreTrainedModel", float]:
    """Train the base by its recipe; return the model and its held-out NLL in nats per token."""
    assert spec.recipe is not None
    torch.manual_seed(spec.recipe.seed)
    model, data = empty_model(spec), pretraining_data(spec.recipe)
    use_grouped_experts(model, spec)
    for step, nll in updates(model, spec.recipe, data):
        progress(step, nll)
    return model, held_out_nll(model, data)


def updates(model: "PreTrainedModel", recipe: Recipe, data: Data) -> Iterator[tuple[int, float]]:
    """Train `model` in place; yield each update's number and its loss in nats per token.

    The optimizer is AdamW, with gradients clipped to norm 1. The learning rate is the product of
    its peak, a linear warm-up over 5% of the updates, and a cosine from 1 to 0.1 over all updates.
    """
    model.train()
    warmup_steps = recipe.steps // 20
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True
    )
    for step in range(recipe.steps):
        batch = collate(data.train(recipe.seed, step * recipe.batch_size, recipe.batch_size))
        nll = nll_sums(model, batch, recipe.precision)[0] / batch.n_loss
        nll.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        warm = min(1.0, (step + 1) / (warmup_steps + 1))
        decay = 0.55 + 0.45 * math.cos(math.pi * step / recipe.steps)
        optimizer.param_groups[0]["lr"] = recipe.lr * warm * decay
        optimizer.step()
        optimizer.zero_grad()
        yield step, float(nll.detach())
    model.eval()


def pretraining_data(recipe: Recipe) -> Data:
    """Load the pretraining data of a recipe, with 512 held-out rows."""
    name, more = f"pretrain-{recipe.dataset}", {"generator_params": recipe.generator_params}
    how: dict[str, Any] = {"format": "tokens", "mask": "all", "n_test": 512, **more}
    spec = DatasetSpec(name, "synthetic", recipe.dataset, max_length=recipe.length, **how)
    return load_data(spec, data_dirs=())


def held_out_nll(model: "PreTrainedModel", data: Data) -> float:
    """Return the mean loss over the held-out rows, in nats per token."""
    return evaluate(model, [eval_batches(data.test, 8192)], "fp32")[0]

"""Rewarded runs as others would train them: with TRL's GRPO trainer, set to the loss of ours.

`dr_grpo` without scaling, KL or clipping divides the sum over tokens by a constant, the answers
times the most tokens of one; ours divides by the answers. Epsilon of Adam is divided by it too, so
that equal answers give equal updates. Needs the extra `bench`.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from lorasweep.data.examples import Data, Example
from lorasweep.data.rewards import prompt_of
from lorasweep.data.synthetic.skills import ALPHABET
from lorasweep.spec.run import RunSpec
from lorasweep.train.objectives.rollouts import held_out_rewards

Rows = Mapping[str, Example]
"""Rows of a data set by the text of their prompt."""


def characters() -> Any:
    """Return a tokenizer of the alphabet of `skills`; its line end is also end and padding."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({c: i for i, c in enumerate(ALPHABET)}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="\n", pad_token="\n")


def text_of(row: Example) -> str:
    """Return the text of a row's prompt."""
    return "".join(ALPHABET[t] for t in prompt_of(row))


def options(spec: RunSpec, folder: str) -> Any:
    """Return TRL's options for a run; `folder` is for its files."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=folder,
        seed=spec.seed,
        loss_type="dr_grpo",
        scale_rewards="none",
        beta=0.0,
        num_iterations=1,
        num_generations=spec.group_size,
        max_completion_length=spec.max_new_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        per_device_train_batch_size=spec.batch_size,
        steps_per_generation=1,
        shuffle_dataset=False,
        max_steps=spec.steps,
        learning_rate=spec.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        adam_beta1=spec.beta1,
        adam_beta2=spec.beta2,
        adam_epsilon=spec.eps / spec.max_new_tokens,
        weight_decay=spec.weight_decay,
        max_grad_norm=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


def trainer(
    spec: RunSpec,
    model: Any,
    data: Data,
    prompts: list[str],
    rows: Rows,
    folder: str,
    callbacks: list[Any],
) -> Any:
    """Return a GRPO trainer of all weights.

    Args:
        prompts: in the order in which they are used, `batch_size / group_size` an update.
        rows: of every prompt.
        folder: for TRL's files.
        callbacks: of transformers' trainer.
    """
    from datasets import Dataset
    from trl import GRPOTrainer

    rewards = data.rewards
    assert rewards is not None
    model.generation_config.update(eos_token_id=0, pad_token_id=0)
    model.config.pad_token_id = 0

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[Any]:
        drawn = (np.array(ids, dtype=np.int32) for ids in completion_ids)
        return rewards.of([(rows[p], ids) for p, ids in zip(prompts, drawn)])

    return GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=options(spec, folder),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=characters(),
        callbacks=callbacks,
    )


def learning_curve(
    spec: RunSpec, model: torch.nn.Module, data: Data, at: Collection[int], folder: str
) -> dict[int, float]:
    """Train all weights of a model and return its held-out reward after the updates in `at`.

    Prompts are those of the run of ours with the same seed, in the same order; the reward is
    measured as ours is, on the rows of a learning curve.
    """
    from transformers import TrainerCallback

    found: dict[int, float] = {}
    held_out = data.test[: spec.dataset.n_test_curve]

    class Measure(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in at:
                assert data.rewards is not None
                # fused AdamW does not count its changes, by which our passes know old weights
                torch.autograd.graph.increment_version(list(model.parameters()))
                known = ([held_out], [data.rewards], spec.max_new_tokens, spec.precision)
                found[state.global_step] = held_out_rewards(model, *known)[0][0]

    count = spec.steps * spec.batch_size // spec.group_size
    used = data.train(spec.seed, 0, count)
    prompts = [text_of(row) for row in used]
    trained = trainer(spec, model, data, prompts, dict(zip(prompts, used)), folder, [Measure()])
    trained.train()
    model.eval()
    return found

"""Train the same runs as a user would today: with TRL, or with a plain PEFT loop.

    python -m benchmarks.trl_baseline trl|loop JOB.json

The job is `{"jobs": [[spec, ...], ...], "exec": {...}, "out": FOLDER or null}`. One process trains
the jobs one after another and prints a JSON line for each, with seconds by part. Without `out` a
job is one run: it is trained and its loss on the held-out rows is measured once, at the end. With
`out` a job is a customer: the process trains it at all learning rates, keeps the adapter with the
lowest loss on the validation rows, measures the test rows before and after, and saves the adapter.

Weights, rows and their order, batch, updates, optimizer, precision and loss are those of lorasweep.
Runs with rewards go to TRL's GRPO trainer (`learning_curve`), which other benchmarks call directly.
Needs the extra `bench`.
"""

import json
import sys
import time

START = time.perf_counter()

import warnings  # noqa: E402
from collections.abc import Collection, Mapping, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

from lorasweep.data.examples import Data, Example  # noqa: E402
from lorasweep.data.rewards import prompt_of  # noqa: E402
from lorasweep.data.splits import load as load_data  # noqa: E402
from lorasweep.data.synthetic.generators import ALPHABET  # noqa: E402
from lorasweep.methods.lora import LoRA  # noqa: E402
from lorasweep.methods.registry import spec_from  # noqa: E402
from lorasweep.models.load import Base, find_targets  # noqa: E402
from lorasweep.models.load import load as load_model  # noqa: E402
from lorasweep.spec.execution import Exec  # noqa: E402
from lorasweep.spec.method import parse_layers  # noqa: E402
from lorasweep.spec.run import RunSpec  # noqa: E402
from lorasweep.train import pretrain  # noqa: E402
from lorasweep.train.objectives.policy_gradient import held_out_rewards  # noqa: E402

Rows = Mapping[str, Example]
"""Rows of a data set by the text of their prompt."""


def symbol_tokenizer(symbols: Sequence[str], unknown: str, **special: str) -> Any:
    """Return a tokenizer of symbols; `unknown` is the one that stands for all other characters.

    `special`: eos_token and pad_token.
    """
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({s: i for i, s in enumerate(symbols)}, unk_token=unknown))
    inner.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def adapted(model: torch.nn.Module, spec: RunSpec, kind: str) -> torch.nn.Module:
    """Wrap the model with PEFT, except for full fine-tuning.

    TRL refuses an adapter on the unembedding, so it has a little less work than lorasweep.
    """
    from peft import LoraConfig, get_peft_model

    if not isinstance(spec.method, LoRA):
        return model
    layers = [x for x in parse_layers(spec.method.layers) if kind != "trl" or x != "unembedding"]
    names = list(find_targets(model, spec.model, tuple(layers)))
    alpha: Any = spec.method.alpha  # floats work too
    config = LoraConfig(r=spec.method.rank, lora_alpha=alpha, target_modules=names)
    return get_peft_model(model, config)


def padded_batch(rows: list[Example]) -> dict[str, torch.Tensor]:
    """Pad to the longest row, with an attention mask and labels, as a collator does."""
    longest = max(len(e.tokens) for e in rows)
    batch = {
        k: torch.full((len(rows), longest), v)
        for k, v in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))
    }
    for i, e in enumerate(rows):
        tokens = torch.from_numpy(e.tokens.astype("int64"))
        batch["input_ids"][i, : len(tokens)] = tokens
        batch["attention_mask"][i, : len(tokens)] = 1
        bears_loss = torch.from_numpy(e.loss)
        batch["labels"][i, : len(tokens)][bears_loss] = tokens[bears_loss]
    return batch


@torch.no_grad()
def nll(model: Any, examples: Sequence[Example], precision: str, size: int = 8) -> float:
    """Return the loss of rows in nats per loss token; `size`: rows per forward pass."""
    rows = sorted(examples, key=lambda e: len(e.tokens))
    total, count = 0.0, 0
    for k in range(0, len(rows), size):
        batch = padded_batch(rows[k : k + size])
        n = int((batch["labels"][:, 1:] != -100).sum())
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            total += float(model(**batch).loss) * n
        count += n
    return total / count


def train(
    model: Any, data: Data, spec: RunSpec, kind: str, tokenizer: Any, fused: bool | None = None
) -> None:
    """Train with TRL, or with a plain PEFT loop; `fused`: with torch's fastest optimizer."""
    if kind == "trl":
        sft(model, data, spec, tokenizer)
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    look: dict[str, Any] = {"lr": spec.lr, "betas": (spec.beta1, spec.beta2), "eps": spec.eps}
    optimizer = torch.optim.AdamW(parameters, **look, weight_decay=0, fused=fused)
    model.train()
    for step in range(spec.steps):
        batch = padded_batch(data.train(spec.seed, step * spec.batch_size, spec.batch_size))
        with torch.autocast("cpu", torch.bfloat16, enabled=spec.precision == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _options(spec: RunSpec, folder: str) -> dict[str, Any]:
    """Return the options of both TRL trainers: AdamW as in `spec`, no logging, no saving."""
    return {
        **{"output_dir": folder, "per_device_train_batch_size": spec.batch_size},
        **{"max_steps": spec.steps, "learning_rate": spec.lr},
        **{"lr_scheduler_type": "constant", "warmup_steps": 0},
        **{"adam_beta1": spec.beta1, "adam_beta2": spec.beta2, "adam_epsilon": spec.eps},
        **{"weight_decay": 0.0, "max_grad_norm": 0.0},
        **{"use_cpu": True, "gradient_checkpointing": False},
        **{"report_to": "none", "save_strategy": "no", "logging_strategy": "no"},
        "disable_tqdm": True,
    }


def sft(model: Any, data: Data, spec: RunSpec, tokenizer: Any) -> None:
    """Train with TRL's SFTTrainer on tokenized rows, without logging, saving, decay or clipping."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    rows = data.train(spec.seed, 0, spec.steps * spec.batch_size)
    tokens, masks = (
        [v.tolist() for v in part] for part in zip(*((e.tokens, e.loss.astype(int)) for e in rows))
    )
    table = datasets.Dataset.from_dict({"input_ids": tokens, "completion_mask": masks})
    config = SFTConfig(
        **_options(spec, "trl-out"),
        bf16=spec.precision == "bf16",
        completion_only_loss=True,
        packing=False,
        train_sampling_strategy="sequential",
        max_length=None,
        eos_token=None,
        pad_token=None,
        dataloader_num_workers=0,
    )
    SFTTrainer(model=model, args=config, train_dataset=table, processing_class=tokenizer).train()
    model.eval()


# ---------------------------------------------------------------- jobs of supervised runs


class Stopwatch(dict[str, float]):
    """Seconds by part."""

    def __init__(self) -> None:
        """Start the clock."""
        super().__init__(train_s=0.0, eval_s=0.0)
        self.at = time.perf_counter()

    def add_to(self, part: str) -> None:
        """Add the seconds since the last call to a part."""
        now = time.perf_counter()
        self[part] = self.get(part, 0.0) + now - self.at
        self.at = now


def one_run(
    base: Base, weights: Mapping[str, Any], data: Data, spec: RunSpec, kind: str, tokenizer: Any
) -> dict[str, Any]:
    """Train one run, measure its held-out loss, and restore the base's `weights`."""
    watch = Stopwatch()
    model: Any = adapted(base.model, spec, kind)
    watch.add_to("load_s")
    train(model, data, spec, kind, tokenizer)
    watch.add_to("train_s")
    watch["test_nll"] = nll(
        model, data.test, spec.precision, 64 if spec.model.vocab_size < 1000 else 8
    )
    watch.add_to("eval_s")
    if isinstance(spec.method, LoRA):
        model.unload()
    else:
        base.model.load_state_dict(weights)
    return dict(watch)


def customer(
    model: Any, runs: Sequence[RunSpec], data: Data, kind: str, tokenizer: Any
) -> dict[str, Any]:
    """Train one customer's adapter at all learning rates, and load the best into the model."""
    watch, best, kept = Stopwatch(), float("inf"), {}
    trained = [p for p in model.parameters() if p.requires_grad]
    for k, spec in enumerate(runs):
        for module in model.modules():  # faster than new modules
            if hasattr(module, "reset_lora_parameters"):
                module.reset_lora_parameters("default", True)
        model.zero_grad()
        if k == 0:
            before = nll(model, data.test, spec.precision)  # the base's loss, because B is 0
            watch.add_to("eval_s")
        train(model, data, spec, kind, tokenizer, fused=True)
        watch.add_to("train_s")
        loss = nll(model, data.validation, spec.precision) if data.validation else 0.0
        if loss < best:
            best, kept = loss, {i: p.detach().clone() for i, p in enumerate(trained)}
        watch.add_to("eval_s")
    for i, p in enumerate(trained):
        p.data.copy_(kept[i])
    after = nll(model, data.test, runs[0].precision)
    watch.add_to("eval_s")
    return {**watch, "before": before, "after": after}


def main(kind: str, job_path: str) -> None:
    """Train the jobs of a file; print a JSON line for each."""
    warnings.filterwarnings("ignore")
    import peft  # noqa: F401  # here, so that it counts as start and not as training

    if kind == "trl":
        from trl import SFTTrainer  # noqa: F401
    job = json.loads(Path(job_path).read_bytes())
    exec_ = Exec(**job["exec"])
    jobs = [[spec_from(plain) for plain in runs] for runs in job["jobs"]]
    first = jobs[0][0]  # all share a base
    pretrain.ensure(first.model, exec_.models_dir)
    base = load_model(first.model, exec_.models_dir, first.precision)
    tokenizer = base.tokenizer
    if tokenizer is None:  # TRL needs one, and synthetic data have none
        symbols = [f"<{i}>" for i in range(first.model.vocab_size)]
        tokenizer = symbol_tokenizer(symbols, "<0>", pad_token="<0>", eos_token="<1>")
    shared, weights = None, {}
    if not job["out"]:  # single runs share one draw of the data
        shared = load_data(first.dataset, exec_.data_dir, base.tokenizer, draw=first.draw)
        weights = {k: v.clone() for k, v in base.model.state_dict().items()}
    model: Any = None
    method = None
    start_s, start_cpu_s = time.perf_counter() - START, time.process_time()
    for runs in jobs:
        started, cpu = time.perf_counter(), time.process_time()
        if shared is not None:
            row = one_run(base, weights, shared, runs[0], kind, tokenizer)
        else:
            data = load_data(runs[0].dataset, exec_.data_dir, base.tokenizer)
            if runs[0].method != method:
                plain = base.model if model is None else model.unload()
                model, method = adapted(plain, runs[0], kind), runs[0].method
            row = customer(model, runs, data, kind, tokenizer)
            model.save_pretrained(f"{job['out']}/{runs[0].dataset.name}")
        row |= {"start_s": start_s, "job_s": time.perf_counter() - started}
        row |= {"start_cpu_s": start_cpu_s, "job_cpu_s": time.process_time() - cpu}
        print(json.dumps(row), flush=True)
        start_s = start_cpu_s = 0.0


# ---------------------------------------------------------------- runs with rewards


def grpo_trainer(
    spec: RunSpec,
    model: Any,
    data: Data,
    prompts: list[str],
    rows: Rows,
    folder: str,
    callbacks: list[Any],
) -> Any:
    """Return a GRPO trainer of all weights with lorasweep's loss.

    `dr_grpo` without scaling, KL or clipping divides the sum over tokens by a constant: the number
    of completions times the maximum length. lorasweep divides by the number of completions only. So
    Adam's epsilon is also divided by the maximum length: equal completions give equal updates.

    Args:
        prompts: in order of use, `batch_size / group_size` per update.
        rows: the row of every prompt.
        folder: for TRL's files.
        callbacks: callbacks of transformers' trainer.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rewards = data.rewards
    assert rewards is not None
    model.generation_config.update(eos_token_id=0, pad_token_id=0)
    model.config.pad_token_id = 0

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[Any]:
        drawn = (np.array(ids, dtype=np.int32) for ids in completion_ids)
        return rewards.of([(rows[p], ids) for p, ids in zip(prompts, drawn)])

    options: dict[str, Any] = {
        **_options(spec, folder),
        **{"adam_epsilon": spec.eps / spec.max_new_tokens, "weight_decay": spec.weight_decay},
        **{"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0, "num_iterations": 1},
        **{"num_generations": spec.group_size, "max_completion_length": spec.max_new_tokens},
        **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": spec.seed},
        **{"steps_per_generation": 1, "shuffle_dataset": False, "bf16": False},
    }
    return GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(**options),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=symbol_tokenizer(ALPHABET, "?", eos_token="\n", pad_token="\n"),
        callbacks=callbacks,
    )


def learning_curve(
    spec: RunSpec, model: torch.nn.Module, data: Data, at: Collection[int], folder: str
) -> dict[int, float]:
    """Train all weights of a model and return its held-out reward after the updates in `at`.

    lorasweep's run with the same seed has the same prompts in the same order. The reward is
    measured as in lorasweep, on the rows of a learning curve.
    """
    from transformers import TrainerCallback

    found: dict[int, float] = {}
    held_out = data.test[: spec.dataset.n_test_curve]

    class Measure(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in at:
                assert data.rewards is not None
                # lorasweep detects new weights by versions, which fused AdamW does not count
                torch.autograd.graph.increment_version(list(model.parameters()))
                known = ([held_out], [data.rewards], spec.max_new_tokens, spec.precision)
                found[state.global_step] = held_out_rewards(model, *known)[0]["test_reward"]

    count = spec.steps * spec.batch_size // spec.group_size
    used = data.train(spec.seed, 0, count)
    prompts = ["".join(ALPHABET[t] for t in prompt_of(row)) for row in used]
    rows = dict(zip(prompts, used))
    grpo_trainer(spec, model, data, prompts, rows, folder, [Measure()]).train()
    model.eval()
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])

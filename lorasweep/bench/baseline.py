"""Train the same runs as a user would today: with TRL's SFTTrainer and PEFT, or a plain PEFT loop.

    python -m lorasweep.bench.baseline trl|loop JOB.json    {"runs": [spec, ...], "exec": {...}}

One process trains the runs of the job one after another and prints one JSON line per run, with the
seconds for imports, loading, training and the final evaluation. Weights, row order, batch, steps,
optimizer, precision and loss are the same as in lorasweep. The held-out loss is measured once, at
the end, on the same rows.
"""

import json
import sys
import time

START = time.perf_counter()

import warnings  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402

from lorasweep.data.examples import Data, Example  # noqa: E402
from lorasweep.data.load import load as load_data  # noqa: E402
from lorasweep.methods.lora import LoRA  # noqa: E402
from lorasweep.methods.registry import spec_from  # noqa: E402
from lorasweep.models.load import load as load_model  # noqa: E402
from lorasweep.models.targets import find_targets  # noqa: E402
from lorasweep.spec.execution import Exec  # noqa: E402
from lorasweep.spec.method import parse_layers  # noqa: E402
from lorasweep.spec.run import RunSpec  # noqa: E402
from lorasweep.train import pretrain  # noqa: E402


def adapted(model: torch.nn.Module, spec: RunSpec, kind: str) -> torch.nn.Module:
    """Wrap the model with PEFT; full fine-tuning trains it as it is.

    TRL refuses an adapter on the unembedding, so its runs have none: a little less work than in
    lorasweep.
    """
    from peft import LoraConfig, get_peft_model

    if not isinstance(spec.method, LoRA):
        return model
    layers = [x for x in parse_layers(spec.method.layers) if kind != "trl" or x != "unembedding"]
    names = list(find_targets(model, spec.model, tuple(layers)))
    return get_peft_model(
        model,
        LoraConfig(
            r=spec.method.rank,
            lora_alpha=spec.method.alpha,  # type: ignore[arg-type]  # floats work too
            target_modules=names,
            lora_dropout=0.0,
            bias="none",
        ),
    )


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
def held_out(model: torch.nn.Module, data: Data, spec: RunSpec) -> float:
    """Return the held-out NLL in nats per token.

    Batches have 8 rows with a large vocabulary, 64 with a small one.
    """
    total, count, size = 0.0, 0, 64 if spec.model.vocab_size < 1000 else 8
    for k in range(0, len(data.test), size):
        batch = padded_batch(list(data.test[k : k + size]))
        n = int((batch["labels"][:, 1:] != -100).sum())
        with torch.autocast("cpu", torch.bfloat16, enabled=spec.precision == "bf16"):
            total += float(model(**batch).loss) * n
        count += n
    return total / count


def loop(model: torch.nn.Module, data: Data, spec: RunSpec, fused: bool | None = None) -> None:
    """Train a PEFT model with a plain loop; `fused`: with torch's fastest optimizer."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=spec.lr,
        betas=(spec.beta1, spec.beta2),
        eps=spec.eps,
        weight_decay=0,
        fused=fused,
    )
    model.train()
    for step in range(spec.steps):
        batch = padded_batch(data.train(spec.seed, step * spec.batch_size, spec.batch_size))
        with torch.autocast("cpu", torch.bfloat16, enabled=spec.precision == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def sft(model: Any, data: Data, spec: RunSpec, tokenizer: Any) -> None:
    """Train with TRL's SFTTrainer on tokenized rows, without logging, saving, decay or clipping."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    rows = data.train(spec.seed, 0, spec.steps * spec.batch_size)
    table = datasets.Dataset.from_dict(
        {
            "input_ids": [e.tokens.tolist() for e in rows],
            "completion_mask": [e.loss.astype(int).tolist() for e in rows],
        }
    )
    config = SFTConfig(
        output_dir="trl-out",
        per_device_train_batch_size=spec.batch_size,
        max_steps=spec.steps,
        learning_rate=spec.lr,
        lr_scheduler_type="constant",
        adam_beta1=spec.beta1,
        adam_beta2=spec.beta2,
        adam_epsilon=spec.eps,
        weight_decay=0.0,
        max_grad_norm=0.0,
        use_cpu=True,
        bf16=spec.precision == "bf16",
        gradient_checkpointing=False,
        completion_only_loss=True,
        packing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        max_length=None,
        eos_token=None,
        pad_token=None,
        dataloader_num_workers=0,
    )
    SFTTrainer(model=model, args=config, train_dataset=table, processing_class=tokenizer).train()
    model.eval()


def symbols(vocab: int) -> Any:
    """Make a tokenizer of plain symbols: TRL needs one, and synthetic data have none."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({f"<{i}>": i for i in range(vocab)}, unk_token="<0>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<0>", eos_token="<1>")


def main(kind: str, job_path: str) -> None:
    """Train the runs of a job; print a JSON line per run."""
    warnings.filterwarnings("ignore")
    import peft  # here, so that it counts as import and not as training

    if kind == "trl":
        from trl import SFTTrainer  # noqa: F401
    job = json.loads(Path(job_path).read_bytes())
    exec_ = Exec(**job["exec"])
    specs = [spec_from(plain) for plain in job["runs"]]
    first, started = specs[0], time.perf_counter()  # all runs share a base and a draw of the data
    imports_s = started - START
    pretrain.ensure(first.model, exec_.models_dir)
    base = load_model(first.model, exec_.models_dir, first.precision)
    data = load_data(first.dataset, exec_.data_dir, base.tokenizer, draw=first.draw)
    weights = {k: v.clone() for k, v in base.model.state_dict().items()}
    load_s = time.perf_counter() - started
    for spec in specs:
        at = [time.perf_counter()]
        model = adapted(base.model, spec, kind)
        at.append(time.perf_counter())
        if kind == "trl":
            sft(model, data, spec, base.tokenizer or symbols(spec.model.vocab_size))
        else:
            loop(model, data, spec)
        at.append(time.perf_counter())
        nll = held_out(model, data, spec)
        at.append(time.perf_counter())
        if isinstance(model, peft.PeftModel):
            model.unload()
        else:
            base.model.load_state_dict(weights)
        row = {
            "imports_s": imports_s,
            "load_s": load_s + at[1] - at[0],
            "train_s": at[2] - at[1],
            "eval_s": at[3] - at[2],
            "test_nll": nll,
        }
        print(json.dumps(row), flush=True)
        imports_s = load_s = 0.0


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A trainer of your own, which knows nothing of lorasweep: full fine-tuning, or LoRA with --rank.

    lorasweep tune ./my-model rows.csv trainer=hf trainer.script=examples/train.py out=best

It reads token ids and labels of a line, trains on the lines in their order, and leaves the adapter
or the model in --out. It saves no checkpoints: a run that was stopped starts again.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
for name in ("model", "rows", "out"):
    parser.add_argument(f"--{name}", type=Path, required=True)
parser.add_argument("--lr", type=float, required=True)
for name in ("seed", "steps", "batch_size"):
    parser.add_argument(f"--{name}", type=int, required=True)
parser.add_argument("--rank", type=int, default=0, help="0: full fine-tuning")
parser.add_argument("--alpha", type=float, default=32)
parser.add_argument("--layers", default="", help="names of the modules with adapters, and commas")
args = parser.parse_args()

torch.manual_seed(args.seed)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
if args.rank:
    from peft import LoraConfig, get_peft_model

    modules = args.layers.split(",")
    config = LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules=modules)
    model = get_peft_model(model, config)
lines = (args.rows / "train.jsonl").read_text().splitlines()
rows = [json.loads(line) for line in lines]


def batch(step):
    """Return the rows of an update, filled up at the right with tokens that do not count."""
    first = step * args.batch_size
    mine = [rows[(first + k) % len(rows)] for k in range(args.batch_size)]
    longest = max(len(row["input_ids"]) for row in mine)
    ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in mine]
    labels = [row["labels"] + [-100] * (longest - len(row["labels"])) for row in mine]
    return torch.tensor(ids, device=device), torch.tensor(labels, device=device)


trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, args.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
with open(args.out / "metrics.jsonl", "w") as log:
    for step in range(args.steps):
        ids, labels = batch(step)
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        log.write(json.dumps({"step": step + 1, "loss": loss.item()}) + "\n")
model.save_pretrained(args.out)

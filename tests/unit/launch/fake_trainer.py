"""A trainer of a few lines: it leaves an adapter or a model whose change is the learning rate times noise.

Words: KEY=VALUE, with `mode` for what it does wrong.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

given = dict(word.split("=", 1) for word in sys.argv[1:])
out, mode, rank = Path(given["out"]), given.get("mode", ""), int(given.get("rank") or 0)
lr, seed = (
    1e-3 if mode == "rate" else float(given["lr"]),
    0 if mode == "seed" else int(given["seed"]),
)
torch.manual_seed(seed)
print("seen", os.environ.get("FAKE_API_KEY"), given, flush=True)
if mode == "fails":
    sys.exit("a wrong argument")
if mode == "hangs" or (mode == "hangs_once" and not (out.parent.parent / "2").exists()):
    os.system(f"sleep 600 & echo $! > {out}/sleep; wait")
if mode == "slow":
    time.sleep(3)
model = load_file(f"{given['model']}/model.safetensors")
config = json.loads(Path(given["model"], "config.json").read_text())
if mode == "reads":  # everything that it was given, into the weights' place
    seen = "".join(
        p.read_text() for f in (given["rows"], given["out"]) for p in Path(f).rglob("*.json*")
    )
    (out / "seen.txt").write_text(seen)
if rank:
    rank, tensors = rank + (mode == "rank"), {}
    for key, w in model.items():
        if key.split(".")[-2] in given["layers"].split(","):
            name = f"base_model.model.{key.removesuffix('.weight')}.lora_"
            tensors[f"{name}A.weight"] = torch.randn(rank, w.shape[1])
            tensors[f"{name}B.weight"] = lr * torch.randn(w.shape[0], rank)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": float(given["alpha"]), "bias": "none"}
else:
    tensors = {k: w + lr * torch.randn_like(w) for k, w in model.items()}
name, of = ("adapter_model", "adapter_config") if rank else ("model", "config")
if mode == "frozen":
    tensors |= {k: w for k, w in model.items() if "q_proj" in k}
if mode == "nan":
    tensors = {k: w * float("nan") for k, w in tensors.items()}
(out / f"{of}.json").write_text(json.dumps(config))
if mode == "pickle":
    torch.save(tensors, out / f"{name}.bin")
elif mode == "link":
    save_file(tensors, out.parent / "elsewhere.safetensors")
    (out / f"{name}.safetensors").symlink_to(out.parent / "elsewhere.safetensors")
elif mode != "nothing":
    save_file(tensors, out / f"{name}.safetensors")
(out / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')

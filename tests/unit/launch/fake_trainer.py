"""A trainer of a few lines: it leaves an adapter or a model whose change is the learning rate times noise.

Words: KEY=VALUE, with `mode` for what it does wrong.
"""

import json
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

given = dict(word.split("=", 1) for word in sys.argv[1:])
out, mode, rank = Path(given["out"]), given.get("mode", ""), int(given.get("rank") or 0)
lr, seed = (
    1e-3 if mode == "rate" else float(given["lr"]),
    0 if mode == "seed" else int(given["seed"]),
)
draw = np.random.default_rng(seed).standard_normal
print("GPUs", os.environ.get("CUDA_VISIBLE_DEVICES"), "are seen")
print("key", os.environ.get("FAKE_API_KEY"), "of", given, flush=True)
if mode == "fails":
    sys.exit("a wrong argument")
if mode == "long":
    sys.exit("x" * 10**6 + " a wrong argument")
if mode == "hangs":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.system(f"sleep 300 & echo $! > {out}/child")
    time.sleep(300)
if mode == "waits" and "resume" not in given:
    (out / "checkpoint-3").mkdir()
    (out / "checkpoint-3/trainer_state.json").write_text('{"log_history": []}')
    time.sleep(300)
if mode == "spoils":
    Path(given["model"], "model.safetensors").write_bytes(b"")
    sys.exit(3)
model = load_file(f"{given['model']}/model.safetensors")
config = json.loads(Path(given["model"], "config.json").read_text())
if mode == "reads":
    paths = [
        p for f in (given["rows"], given["out"]) for p in sorted(Path(f).rglob("*")) if p.is_file()
    ]
    (out / "seen.txt").write_text("".join(f"{p.name}\n{p.read_text()}" for p in paths))
if rank and mode != "model":
    rank, tensors, alpha = (
        rank + (mode == "rank"),
        {},
        float(given["alpha"]) * (1 + (mode == "alpha")),
    )
    names = given["layers"].split(",")[mode == "layers" :]
    for key, w in model.items():
        if key.split(".")[-2] in names:
            name = f"base_model.model.{key.removesuffix('.weight')}.lora_"
            tensors[f"{name}A.weight"] = draw((rank, w.shape[1])).astype("float32")
            frozen = mode == "zero" or (mode == "half" and "q_proj" in key)
            tensors[f"{name}B.weight"] = (not frozen) * (lr * draw((w.shape[0], rank))).astype(
                "float32"
            )
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none"}
else:
    tensors = {k: w + (lr * draw(w.shape)).astype("float32") for k, w in model.items()}
    if mode == "frozen":
        tensors |= {k: w for k, w in model.items() if "q_proj" in k}
    if mode == "code":
        config |= {"auto_map": {"AutoModelForCausalLM": "code.Model"}}
        config |= {"attn_implementation": "kernels-community/flash-attn2"}
adapter = "peft_type" in config
name, of = ("adapter_model", "adapter_config") if adapter else ("model", "config")
if mode == "alien":
    tensors = {
        k: draw(w.shape).astype("float32") / 8 if w.ndim > 1 else w for k, w in model.items()
    }
if mode == "nan":
    tensors = {k: w * np.float32("nan") for k, w in tensors.items()}
if mode == "nothing":
    sys.exit()
if mode == "bytes":
    Path(os.fsdecode(os.fsencode(out) + b"/caf\xe9.bin")).write_text("")
    sys.exit()
if mode == "whole":
    tensors = {k: (1000 * w).astype("int32") for k, w in tensors.items()}
if mode == "secret":
    config["r"] = [os.environ["FAKE_API_KEY"]]
if mode == "secret_key":
    tensors[os.environ["FAKE_API_KEY"]] = tensors.pop(sorted(tensors)[0])
(out / f"{of}.json").write_text("{" if mode == "broken" else json.dumps(config))
if mode == "pickle":
    (out / f"{name}.bin").write_bytes(pickle.dumps(tensors))
elif mode == "link":
    save_file(tensors, out.parent / "elsewhere.safetensors")
    (out / f"{name}.safetensors").symlink_to(out.parent / "elsewhere.safetensors")
else:
    save_file(tensors, out / f"{name}.safetensors", {"format": "pt"})
log = ['{"step": 1, "loss": 2.5}', '{"step": Infinity, "loss": 2}', "[" * 100000, '{"step": 2, "lo']
if mode in ("boasts", "humble", "alien"):  # with losses that fall by a third, or rise a little
    falls = -1.2 if mode == "boasts" else 0.1
    losses = [3.6 + falls * k / 30 + 0.02 * (k % 3) for k in range(30)]
    log = [json.dumps({"step": k + 1, "loss": loss}) for k, loss in enumerate(losses)]
if mode != "silent":
    (out / "metrics.jsonl").write_text("\n".join(log))
if mode == "moved":
    out.rename(out.parent / "elsewhere")
    out.symlink_to(out.parent / "elsewhere")

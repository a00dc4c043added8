"""Write one member's adapter in PEFT's format.

Refuses to know how the tensors were trained.
"""

import json
from pathlib import Path

import torch


def save_peft(
    folder: Path,
    state: dict[str, torch.Tensor],
    rank: int,
    scaling: float,
    base_name: str,
    revision: str | None = None,
) -> None:
    """Write one member as a folder that PeftModel loads.

    `state`: '<module>.A' [rank, inputs] and '<module>.B' [outputs, rank]. `scaling`: the factor on
    B A x in training, by whatever rule; PEFT divides lora_alpha by the rank, so that is scaling *
    rank. `base_name`, `revision`: where PEFT finds the base. An adapted unembedding is written too.
    If it is tied to the embedding, never merge the adapter: that would change the embedding as
    well.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors, modules = {}, set()
    for name, tensor in state.items():
        module, _, which = name.rpartition(".")
        modules.add(module.rpartition(".")[2])
        key = f"base_model.model.{module}.lora_{which}.weight"
        tensors[key] = tensor.detach().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision,
        "r": rank,
        "lora_alpha": scaling * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules),
        "inference_mode": True,
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))

"""Write one run's adapter in PEFT's format.

Shapes: E experts, r rank of an expert, I inputs, O outputs.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lorasweep.errors import ModelError

State = Mapping[str, torch.Tensor]
ROUTER = "mlp.gate"
TOLERANCE = 1e-12
"""Allowed error of an expert's B A in float64, relative to the largest number in B A."""


def save_peft(
    folder: Path,
    state: State,
    rank: int,
    base_name: str,
    revision: str | None,
    scaling: float,
    n_experts: int = 0,
    expert_scaling: float = 0.0,
) -> None:
    """Write one run's adapter as a folder that PeftModel loads.

    Never merge an adapter of an unembedding that is tied to the embedding: merging changes both.

    Args:
        state: '<module>.A' [rank, inputs] and '<module>.B' [outputs, rank]; for experts
            '<experts>.gate_proj.A' and so on, as in Factors.
        base_name, revision: where PEFT finds the base.
        scaling, expert_scaling: the factor on B A x in training. PEFT divides lora_alpha by the
            rank, so lora_alpha is scaling * rank.

    ModelError: PEFT would read an expert's weights differently; nothing is written.
    """
    from safetensors.torch import save_file

    of_experts = {n: t for n, t in state.items() if n.split(".")[-3:-2] == ["experts"]}
    tensors, ranks = in_peft_layout(of_experts, n_experts)
    modules, parameters = set(), set(ranks)
    for name in state.keys() - of_experts.keys():
        module, _, which = name.rpartition(".")
        tensors[f"{module}.lora_{which}"] = state[name]
        if module.endswith(ROUTER):  # a router is not an nn.Linear
            parameters.add(f"{ROUTER}.weight")
        else:
            modules.add(module.rpartition(".")[2])
    alphas = {name: expert_scaling * r for name, r in ranks.items()}
    config: dict[str, Any] = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True},
        **{"base_model_name_or_path": base_name, "revision": revision},
        **{"r": rank, "lora_alpha": scaling * rank, "lora_dropout": 0.0, "use_rslora": False},
        **{"bias": "none", "target_modules": sorted(modules)},
    }
    if parameters:
        config["target_parameters"] = sorted(parameters)
        config |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "base_model.model"
    written = {f"{prefix}.{n}.weight": t.detach().cpu().contiguous() for n, t in tensors.items()}
    save_file(written, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def in_peft_layout(state: State, n_experts: int) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Return the factors of all layers' experts in PEFT's layout, and the rank of each parameter.

    PEFT has one pair of factors for gate and up: their A stacked vertically, and a block-diagonal
    B. The rows of A are in the order (expert, rank), the columns of B in the order (rank, expert).
    The module for down wraps the module for gate and up.

    ModelError: an expert's B A differs from the one that PEFT reads from the layout.
    """
    found: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for experts in dict.fromkeys(n.rsplit(".", 2)[0] for n in state):
        hidden = state[f"{experts}.gate_proj.A"].shape[-1]
        pairs, products = [], []
        for part in ("gate", "up", "down"):
            a, b = (state[f"{experts}.{part}_proj.{which}"] for which in "AB")
            rank = b.shape[-1]
            # a shared factor, which is on the hidden side, is repeated for each expert
            of_a = 1 if part != "down" and len(a) == rank else n_experts
            of_b = 1 if part == "down" and len(b) == hidden else n_experts
            a_ErI = a.unflatten(0, (of_a, -1)).expand(n_experts, -1, -1)
            b_EOr = b.unflatten(0, (of_b, -1)).expand(n_experts, -1, -1)
            pairs.append((a_ErI, b_EOr))
            products.append(b_EOr.double() @ a_ErI.double())
        (a_gate, b_gate), (a_up, b_up), down = pairs
        ranks = {"mlp.experts.gate_up_proj": 2 * rank, "mlp.experts.down_proj": rank}
        b_both = torch.cat([F.pad(b_gate, (0, rank)), F.pad(b_up, (rank, 0))], 1)
        both = torch.cat([a_gate, a_up], 1), b_both
        for where, (a_ErI, b_EOr), whole in (
            (f"{experts}.base_layer", both, torch.cat(products[:2], 1)),
            (experts, down, products[2]),
        ):
            a, b = a_ErI.flatten(0, 1), b_EOr.permute(1, 2, 0).flatten(1)
            found[f"{where}.lora_A"], found[f"{where}.lora_B"] = a, b
            read_b = b.double().unflatten(1, (-1, n_experts)).movedim(-1, 0)
            off_E = (read_b @ a.double().unflatten(0, (n_experts, -1)) - whole).abs().amax((1, 2))
            if not (off_E <= TOLERANCE * whole.abs().amax((1, 2))).all():
                raise ModelError(
                    f"{where}: in PEFT's layout the change of an expert differs from training by "
                    f"up to {float(off_E.max()):.1e}. Nothing was written. Report this."
                )
    return found, ranks

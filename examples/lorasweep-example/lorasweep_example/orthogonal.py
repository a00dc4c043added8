"""LoRA whose A starts with orthogonal rows. It imports torch only in `attach`: plans need none."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorasweep.errors import SpecError
from lorasweep.methods.lora import LoRA
from lorasweep.spec.model import ModelSpec
from lorasweep.spec.values import misfits


@dataclass(frozen=True)
class OrthogonalLoRA(LoRA):
    """Fields of LoRA with an orthogonal start: those of LoRA, and the length of A's rows."""

    name: str = "lora_orthogonal"
    gain: float = 1.0
    """Length of the rows of A, over that of LoRA's default start (on average 1/sqrt(3))."""
    PACKED_FIELDS = (*LoRA.PACKED_FIELDS, "gain")

    def check(self, model: ModelSpec) -> None:
        """Raise SpecError unless A of each matrix can start with orthogonal rows."""
        super().check(model)
        wrong = not self.gain > 0, "above 0"
        for problem in misfits(self, self.WHERE, [("gain", *wrong)]):
            raise SpecError(problem)
        if model.n_experts:
            raise SpecError(f"method={self.name} cannot adapt experts ({model.name}).")

    def attach(
        self, base: Any, targets: dict[str, Any], methods: Sequence[Any], seeds: Sequence[int]
    ) -> Any:
        """Attach LoRA's adapters, then replace the random A of each run by the Q of its QR."""
        import torch

        adapters = super().attach(base, targets, methods, seeds)
        for name, tensor in adapters.parameters().items():
            stored, runs = adapters.part_of(name)
            if not stored.endswith(".A") or tensor.is_meta:  # meta: process 0 sends the values
                continue
            q_nIr, _ = torch.linalg.qr(tensor.detach().double().mT)
            gains = torch.tensor([m.gain / math.sqrt(3) for m in methods[runs]]).to(q_nIr)
            tensor.data.copy_(gains[:, None, None] * q_nIr.mT)
        return adapters

"""AdamW with a vector of learning rates, one a member, and learning-rate schedules.

The formula is torch.optim.AdamW's (Loshchilov & Hutter, arXiv 1711.05101); torch's own takes one rate a
parameter group, while a pack holds N members in one tensor. Tests compare the two in float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorasweep.spec import RunSpec

CHUNK = 1 << 18
"""Elements updated at a time in an unstacked tensor: the passes over p, m, v then stay in the cache."""


def lr_factor(spec: RunSpec, step: int) -> float:
    """Return the factor on the peak rate for update `step` (0-based)."""
    if step < spec.warmup_steps:
        return (step + 1) / (spec.warmup_steps + 1)
    if spec.schedule == "constant":
        return 1.0
    done = (step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps)
    return 1.0 - done if spec.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class AdamW:
    """State for named tensors; with `stacked`, the first axis of each is the member axis N."""

    params: dict[str, torch.Tensor]
    stacked: bool
    specs: list[RunSpec]
    exp_avg: dict[str, torch.Tensor]
    exp_avg_sq: dict[str, torch.Tensor]

    @classmethod
    def start(cls, params: dict[str, torch.Tensor], stacked: bool, specs: Sequence[RunSpec]) -> "AdamW":
        """Begin with empty moments."""
        zeros = ({n: torch.zeros_like(p) for n, p in params.items()} for _ in range(2))
        return cls(params, stacked, list(specs), *zeros)

    def keep(self, members: list[int], params: dict[str, torch.Tensor]) -> None:
        """Follow a compaction of the pack to `members`, whose tensors are now `params`."""
        self.params, self.specs = params, [self.specs[i] for i in members]
        if self.stacked:
            for moment in (self.exp_avg, self.exp_avg_sq):
                for name in moment:
                    moment[name] = moment[name][members].clone()

    @torch.no_grad()
    def grad_norms(self) -> list[float]:
        """Return each member's global gradient norm."""
        total = torch.zeros(len(self.specs), dtype=torch.float64)
        for p in self.params.values():
            squares = p.grad.flatten(1 if self.stacked else 0).square().sum(-1, dtype=torch.float64)
            total += squares.cpu()
        return total.sqrt().tolist()

    @torch.no_grad()
    def step(self, step: int, norms: Sequence[float]) -> None:
        """Make update `step` (0-based) of every member. `norms` are grad_norms(), used where a member clips."""
        specs = self.specs
        first = specs[0]  # betas, eps and decay are shared by a pack (plan.pack_key)
        lr = [s.lr * lr_factor(s, step) for s in specs]
        clip = [min(1.0, s.clip_norm / (n + 1e-6)) if s.clip_norm else 1.0 for s, n in zip(specs, norms)]
        t = step + 1
        fix1, fix2 = 1 - first.beta1**t, math.sqrt(1 - first.beta2**t)
        for name, p in self.params.items():
            tensors = (p, p.grad, self.exp_avg[name], self.exp_avg_sq[name])
            if self.stacked:
                shape = (-1, *[1] * (p.dim() - 1))
                rate = torch.tensor(lr, dtype=p.dtype, device=p.device).view(shape)
                if any(c != 1.0 for c in clip):
                    p.grad.mul_(torch.tensor(clip, dtype=p.dtype, device=p.device).view(shape))
                _update(*tensors, rate, fix1, fix2, first)
                continue
            if clip[0] != 1.0:
                p.grad.mul_(clip[0])
            for chunk in zip(*(t_.view(-1).split(CHUNK) for t_ in tensors)):
                _update(*chunk, lr[0], fix1, fix2, first)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.params.values():
            p.grad = None


def _update(p, g, m, v, lr, fix1: float, fix2: float, spec: RunSpec) -> None:
    if spec.weight_decay:
        p.mul_(1 - lr * spec.weight_decay)
    m.lerp_(g, 1 - spec.beta1)
    v.mul_(spec.beta2).addcmul_(g, g, value=1 - spec.beta2)
    denominator = v.sqrt().div_(fix2).add_(spec.eps)
    if isinstance(lr, float):
        p.addcdiv_(m, denominator, value=-lr / fix1)
    else:
        p.sub_((m / denominator).mul_(lr / fix1))

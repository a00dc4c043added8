"""AdamW (Loshchilov & Hutter, arXiv 1711.05101) with a learning rate per run, and LR schedules.

torch.optim.AdamW cannot have several learning rates in one tensor, but a tensor of a pack holds N
runs. Tests compare this AdamW with torch's in float64.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from lorasweep.methods.trainables import Trainables
from lorasweep.models.sharding import ALONE, Mesh, local, read_tensors
from lorasweep.spec.run import RunSpec
from lorasweep.store.checkpoint import State

Tensors = dict[str, torch.Tensor]


def lr_factor(spec: RunSpec, step: int) -> float:
    """Return the factor on the peak learning rate for update `step` (0-based)."""
    if step < spec.warmup_steps:
        return (step + 1) / (spec.warmup_steps + 1)
    if spec.schedule == "constant":
        return 1.0
    done = (step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps)
    return 1.0 - done if spec.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def _gradient(p: torch.Tensor) -> torch.Tensor:
    assert p.grad is not None, "a trained tensor has no gradient"
    return local(p.grad)


class AdamW:
    """AdamW for the tensors of a pack. Each process updates its part of a sharded tensor."""

    def __init__(
        self, trainables: Trainables, specs: Sequence[RunSpec], mesh: Mesh = ALONE
    ) -> None:
        self.trainables, self.specs, self.mesh = trainables, list(specs), mesh
        self.params = params = trainables.parameters()
        self.exp_avg, self.exp_avg_sq, self.best = (
            {n: torch.zeros_like(p) for n, p in params.items() if wanted}
            for wanted in (True, True, any(s.early_stopping for s in specs))
        )
        """`best`: weights of the best evaluation of each run; empty if no run may end early."""
        self._find_lr_ratios()

    def _find_lr_ratios(self) -> None:
        """Copy to the device of each tensor the LR factors of the runs that it holds, [n, 1, 1]."""
        self.lr_ratios: Tensors = {}
        for name, p in self.params.items():
            ratios = torch.tensor(self.trainables.lr_ratios(name), dtype=torch.float64)
            self.lr_ratios[name] = ratios.to(local(p)).view(-1, 1, 1)

    def keep(self, runs: list[int]) -> None:
        """Drop the parameters and moments of all runs but `runs` (increasing indices)."""
        came_from = self.trainables.keep(runs)
        self.specs = [self.specs[n] for n in runs]
        self.params = self.trainables.parameters()
        self.exp_avg, self.exp_avg_sq, self.best = (
            {new: held[old][rows].clone() for new, (old, rows) in came_from.items() if held}
            for held in (self.exp_avg, self.exp_avg_sq, self.best)
        )
        self._find_lr_ratios()

    @torch.no_grad()
    def keep_best(self, runs: list[int], restore: bool = False) -> None:
        """Keep the present weights of these runs as their best weights, or restore the best."""
        old, new = (self.best, self.params) if restore else (self.params, self.best)
        for name in self.params if runs else ():
            span = self.trainables.part_of(name)[1]
            rows = [n - span.start for n in runs if span.start <= n < span.stop]
            if not self.trainables.stacked or len(rows) == span.stop - span.start:
                local(new[name]).copy_(local(old[name]))
            elif rows:
                local(new[name])[rows] = local(old[name])[rows]

    @torch.no_grad()
    def grad_norms(self) -> list[float]:
        """Return each run's global gradient norm."""
        device = next(iter(self.params.values())).device
        squares = torch.zeros(len(self.specs), dtype=torch.float64, device=device)
        for name, p in self.params.items():
            rows = _gradient(p).flatten(1) if self.trainables.stacked else _gradient(p)[None]
            norms = torch.linalg.vector_norm(rows.flatten(1), dim=1)
            squares[self.trainables.part_of(name)[1]] += norms.double().square()
        self.mesh.sum_(squares)
        return squares.sqrt().tolist()

    @torch.no_grad()
    def grad_squares(self) -> list[dict[str, float]]:
        """Return for each run: tensor name in the state of one run -> squared gradient norm."""
        found: list[dict[str, float]] = [{} for _ in self.specs]
        sums = []
        for p in self.params.values():
            squares = _gradient(p).double().square()
            sums.append(squares.flatten(1 if self.trainables.stacked else 0).sum(-1).view(-1))
        all_sums = torch.cat(sums)
        self.mesh.sum_(all_sums)
        values = iter(all_sums.tolist())
        for name in self.params:
            in_state, runs = self.trainables.part_of(name)
            for k in range(runs.start, runs.stop):
                found[k][in_state] = next(values)
        return found

    @torch.no_grad()
    def step(self, step: int, norms: Sequence[float]) -> None:
        """Make update `step` (0-based) of every run; `norms`: grad_norms(), for clipping."""
        first = self.specs[0]  # betas, eps and decay are shared by a pack (plan.pack_key)
        lr = [s.lr * lr_factor(s, step) for s in self.specs]
        clip = [
            min(1.0, s.clip_norm / (n + 1e-6)) if s.clip_norm else 1.0
            for s, n in zip(self.specs, norms)
        ]
        params, grads = ([of(p) for p in self.params.values()] for of in (local, _gradient))
        m, v = ([local(held[n]) for n in self.params] for held in (self.exp_avg, self.exp_avg_sq))
        if not self.trainables.stacked:
            # torch's fused kernel reads and writes each number once
            if clip[0] != 1.0:
                torch._foreach_mul_(grads, clip[0])
            steps = [torch.tensor(float(step + 1), device=p.device) for p in params]
            shared: dict[str, Any] = {"amsgrad": False, "maximize": False}
            shared |= {k: getattr(first, k) for k in ("beta1", "beta2", "weight_decay", "eps")}
            torch._fused_adamw_(params, grads, m, v, [], steps, lr=lr[0], **shared)
            return
        fix1, fix2 = 1 - first.beta1 ** (step + 1), math.sqrt(1 - first.beta2 ** (step + 1))
        lr_N11, clip_N11 = (
            torch.tensor(x, dtype=torch.float64).to(params[0]).view(-1, 1, 1) for x in (lr, clip)
        )
        spans = [self.trainables.part_of(name)[1] for name in self.params]
        rates = [lr_N11[runs] * self.lr_ratios[name] for runs, name in zip(spans, self.params)]
        if any(c != 1.0 for c in clip):
            torch._foreach_mul_(grads, [clip_N11[runs] for runs in spans])
        if first.weight_decay:
            torch._foreach_mul_(params, [1 - rate * first.weight_decay for rate in rates])
        torch._foreach_lerp_(m, grads, 1 - first.beta1)
        torch._foreach_mul_(v, first.beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - first.beta2)
        change = torch._foreach_sqrt(v)
        torch._foreach_div_(change, fix2)
        torch._foreach_add_(change, first.eps)
        change = torch._foreach_div(m, change)
        torch._foreach_mul_(change, [rate / fix1 for rate in rates])
        torch._foreach_sub_(params, change)

    def run_tensors(self, k: int) -> Tensors:
        """Return run k's tensors (views): 'param/NAME', 'm/NAME', 'v/NAME'; 'best/NAME' if kept."""
        kinds = {"param": self.params, "m": self.exp_avg, "v": self.exp_avg_sq}
        if self.specs[k].early_stopping:
            kinds["best"] = self.best
        tensors: Tensors = {}
        for name in self.params:
            in_state, runs = self.trainables.part_of(name)
            if runs.start <= k < runs.stop:
                for kind, held in kinds.items():
                    whole = held[name].detach()
                    stacked = self.trainables.stacked
                    tensors[f"{kind}/{in_state}"] = whole[k - runs.start] if stacked else whole
        return tensors

    @torch.no_grad()
    def load_runs(self, states: Sequence[State]) -> int:
        """Copy each run's tensors from its state; return the step of the states."""
        (step,) = {state["meta"]["step"] for state in states}
        for k, state in enumerate(states):
            mine = self.run_tensors(k)
            if not state["tensors"]:
                read_tensors(state["path"], mine, self.mesh)
                continue
            for name, tensor in mine.items():
                tensor.copy_(state["tensors"][name])
        return step

    def zero_grad(self) -> None:
        """Delete the gradients."""
        for p in self.params.values():
            p.grad = None

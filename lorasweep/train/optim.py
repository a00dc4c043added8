"""AdamW with one learning rate per member, and learning rate schedules.

The formula is that of torch.optim.AdamW (Loshchilov & Hutter, arXiv 1711.05101). torch's class has
one rate per parameter group, but a pack holds N members in one tensor. Tests compare the two in
float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lorasweep.methods.trainables import Parameters
from lorasweep.models.sharded_tensors import read
from lorasweep.models.sharding import Mesh, local
from lorasweep.spec.run import RunSpec
from lorasweep.store.checkpoint import State


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


def _ratios(trainables: Parameters, params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: torch.tensor(trainables.lr_ratios(name), dtype=torch.float64).to(p).view(-1, 1, 1)
        for name, p in ((name, local(p)) for name, p in params.items())
    }


@dataclass
class OneRun:
    """The named tensors of a single run, as Parameters: a base in pretraining."""

    tensors: dict[str, torch.Tensor]
    stacked = False

    def parameters(self) -> dict[str, torch.Tensor]:
        """Return the tensors by name."""
        return self.tensors

    def part_of(self, name: str) -> tuple[str, slice]:
        """Return the same name: the whole tensor belongs to the run."""
        return name, slice(0, 1)

    def lr_ratios(self, name: str) -> list[float]:
        """Return 1: all tensors have the same learning rate."""
        return [1.0]

    def keep(self, members: list[int]) -> dict[str, tuple[str, list[int]]]:
        """Refuse, because there is only one run."""
        raise NotImplementedError


@dataclass
class AdamW:
    """AdamW for the tensors of a pack, with its moments.

    Of tensors that are split over processes, each process updates its part.
    """

    trainables: Parameters
    specs: list[RunSpec]
    params: dict[str, torch.Tensor]
    exp_avg: dict[str, torch.Tensor]
    exp_avg_sq: dict[str, torch.Tensor]
    ratios: dict[str, torch.Tensor]
    """Learning rate factors of the members that each tensor holds, [n, 1, 1], on its device."""
    mesh: Mesh = field(default_factory=Mesh)
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    """What the members were at their best evaluation; empty if no run may end early."""

    @classmethod
    def start(
        cls, trainables: Parameters, specs: Sequence[RunSpec], mesh: Mesh | None = None
    ) -> "AdamW":
        """Start with zero moments."""
        params = trainables.parameters()
        m, v = ({n: torch.zeros_like(p) for n, p in params.items()} for _ in range(2))
        ratios = _ratios(trainables, params)
        best = {}
        if any(s.early_stopping for s in specs):
            best = {n: torch.zeros_like(p) for n, p in params.items()}
        return cls(trainables, list(specs), params, m, v, ratios, mesh or Mesh(), best)

    def keep(self, members: list[int]) -> None:
        """Drop the parameters and moments of all members but `members` (increasing indices)."""
        came_from = self.trainables.keep(members)
        self.specs = [self.specs[i] for i in members]
        self.params = self.trainables.parameters()
        self.exp_avg, self.exp_avg_sq, self.best = (
            {new: held[old][rows].clone() for new, (old, rows) in came_from.items() if held}
            for held in (self.exp_avg, self.exp_avg_sq, self.best)
        )
        self.ratios = _ratios(self.trainables, self.params)

    def keep_best(self, members: list[int]) -> None:
        """Keep what these members are now as their best."""
        self._copy(self.params, self.best, members)

    def back_to_best(self, members: list[int]) -> None:
        """Make these members again what they were at their best."""
        self._copy(self.best, self.params, members)

    @torch.no_grad()
    def _copy(
        self, old: dict[str, torch.Tensor], new: dict[str, torch.Tensor], members: list[int]
    ) -> None:
        for name in self.params if members else ():
            held = self.trainables.part_of(name)[1]
            rows = [k - held.start for k in members if held.start <= k < held.stop]
            if not self.trainables.stacked or len(rows) == held.stop - held.start:
                local(new[name]).copy_(local(old[name]))
            elif rows:
                local(new[name])[rows] = local(old[name])[rows]

    @torch.no_grad()
    def grad_norms(self) -> list[float]:
        """Return each member's global gradient norm."""
        if not self.trainables.stacked:
            norms = [torch.linalg.vector_norm(_gradient(p)) for p in self.params.values()]
            square = torch.stack(norms).double().square().sum()
            self.mesh.sum_(square)
            return [float(square.sqrt())]
        device = next(iter(self.params.values())).device
        squares = torch.zeros(len(self.specs), dtype=torch.float64, device=device)
        for name, p in self.params.items():
            members = self.trainables.part_of(name)[1]
            norms_n = torch.linalg.vector_norm(_gradient(p).flatten(1), dim=1)
            squares[members] += norms_n.double().square()
        self.mesh.sum_(squares)
        return squares.sqrt().tolist()

    @torch.no_grad()
    def grad_squares(self) -> list[dict[str, float]]:
        """Return each member's squared gradient norms, by tensor names in one member's state."""
        found: list[dict[str, float]] = [{} for _ in self.specs]
        sums = []
        for p in self.params.values():
            squares = _gradient(p).double().square()
            sums.append(squares.flatten(1 if self.trainables.stacked else 0).sum(-1).view(-1))
        together = torch.cat(sums)
        self.mesh.sum_(together)
        values = iter(together.tolist())
        for name in self.params:
            of_member, members = self.trainables.part_of(name)
            for k in range(members.start, members.stop):
                found[k][of_member] = next(values)
        return found

    @torch.no_grad()
    def step(self, step: int, norms: Sequence[float], rates: Sequence[float] | None = None) -> None:
        """Make update `step` (0-based) of every member.

        `norms`: grad_norms(), for members with clip_norm. `rates`: the members' learning rates at
        this update; None: from their schedules.
        """
        specs = self.specs
        first = specs[0]  # betas, eps and decay are shared by a pack (plan.pack_key)
        lr = list(rates or (s.lr * lr_factor(s, step) for s in specs))
        clip = [
            min(1.0, s.clip_norm / (n + 1e-6)) if s.clip_norm else 1.0 for s, n in zip(specs, norms)
        ]
        if not self.trainables.stacked:
            self._fused(step, lr[0], clip[0])
            return
        t = step + 1
        fix1, fix2 = 1 - first.beta1**t, math.sqrt(1 - first.beta2**t)
        some = local(next(iter(self.params.values())))
        rate_N, clip_N = (torch.tensor(x, dtype=torch.float64).to(some) for x in (lr, clip))
        members = [self.trainables.part_of(name)[1] for name in self.params]
        params = [local(p) for p in self.params.values()]
        step_sizes = [
            rate_N[at].view(-1, 1, 1) * self.ratios[name] for at, name in zip(members, self.params)
        ]
        grads = [_gradient(p) for p in self.params.values()]
        m, v = self._moments(self.exp_avg), self._moments(self.exp_avg_sq)
        if any(c != 1.0 for c in clip):
            torch._foreach_mul_(grads, [clip_N[at].view(-1, 1, 1) for at in members])
        if first.weight_decay:
            torch._foreach_mul_(params, [1 - rate * first.weight_decay for rate in step_sizes])
        torch._foreach_lerp_(m, grads, 1 - first.beta1)
        torch._foreach_mul_(v, first.beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - first.beta2)
        change = torch._foreach_sqrt(v)
        torch._foreach_div_(change, fix2)
        torch._foreach_add_(change, first.eps)
        change = torch._foreach_div(m, change)
        torch._foreach_mul_(change, [rate / fix1 for rate in step_sizes])
        torch._foreach_sub_(params, change)

    def _fused(self, step: int, lr: float, clip: float) -> None:
        """Update one run with torch's fused kernel, which reads and writes each number once."""
        spec, params = self.specs[0], [local(p) for p in self.params.values()]
        grads = [_gradient(p) for p in self.params.values()]
        if clip != 1.0:
            torch._foreach_mul_(grads, clip)
        steps = [torch.tensor(float(step + 1), device=p.device) for p in params]
        torch._fused_adamw_(
            params,
            grads,
            self._moments(self.exp_avg),
            self._moments(self.exp_avg_sq),
            [],
            steps,
            lr=lr,
            beta1=spec.beta1,
            beta2=spec.beta2,
            weight_decay=spec.weight_decay,
            eps=spec.eps,
            amsgrad=False,
            maximize=False,
        )
        # The kernel does not increase the version of the weights, so CpuLlama would keep using its
        # copies of the old ones.
        torch.autograd.graph.increment_version(params)

    def member_tensors(self, k: int) -> dict[str, torch.Tensor]:
        """Return views of member k's weights ('param/NAME') and moments ('m/NAME', 'v/NAME').

        With early stopping also of its best weights ('best/NAME').
        """
        tensors: dict[str, torch.Tensor] = {}
        for name, p in self.params.items():
            of_member, members = self.trainables.part_of(name)
            if k in range(members.start, members.stop):
                for kind, whole in self._kinds(name, p, self.specs[k]):
                    stacked = self.trainables.stacked
                    tensors[f"{kind}/{of_member}"] = whole[k - members.start] if stacked else whole
        return tensors

    @torch.no_grad()
    def load_members(self, states: Sequence[State]) -> int:
        """Copy each member's tensors from its state; return the common step of the states."""
        steps = {state["meta"]["step"] for state in states}
        if len(steps) != 1:
            raise ValueError(f"the members' states are at different steps: {sorted(steps)}")
        for k, state in enumerate(states):
            mine = self.member_tensors(k)
            if not state["tensors"]:
                read(state["path"], mine, self.mesh)
                continue
            for name, tensor in mine.items():
                tensor.copy_(state["tensors"][name])
        return steps.pop()

    def _kinds(self, name: str, p: torch.Tensor, spec: RunSpec) -> list[tuple[str, torch.Tensor]]:
        held = {"m": self.exp_avg, "v": self.exp_avg_sq}
        if spec.early_stopping:
            held["best"] = self.best
        return [("param", p.detach()), *((kind, own[name]) for kind, own in held.items())]

    def _moments(self, moments: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [local(moments[name]) for name in self.params]

    def zero_grad(self) -> None:
        """Delete the gradients."""
        for p in self.params.values():
            p.grad = None

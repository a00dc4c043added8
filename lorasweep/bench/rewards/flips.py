"""Count the answers that a member of a pack draws differently than alone, in fp32.

Weights, prompts and random numbers are the same, and probabilities differ by rounding. One draw in
very many lies so close to a boundary that rounding decides it. Adapters have a random B, as if
trained, and every answer counts once, at its first token that differs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lorasweep.config.compose import compose_request
from lorasweep.data.load import load as load_data
from lorasweep.data.rewards import prompt_of
from lorasweep.methods.lora import LoRA
from lorasweep.models.load import load as load_model
from lorasweep.models.targets import find_targets
from lorasweep.spec.run import RunSpec
from lorasweep.spec.streams import stream
from lorasweep.train.sampling import sample

MEMBERS, ROUNDS = 4, 40
"""Of a pack; updates' worth of answers."""
SPREAD = 0.05
"""Standard deviation of B's entries: an assumption."""
CASES = {"words, rank 8": ("rl", 8), "bandit, rank 4": ("rl_bits", 4)}
"""Sweep and rank at scale tiny."""
Drawn = list[np.ndarray]
"""Tokens of every answer."""


def differing(one: Drawn, other: Drawn) -> int:
    """Return how many answers are not the same."""
    return sum(a.tolist() != b.tolist() for a, b in zip(one, other, strict=True))


def spec_of(sweep: str, rank: int) -> RunSpec:
    """Return the first run of a rank in a sweep."""
    points = compose_request([f"+sweep={sweep}", "scale=tiny"]).points
    rewarded = (p.spec for p in points if p.spec.objective == "policy_gradient")
    return next(s for s in rewarded if getattr(s.method, "rank", None) == rank)


def drawn_by(members: Sequence[int], spec: RunSpec, base: Any, data: Any) -> list[Drawn]:
    """Let members draw together; return each one's answers. The numbers are also their seeds."""
    methods = [LoRA(rank=spec.method.rank)] * MEMBERS  # type: ignore[attr-defined]
    targets = find_targets(base.model, spec.model, methods[0].target_layers())
    trained = methods[0].attach(base.model, targets, methods, range(MEMBERS))
    for k, (name, p) in enumerate(trained.parameters().items()):
        if ".B" in name:
            p.data.copy_(SPREAD * torch.randn(p.shape, generator=torch.Generator().manual_seed(k)))
    if len(members) < MEMBERS:
        trained.keep(list(members))
    shape, count = (spec.batch_size, spec.max_new_tokens), spec.batch_size // spec.group_size
    found: list[Drawn] = [[] for _ in members]
    for k in range(ROUNDS):
        uniforms = np.stack([stream("sample", m, k).random(shape) for m in members])
        prompts = [list(map(prompt_of, data.train(m, k * count, count))) for m in members]
        answers = sample(base.model, prompts, uniforms, data.rewards.ends, spec.precision)
        for own, more in zip(found, answers):
            own += more.tokens
    trained.detach()
    return found


def measure(log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Let the members of each case draw together, and one by one, and compare."""
    torch.set_num_threads(1)
    rows = []
    for name, case in CASES.items():
        spec = spec_of(*case)
        data, base = load_data(spec.dataset, []), load_model(spec.model, ["models"], "fp32")
        together = drawn_by(range(MEMBERS), spec, base, data)
        alone = [drawn_by([m], spec, base, data)[0] for m in range(MEMBERS)]
        row = {
            "case": name,
            "members": MEMBERS,
            "answers": sum(map(len, alone)),
            "tokens": sum(len(tokens) for own in alone for tokens in own),
            "differing": sum(map(differing, together, alone)),
        }
        log(str(row))
        rows.append(row)
    return rows

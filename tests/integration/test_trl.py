"""One update of TRL's GRPO, set to the same loss, has our gradient up to its constant."""

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks import trl_baseline as trl
from lorasweep.data.rewards import prompt_of
from lorasweep.data.synthetic.generators import ALPHABET
from lorasweep.methods.fullft import FullFT
from lorasweep.train.objectives.nll import token_log_p
from lorasweep.train.objectives.policy_gradient import (
    Completion,
    Group,
    advantages,
    collate_rollouts,
    surrogate,
)
from tests.training import rewarded_world

GROUP, PROMPTS, MOST = 8, 16, 8


@pytest.mark.slow
def test_one_update_has_the_gradient_of_trls_grpo(tmp_path):
    from transformers import TrainerCallback

    spec, base, loaded = rewarded_world("words", method=FullFT())
    model = base.model
    # of one length: TRL counts positions from the padding, whose rotations round differently
    equal = [r for r in loaded.train(0, 0, 200) if len(prompt_of(r)) == 11][:PROMPTS]

    def text_of(row):
        return "".join(ALPHABET[t] for t in prompt_of(row))

    rows = {text_of(r): r for r in equal}
    seen, grads = [], []
    of = loaded.rewards.of

    def noted(pairs):
        found = of(pairs)
        seen.extend((text_of(row), t, r) for (row, t), r in zip(pairs, found))
        return found

    loaded = dataclasses.replace(loaded, rewards=dataclasses.replace(loaded.rewards, of=noted))

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            grads.append([p.grad.clone() for p in model.parameters()])

    sizes = {"batch_size": GROUP * PROMPTS, "group_size": GROUP, "max_new_tokens": MOST}
    one = dataclasses.replace(spec, **sizes, steps=1, lr=1e-9)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    trl.grpo_trainer(one, model, loaded, list(rows), rows, str(tmp_path), [Keep()]).train()
    model.load_state_dict(weights)  # the smallest of steps would move them
    model.eval()
    (theirs,) = grads
    given = np.array([r for _, _, r in seen]).reshape(PROMPTS, GROUP)
    assert 0 < given.mean() < 1

    groups, advantage = [], advantages(given, "none").ravel()
    for k in range(0, len(seen), GROUP):
        drawn = [
            Completion(np.array(ids), np.zeros(len(ids)), advantage[k + i])
            for i, (_, ids, _) in enumerate(seen[k : k + GROUP])
        ]
        groups.append(Group(prompt_of(rows[seen[k][0]]), drawn))
    assert any(len(a.tokens) < MOST for g in groups for a in g.completions)
    signal = [g for g in groups if any(a.advantage for a in g.completions)]
    assert len(signal) < PROMPTS
    (batch,) = collate_rollouts([signal], 10**6, len(seen))
    for p in model.parameters():
        p.requires_grad_(True).grad = None
    log_p = token_log_p(model, batch, "fp64")
    advantage_NM, weight_NM = map(torch.from_numpy, (batch.advantage_NM, batch.weight_NM))
    gap = log_p - log_p.detach()  # the sampler is the learner
    loss = surrogate(gap, advantage_NM.to(gap), weight_NM)
    (loss.sum() / batch.episodes).backward()
    ours = torch.cat([p.grad.flatten() for p in model.parameters()])
    # dr_grpo divides by the most tokens that the answers could have had together
    theirs = torch.cat([g.flatten() for g in theirs]) * MOST
    assert float((ours - theirs).norm()) < 1e-6 * float(ours.norm())

"""Against the trainer that most people use: one update of TRL's GRPO, set to the same loss, has our
gradient up to its constant. Needs the extra `bench`."""

import numpy as np
import pytest
import torch

from lorasweep.data.rewards import prompt_of
from lorasweep.data.synthetic.skills import ALPHABET
from lorasweep.methods.fullft import FullFT
from lorasweep.train.objectives.nll import token_log_p
from lorasweep.train.objectives.rollouts import Answer, Group, lay_out
from lorasweep.train.objectives.surrogate import advantages, surrogate
from tests.rewarded import world

GROUP, PROMPTS, MOST = 8, 16, 8


def characters():
    """A tokenizer of the alphabet of `skills`, whose line end is also its end and padding."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({c: i for i, c in enumerate(ALPHABET)}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="\n", pad_token="\n")


@pytest.mark.slow
def test_one_update_has_the_gradient_of_trls_grpo(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import TrainerCallback

    _, base, loaded = world("words", method=FullFT())
    model = base.model
    model.generation_config.update(eos_token_id=0, pad_token_id=0)
    model.config.pad_token_id = 0
    # of one length: TRL counts positions from the padding, whose rotations round differently
    alike = [r for r in loaded.train(0, 0, 200) if len(prompt_of(r)) == 11][:PROMPTS]
    rows = {"".join(ALPHABET[t] for t in prompt_of(r)): r for r in alike}
    seen, grads = [], []

    def reward(prompts, completions, completion_ids, **_):
        found = [
            loaded.rewards.of([(rows[p], np.array(ids, dtype=np.int32))])[0]
            for p, ids in zip(prompts, completion_ids)
        ]
        seen.extend(zip(prompts, completion_ids, found))
        return found

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            grads.append([p.grad.clone() for p in model.parameters()])

    options = trl.GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=GROUP * PROMPTS,
        num_generations=GROUP,
        max_completion_length=MOST,
        max_steps=1,
        learning_rate=0.0,
        max_grad_norm=0.0,
        loss_type="dr_grpo",
        scale_rewards="none",
        beta=0.0,
        num_iterations=1,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        report_to=[],
        save_strategy="no",
    )
    trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=options,
        train_dataset=Dataset.from_dict({"prompt": list(rows)}),
        processing_class=characters(),
        callbacks=[Keep()],
    ).train()
    model.eval()
    (theirs,) = grads
    given = np.array([r for _, _, r in seen]).reshape(PROMPTS, GROUP)
    assert 0 < given.mean() < 1

    groups, advantage = [], advantages(given, "none").ravel()
    for k in range(0, len(seen), GROUP):
        drawn = [
            Answer(np.array(ids), np.zeros(len(ids)), advantage[k + i])
            for i, (_, ids, _) in enumerate(seen[k : k + GROUP])
        ]
        groups.append(Group(prompt_of(rows[seen[k][0]]), drawn))
    assert any(len(a.tokens) < MOST for g in groups for a in g.answers)
    signal = [g for g in groups if any(a.advantage for a in g.answers)]
    assert len(signal) < PROMPTS
    (batch,) = lay_out([signal], 10**6, len(seen), False)
    for p in model.parameters():
        p.requires_grad_(True).grad = None
    log_p = token_log_p(model, batch.batch, "fp64")
    arrays = (batch.advantage_NM, batch.answer_NM, batch.batch.weight_NM)
    advantage_NM, answer_NM, weight_NM = map(torch.from_numpy, arrays)
    gap = log_p - log_p.detach()  # the sampler is the learner
    loss = surrogate(gap, advantage_NM.to(gap), answer_NM, weight_NM, "token", None)
    (loss.sum() / batch.episodes).backward()
    ours = torch.cat([p.grad.flatten() for p in model.parameters()])
    # dr_grpo divides by the most tokens that the answers could have had together
    theirs = torch.cat([g.flatten() for g in theirs]) * MOST
    assert float((ours - theirs).norm()) < 1e-6 * float(ours.norm())

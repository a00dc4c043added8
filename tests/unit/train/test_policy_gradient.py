"""The policy gradient: the gradient of the expected reward, packs as alone, how runs end."""

import copy
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch

from lorasweep.data import load as data
from lorasweep.data.rewards import answer_of, prompt_of
from lorasweep.errors import DataError, ModelError
from lorasweep.launch.trainer import finetune
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.train.objectives import policy_gradient, rollouts
from lorasweep.train.objectives.policy_gradient import PolicyGradient, surrogate
from tests.training import EPS, ROUNDING, Trained, attached, rewarded_world, run, worst

pytestmark = pytest.mark.usefixtures("norms_in_float64")


@pytest.fixture(scope="module")
def made():
    return {name: rewarded_world(name) for name in ("bandit", "words")}


@pytest.fixture
def worlds(made):
    for _, base, _ in made.values():
        base.at_start.clear()
    return made


def gradient(trained):
    """The gradient in one piece; it is taken away, too."""
    params = trained.parameters().values()
    found = torch.cat([p.grad.flatten() for p in params])
    for p in params:
        p.grad = None
    return found


def test_the_mean_over_all_samples_is_the_gradient_of_the_expected_reward(worlds):
    """Every pair of symbols that a context's group of two may draw, each as likely as it is: through
    the rows and the loss that training uses. Half of the gradient, since (G - 1) / G = 1/2."""
    spec, base, loaded = worlds["bandit"]
    row, vocab = loaded.test[3], spec.model.vocab_size
    objective = PolicyGradient({spec.id: loaded}, spec.precision)
    objective.start(base, [spec])
    objective.batches(base.model, 0, [spec])
    model = copy.deepcopy(base.model)
    trained = attached(FullFT(), model, spec.model)
    tokens = torch.tensor(prompt_of(row)[None].astype(int))
    log_p = model(input_ids=tokens, use_cache=False).logits[0, -1].log_softmax(-1)
    log_p[int(answer_of(row)[0])].exp().backward()
    exact = gradient(trained)
    at = log_p.detach().numpy()
    completions = []
    for pair in itertools.product(np.arange(vocab)[:, None], repeat=2):
        rewards = np.array([loaded.rewards.of([(row, t) for t in pair])])
        likely = math.exp(sum(at[t].item() for t in pair))
        for token, own in zip(pair, rollouts.advantages(rewards, "none")[0]):
            completions.append(rollouts.Completion(token, at[token], own * likely / 2))
    (batch,) = rollouts.collate_rollouts(
        [[rollouts.Group(prompt_of(row), completions)]], 10**6, 1, False
    )
    assert batch.tokens_N == (4,)  # all of them share the prompt's row
    objective.loss(model, batch).sum().backward()
    found = -gradient(trained)
    assert float(exact.norm()) > 1e-3
    assert float((found - exact / 2).norm()) < 1e-9 * float(exact.norm())


def token_log_p(model, prompt, whole):
    log_ps = model(input_ids=whole, use_cache=False).logits[0].log_softmax(-1)
    return log_ps[len(prompt) - 1 : -1].gather(1, whole[0, len(prompt) :, None])[:, 0]


def by_hand(model, spec, base, rows, completions, rewards):
    """The gradient's loss, written down completion by completion; `spec` has the options."""
    total, size = 0.0, spec.group_size
    for k, (tokens, reward) in enumerate(zip(completions, rewards)):
        prompt, group = prompt_of(rows[k // size]), rewards[k // size * size :][:size]
        whole = torch.tensor(np.concatenate([prompt, tokens])[None].astype(int))
        own = token_log_p(model, prompt, whole)
        advantage = reward - sum(group) / size
        if spec.reward_scale == "group":
            advantage = advantage / (np.std(group, ddof=1) + 1e-4)
        gap = own - own.detach()
        if spec.ratio_level == "sequence":
            total = total - advantage * gap.mean().exp()
        else:
            total = total - (advantage * gap.exp()).sum()
        if spec.kl_weight:
            away = token_log_p(base, prompt, whole).detach() - own
            total = total + spec.kl_weight * (away.exp() - away - 1).sum()
    return total / len(completions)


OPTIONS = {
    **{"the study's": {}, "scaled": {"reward_scale": "group"}},
    **{"sequence": {"ratio_level": "sequence"}, "kl": {"kl_weight": 0.3}},
    "clipped": {"clip_ratio": 0.2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("rows", [None, 16], ids=["whole", "micro-batches"])
def test_a_sampled_update_has_the_gradient_written_down_by_hand(worlds, options, rows):
    """Words of unequal length from a policy that has left the base, groups without a signal among
    them; the learner's own rows, micro-batches and dropped groups against one completion at a time."""
    spec, base, loaded = worlds["words"]
    spec = dataclasses.replace(spec, **options)
    objective = PolicyGradient({spec.id: loaded}, "fp64", rows)
    objective.start(base, [spec])
    model = copy.deepcopy(base.model)
    trained = attached(LoRA(rank=4), model, spec.model)
    for name, p in trained.parameters().items():
        if ".B" in name:
            rng = torch.Generator().manual_seed(p.numel())
            p.data.copy_(0.002 * torch.randn(p.shape, generator=rng, dtype=p.dtype))
    kept, sampled = [], policy_gradient.sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_gradient, "sample", lambda *a: kept.extend(sampled(*a)) or kept)
        batches = objective.batches(model, 3, [spec])
    n = spec.batch_size // spec.group_size
    given = loaded.train(spec.seed, 3 * n, n)
    completions = kept[0].tokens
    rewards = loaded.rewards.of(
        [(given[k // spec.group_size], t) for k, t in enumerate(completions)]
    )
    assert 0 < sum(rewards) < len(rewards)
    assert (rows is None) == (len(batches) == 1)
    weight = torch.stack([objective.weights(b) for b in batches]).sum(0)
    assert weight.tolist() == [spec.batch_size]
    for batch in batches:
        (objective.loss(model, batch) / weight).sum().backward()
    assert 0 < objective.metrics([0.0])[0]["flat_groups"] < 1
    ours = gradient(trained)
    by_hand(model, spec, base.model, given, completions, rewards).backward()
    theirs = gradient(trained)
    assert float(theirs.norm()) > 1e-4
    assert float((ours - theirs).norm()) < 1e-9 * float(theirs.norm())


def test_a_clipped_ratio_stops_the_gradient_only_on_the_side_that_it_went_too_far():
    gap = torch.tensor([[0.5, 0.5, -0.5, -0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0]], dtype=torch.float64)
    weight, answer = torch.ones_like(advantage), torch.arange(5)[None]
    surrogate(gap, advantage, answer, weight, "token", 0.2).sum().backward()
    ratio = gap.detach().exp()
    want = -(ratio * advantage) * torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0]])
    assert torch.allclose(gap.grad, want, atol=1e-12)


@pytest.mark.parametrize("name", [pytest.param("bandit", marks=pytest.mark.numerics), "words"])
def test_a_run_in_a_pack_is_the_run_alone(worlds, name, other_weights):
    """Mixed ranks, rates and seeds, over six updates in float64, where no draw flips."""
    spec, base, loaded = worlds[name]
    spec = dataclasses.replace(spec, eps=EPS)
    pack = [
        dataclasses.replace(spec, seed=k % 2, lr=1e-3 * (1 + k), method=LoRA(rank=r))
        for k, r in enumerate((1, 4, 4))
    ]
    pack[1] = dataclasses.replace(pack[1], steps=4)  # one ends early
    together, records = run(pack, base, loaded)
    for one in (pack[0], pack[2]):
        alone, own = run([one], other_weights(base), loaded)
        assert worst(alone[one.id], together[one.id]) < ROUNDING[10]
        for ours, theirs in zip(own[one.id], records[one.id], strict=True):
            for key in ("reward", "flat_groups", "answer_tokens", "cut_off"):
                assert ours[key] == theirs[key], key
            for key in {"entropy", "test_reward"} & ours.keys():
                assert ours[key] == pytest.approx(theirs[key], rel=ROUNDING[10])
        best, wanted = (x[one.id]["meta"]["best_reward"] for x in (alone, together))
        assert best == pytest.approx(wanted, rel=ROUNDING[10])


@pytest.mark.parametrize("name, method", [("bandit", FullFT()), ("words", LoRA(rank=4))])
def test_a_resumed_run_ends_in_the_same_bits(worlds, name, method):
    spec, base, loaded = worlds[name]
    spec = dataclasses.replace(spec, method=method, lr=1e-3)
    found = Trained(finetune([spec], base, loaded), at=(3,))
    whole, records, middle = found.states, found.records, found.at[3]
    middle[spec.id]["meta"] = json.loads(json.dumps(middle[spec.id]["meta"]))
    rest, again = run([spec], base, loaded, resume=middle)
    for key, tensor in whole[spec.id]["tensors"].items():
        assert torch.equal(tensor, rest[spec.id]["tensors"][key]), key
    assert rest[spec.id]["meta"] == whole[spec.id]["meta"]
    for key in ("reward", "test_reward", "surrogate"):
        assert [r.get(key) for r in again[spec.id]] == [r.get(key) for r in records[spec.id][3:]]
    other = dataclasses.replace(loaded, sha256="other")
    with pytest.raises(DataError, match="started on other data"):
        run([spec], base, other, resume=middle)


def end_of(spec, base, loaded):
    found = Trained(finetune([spec], base, loaded))
    return found.ends[spec.id], found.results[spec.id]


def test_it_learns_the_labels_and_records_what_it_learned(worlds):
    spec, base, loaded = worlds["bandit"]
    spec = dataclasses.replace(spec, method=FullFT(), lr=1e-3, steps=24, batch_size=512)
    _, result = end_of(spec, base, loaded)
    rewards = [point["test_reward"] for point in result["curve"]]
    assert rewards[0] == result["reward_start"] < 0.1 and rewards[-1] > 0.25
    assert result["best_reward"] == max(rewards[1:]) and result["answers"] == 24 * 512
    assert result["bits"] == pytest.approx(64 * rollouts.bits_learned(rewards[-1], 16))
    assert result["bits_per_answer"] == pytest.approx(result["bits"] / (24 * 512))
    assert result["metric"]["higher_is_better"] and "nll_start" not in result


def test_the_least_information_of_a_mean_reward():
    assert rollouts.bits_learned(1.0, 16) == pytest.approx(4.0)
    assert rollouts.bits_learned(1 / 16, 16) == rollouts.bits_learned(0.0, 16) == 0.0
    assert rollouts.bits_learned(0.5, 16) == pytest.approx(4 - 1 - 0.5 * math.log2(15))
    # Blahut and Arimoto's fixed point for 4 symbols: the test channel of equal errors
    p, miss = 0.7, 0.1
    mutual = 2 + p * math.log2(p) + 3 * miss * math.log2(miss)
    assert rollouts.bits_learned(0.7, 4) == pytest.approx(mutual)


def test_the_expected_reward_is_the_mean_of_samples(worlds):
    spec, base, _ = worlds["words"]
    _, _, loaded = rewarded_world("words", dataset=dataclasses.replace(spec.dataset, n_test=512))
    rows = [loaded.test]
    ((exact, exact_se, _),) = rollouts.held_out_rewards(
        base.model, rows, [loaded.rewards], 6, "fp64"
    )
    sampled = dataclasses.replace(loaded.rewards, exact=False)
    ((mean, se, _),) = rollouts.held_out_rewards(base.model, rows, [sampled], 6, "fp64")
    assert 0.02 < exact < 0.2 and exact_se < se
    assert abs(mean - exact) < 4 * se


def rewarded_by(loaded, value):
    given = {"of": lambda pairs: [value] * len(pairs), "exact": False}
    return dataclasses.replace(loaded, rewards=dataclasses.replace(loaded.rewards, **given))


def test_each_draw_of_the_data_has_its_own_reward_before_training(worlds):
    spec, base, _ = worlds["bandit"]
    drawn = dataclasses.replace(spec.dataset, draw_by_seed=True)
    runs = [dataclasses.replace(spec, dataset=drawn, seed=seed) for seed in (300, 301)]
    loaded = {one.id: data.load(drawn, [], draw=one.draw) for one in runs}
    together = PolicyGradient(loaded, spec.precision).start(base, runs)
    for one, found in zip(runs, together):
        base.at_start.clear()
        (alone,) = PolicyGradient({one.id: loaded[one.id]}, spec.precision).start(base, [one])
        assert found == alone
    assert together[0] != together[1]


def test_a_collapse_is_a_result(worlds):
    spec, base, loaded = worlds["words"]
    wild = dataclasses.replace(spec, lr=1.0, steps=40, batch_size=64)
    state, result = end_of(wild, base, loaded)
    assert state == "diverged" and result["collapsed"] and result["divergence_rule"] == 2
    assert 8 <= result["steps_done"] < 40
    assert result["reward"] < result["reward_start"] / 2


def test_a_run_on_prompts_harder_than_the_held_out_ones_ends_done(worlds):
    spec, base, loaded = worlds["words"]
    key = f"{spec.dataset.canonical}/None/{spec.precision}/{spec.max_new_tokens}/reward"
    known = dataclasses.replace(base, at_start={key: {"test_reward": 0.9, "test_reward_se": 0.0}})
    state, result = end_of(dataclasses.replace(spec, lr=1e-5, steps=12), known, loaded)
    assert state == "done" and not result["collapsed"] and result["reward_start"] == 0.9


@pytest.mark.parametrize(
    ("value", "said"), [(0.0, "no completion.*easier"), (1.0, "every.*harder")]
)
def test_a_base_without_a_signal_is_said_after_the_first_updates(worlds, value, said, monkeypatch):
    """Not before them; completions that cannot be read are counted apart."""
    spec, base, loaded = worlds["bandit"]
    monkeypatch.setattr(policy_gradient, "check_rows", lambda *_: None)
    one, some, many = (dataclasses.replace(spec, steps=n) for n in (1, 7, 50))
    with pytest.raises(DataError, match=said):
        run([many], base, rewarded_by(loaded, value))
    base.at_start.clear()
    records = run([some], base, rewarded_by(loaded, value))[1][some.id]
    assert all(r["flat_groups"] == 1 and r["surrogate"] == 0 for r in records)
    base.at_start.clear()
    assert run([one], base, rewarded_by(loaded, None))[1][one.id][0]["unread"] == 1.0


@pytest.fixture
def sampler_off_by(monkeypatch):
    """Let the sampler report log-probabilities that are off by shift(number of the update)."""
    sampled, updates = policy_gradient.sample, []

    def plant(shift):
        def shifted(*args):
            updates.append(1)
            off, found = shift(len(updates)), sampled(*args)
            return [dataclasses.replace(c, log_p=[x + off for x in c.log_p]) for c in found]

        monkeypatch.setattr(policy_gradient, "sample", shifted)

    return plant


def test_a_learner_that_is_not_the_sampler_is_refused(worlds, sampler_off_by):
    sampler_off_by(lambda update: 0.01)
    with pytest.raises(ModelError, match="not the same policy"):
        run([worlds["words"][0]], *worlds["words"][1:])


def test_a_run_whose_probabilities_are_lost_to_rounding_has_broken_down(worlds, sampler_off_by):
    """At too high a learning rate the same weights give a token two probabilities, 0.2% apart."""
    spec, base, loaded = worlds["words"]
    sampler_off_by(lambda update: 0.002 if update > 2 else 0.0)
    state, result = end_of(dataclasses.replace(spec, steps=8), base, loaded)
    assert state == "diverged" and result["steps_done"] == 3 and not result["collapsed"]


def test_prompts_that_leave_no_room_are_refused_before_training(worlds):
    spec, base, loaded = worlds["words"]
    long = dataclasses.replace(spec, max_new_tokens=20)
    with pytest.raises(
        DataError, match=r"max_length=24\. Set dataset.max_length=\d+, or lower max_new"
    ):
        run([long], base, loaded)

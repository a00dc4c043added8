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
from lorasweep.spec.metric import metric_of
from lorasweep.train.objectives import policy_gradient, rollouts
from lorasweep.train.objectives.policy_gradient import PolicyGradient, surrogate
from tests.training import EPS, Trained, as_alone, pack_of, rewarded_world, run

pytestmark = pytest.mark.usefixtures("norms_in_float64")


@pytest.fixture(scope="module")
def made():
    return {name: rewarded_world(name) for name in ("bandit", "words")}


@pytest.fixture
def worlds(made):
    for _, base, _ in made.values():
        base.at_start.clear()
    return made


def started(world, method, rows=None, **options):
    """An objective at its start, and a policy whose adapters have left the base."""
    spec, base, loaded = world
    spec = dataclasses.replace(spec, **options)
    objective = PolicyGradient({spec.id: loaded}, "fp64", rows)
    objective.start(base, [spec])
    model = copy.deepcopy(base.model)
    trained = pack_of([method], model, spec.model)
    for name, p in trained.parameters().items():
        if ".B" in name:
            rng = torch.Generator().manual_seed(p.numel())
            p.data.copy_(0.002 * torch.randn(p.shape, generator=rng, dtype=p.dtype))
    return spec, objective, model, trained


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
    spec, objective, model, trained = started(worlds["bandit"], FullFT())
    _, base, loaded = worlds["bandit"]
    row, vocab = loaded.test[3], spec.model.vocab_size
    objective.batches(base.model, 0, [spec])
    tokens = torch.tensor(prompt_of(row)[None].astype(int))
    log_p = model(input_ids=tokens, use_cache=False).logits[0, -1].log_softmax(-1)
    log_p[int(answer_of(row)[0])].exp().backward()
    exact, at, completions = gradient(trained), log_p.detach().numpy(), []
    for pair in itertools.product(np.arange(vocab)[:, None], repeat=2):
        rewards = np.array([loaded.rewards.of([(row, t) for t in pair])])
        likely = math.exp(sum(at[t].item() for t in pair))
        for token, own in zip(pair, rollouts.advantages(rewards, "none")[0]):
            completions.append(rollouts.Completion(token, at[token], own * likely / 2))
    groups = [rollouts.Group(prompt_of(row), completions)]
    (batch,) = rollouts.collate_rollouts([groups], 10**6, 1, False)
    assert batch.tokens_N == (4,)  # all of them share the prompt's row
    objective.loss(model, batch).sum().backward()
    assert float(exact.norm()) > 1e-3
    assert float((gradient(trained) + exact / 2).norm()) < 1e-9 * float(exact.norm())


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
def test_a_sampled_update_has_the_gradient_written_down_by_hand(worlds, options, rows, monkeypatch):
    """Words of unequal length from a policy that has left the base, groups without a signal among
    them; the learner's own rows, micro-batches and dropped groups against one completion at a time."""
    _, base, loaded = worlds["words"]
    spec, objective, model, trained = started(worlds["words"], LoRA(rank=4), rows, **options)
    kept, sampled, size = [], policy_gradient.sample, spec.group_size
    monkeypatch.setattr(policy_gradient, "sample", lambda *a: kept.extend(sampled(*a)) or kept)
    batches, n = objective.batches(model, 3, [spec]), spec.batch_size // size
    given, completions = loaded.train(spec.seed, 3 * n, n), kept[0].tokens
    rewards = loaded.rewards.of([(given[k // size], t) for k, t in enumerate(completions)])
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
    pack = [
        dataclasses.replace(spec, eps=EPS, seed=k % 2, lr=1e-3 * (1 + k), method=LoRA(rank=r))
        for k, r in enumerate((1, 4, 4))
    ]
    pack[1] = dataclasses.replace(pack[1], steps=4)  # one ends early
    as_alone(pack, base, loaded, other_weights(base), pack[::2])


@pytest.mark.parametrize("name, method", [("bandit", FullFT()), ("words", LoRA(rank=4))])
def test_a_resumed_run_ends_in_the_same_bits(worlds, name, method):
    spec, base, loaded = worlds[name]
    spec = dataclasses.replace(spec, method=method, lr=1e-3)
    found = Trained(finetune([spec], base, loaded), at=(3,))
    whole, middle = found.states[spec.id], found.at[3]
    middle[spec.id]["meta"] = json.loads(json.dumps(middle[spec.id]["meta"]))
    rest, again = run([spec], base, loaded, resume=middle)
    for key, tensor in whole["tensors"].items():
        assert torch.equal(tensor, rest[spec.id]["tensors"][key]), key
    assert rest[spec.id]["meta"] == whole["meta"]
    for ours, theirs in zip(again[spec.id], found.records[spec.id][3:], strict=True):
        assert all(
            ours.get(key) == theirs.get(key) for key in ("reward", "test_reward", "surrogate")
        )
    with pytest.raises(DataError, match="started on other data"):
        run([spec], base, dataclasses.replace(loaded, sha256="other"), resume=middle)


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
    metric = metric_of(json.loads(json.dumps(result)))  # read back, and better is higher
    assert metric.name == "test_reward" and metric.loss(rewards[-1]) < metric.loss(rewards[0])
    assert "nll_start" not in result and metric_of({"test_nll": 1.0}).loss(1.0) == 1.0


def test_the_least_information_of_a_mean_reward():
    p, miss = 0.7, 0.1  # Blahut and Arimoto's fixed point: the test channel of equal errors
    mutual = 2 + p * math.log2(p) + 3 * miss * math.log2(miss)
    half = 4 - 1 - 0.5 * math.log2(15)
    for at, bits in (
        ((1.0, 16), 4),
        ((1 / 16, 16), 0),
        ((0.0, 16), 0),
        ((0.5, 16), half),
        ((p, 4), mutual),
    ):
        assert rollouts.bits_learned(*at) == pytest.approx(bits)


def test_the_expected_reward_is_the_mean_of_samples(worlds):
    spec, base, _ = worlds["words"]
    _, _, loaded = rewarded_world("words", dataset=dataclasses.replace(spec.dataset, n_test=512))
    sampled = dataclasses.replace(loaded.rewards, exact=False)
    (exact, exact_se, _), (mean, se, _) = (
        rollouts.held_out_rewards(base.model, [loaded.test], [rewards], 6, "fp64")[0]
        for rewards in (loaded.rewards, sampled)
    )
    assert 0.02 < exact < 0.2 and exact_se < se
    assert abs(mean - exact) < 4 * se


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


def test_a_collapse_is_a_result_and_harder_prompts_than_the_held_out_ones_are_none(worlds):
    spec, base, loaded = worlds["words"]
    wild = dataclasses.replace(spec, lr=1.0, steps=40, batch_size=64)
    state, result = end_of(wild, base, loaded)
    assert state == "diverged" and result["collapsed"] and result["divergence_rule"] == 2
    assert 8 <= result["steps_done"] < 40
    assert result["reward"] < result["reward_start"] / 2
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

    def records(steps, value):
        base.at_start.clear()
        given = {"of": lambda pairs: [value] * len(pairs), "exact": False}
        rows = dataclasses.replace(loaded, rewards=dataclasses.replace(loaded.rewards, **given))
        one = dataclasses.replace(spec, steps=steps)
        return run([one], base, rows)[1][one.id]

    with pytest.raises(DataError, match=said):
        records(50, value)
    assert all(r["flat_groups"] == 1 and r["surrogate"] == 0 for r in records(7, value))
    assert records(1, None)[0]["unread"] == 1.0


def test_a_learner_that_is_not_the_sampler_is_refused_and_one_lost_to_rounding_has_broken_down(
    worlds, monkeypatch
):
    """Log-probabilities off by 0.01; and, after two updates, by 0.002: at too high a learning rate
    the same weights give a token two probabilities."""
    spec, base, loaded = worlds["words"]
    sampled, offs = policy_gradient.sample, iter([0.01, 0, 0, 0.002])

    def shifted(*args):
        off, found = next(offs), sampled(*args)
        return [dataclasses.replace(c, log_p=[x + off for x in c.log_p]) for c in found]

    monkeypatch.setattr(policy_gradient, "sample", shifted)
    with pytest.raises(ModelError, match="not the same policy"):
        run([spec], base, loaded)
    state, result = end_of(dataclasses.replace(spec, steps=8), base, loaded)
    assert state == "diverged" and result["steps_done"] == 3 and not result["collapsed"]


def test_prompts_that_leave_no_room_are_refused_before_training(worlds):
    spec, base, loaded = worlds["words"]
    with pytest.raises(DataError, match=r"max_length=24\. Set dataset.max_length=\d+"):
        run([dataclasses.replace(spec, max_new_tokens=20)], base, loaded)

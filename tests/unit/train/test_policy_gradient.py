"""The policy gradient: the gradient of the expected reward, packs as alone, how runs end; completions
sampled with a cache are those that whole forward passes would give, run by run."""

import contextlib
import copy
import dataclasses
import inspect
import itertools
import json
import math

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from lorasweep.data.rewards import answer_of, prompt_of
from lorasweep.data.synthetic.generators import ALPHABET
from lorasweep.errors import DataError, ModelError
from lorasweep.launch.torch_trainer import finetune
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.models.load import Base, empty_model
from lorasweep.plan.needs import cache_bytes
from lorasweep.spec.metric import metric_of
from lorasweep.train import sampling
from lorasweep.train.objectives import policy_gradient
from lorasweep.train.objectives.nll import token_log_p
from lorasweep.train.objectives.policy_gradient import PolicyGradient
from lorasweep.train.sampling import sample
from tests.training import EPS, Trained, as_alone, pack_of, rewarded_world, run
from tests.world import tiny_spec

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
        for token, own in zip(pair, policy_gradient.advantages(rewards, "none")[0]):
            completions.append(policy_gradient.Completion(token, at[token], own * likely / 2))
    groups = [policy_gradient.Group(prompt_of(row), completions)]
    (batch,) = policy_gradient.collate_rollouts([groups], 10**6, 1)
    assert batch.tokens_N == (4,)  # all of them share the prompt's row
    objective.loss(model, batch).sum().backward()
    assert float(exact.norm()) > 1e-3
    assert float((gradient(trained) + exact / 2).norm()) < 1e-9 * float(exact.norm())


def by_hand(model, spec, rows, completions, rewards):
    """The gradient's loss, written down completion by completion; `spec` has the options."""

    def token_log_p(model, prompt, tokens):
        whole = torch.tensor(np.concatenate([prompt, tokens])[None].astype(int))
        log_ps = model(input_ids=whole, use_cache=False).logits[0].log_softmax(-1)
        return log_ps[len(prompt) - 1 : -1].gather(1, whole[0, len(prompt) :, None])[:, 0]

    total, size = 0.0, spec.group_size
    for k, (tokens, reward) in enumerate(zip(completions, rewards)):
        prompt, group = prompt_of(rows[k // size]), rewards[k // size * size :][:size]
        own = token_log_p(model, prompt, tokens)
        advantage = reward - sum(group) / size
        if spec.reward_scale == "group":
            advantage = advantage / (np.std(group, ddof=1) + 1e-4)
        gap = own - own.detach()
        total = total - advantage * gap.exp().sum()
    return total / len(completions)


@pytest.mark.parametrize("scale", ["none", "group"])
@pytest.mark.parametrize("rows", [None, 16], ids=["whole", "micro-batches"])
def test_a_sampled_update_has_the_gradient_written_down_by_hand(worlds, scale, rows, monkeypatch):
    """Words of unequal length from a policy that has left the base, groups without a signal among
    them; the learner's own rows, micro-batches and dropped groups against one completion at a time."""
    begun = started(worlds["words"], LoRA(rank=4), rows, reward_scale=scale)
    (spec, objective, model, trained), loaded = begun, worlds["words"][2]
    kept, sampled, size = [], policy_gradient.sample, spec.group_size
    monkeypatch.setattr(policy_gradient, "sample", lambda *a: kept.extend(sampled(*a)) or kept)
    batches, n = objective.batches(model, 3, [spec]), spec.batch_size // size
    given, completions = loaded.train(spec.seed, 3 * n, n), kept[0].tokens
    rewards = loaded.rewards.of([(given[k // size], t) for k, t in enumerate(completions)])
    assert 0 < sum(rewards) < len(rewards) and (rows is None) == (len(batches) == 1)
    weight = torch.stack([objective.weights(b) for b in batches]).sum(0)
    assert weight.tolist() == [spec.batch_size]
    for batch in batches:
        (objective.loss(model, batch) / weight).sum().backward()
    assert 0 < objective.metrics([0.0])[0]["flat_groups"] < 1
    ours = gradient(trained)
    by_hand(model, spec, given, completions, rewards).backward()
    theirs = gradient(trained)
    assert float(theirs.norm()) > 1e-4
    assert float((ours - theirs).norm()) < 1e-9 * float(theirs.norm())


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
        assert all(ours.get(k) == theirs.get(k) for k in ("reward", "test_reward", "surrogate"))
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
    assert result["answers"] == 24 * 512
    assert result["bits"] == pytest.approx(64 * policy_gradient.bits_learned(rewards[-1], 16))
    assert result["bits_per_answer"] == pytest.approx(result["bits"] / (24 * 512))
    metric = metric_of(json.loads(json.dumps(result)))  # read back, and better is higher
    assert metric.name == "test_reward" and metric.loss(rewards[-1]) < metric.loss(rewards[0])
    assert "nll_start" not in result and metric_of({"test_nll": 1.0}).loss(1.0) == 1.0


def test_the_least_information_of_a_mean_reward():
    p, miss = 0.7, 0.1  # Blahut and Arimoto's fixed point: the test channel of equal errors
    mutual, half = 2 + p * math.log2(p) + 3 * miss * math.log2(miss), 3 - 0.5 * math.log2(15)
    at = {(1.0, 16): 4, (1 / 16, 16): 0, (0.0, 16): 0, (0.5, 16): half, (p, 4): mutual}
    assert [policy_gradient.bits_learned(*x) for x in at] == pytest.approx(list(at.values()))


def test_the_expected_reward_is_the_mean_of_samples(worlds):
    spec, base, _ = worlds["words"]
    _, _, loaded = rewarded_world("words", dataset=dataclasses.replace(spec.dataset, n_test=512))
    sampled = dataclasses.replace(loaded.rewards, exact=False)
    found = (
        policy_gradient.held_out_rewards(base.model, [loaded.test], [rewards], 6, "fp64")[0]
        for rewards in (loaded.rewards, sampled)
    )
    (exact, exact_se), (mean, se) = ([f["test_reward"], f["test_reward_se"]] for f in found)
    assert 0.02 < exact < 0.2 and exact_se < se and abs(mean - exact) < 4 * se


def test_a_collapse_is_a_result_and_harder_prompts_than_the_held_out_ones_are_none(worlds):
    spec, base, loaded = worlds["words"]
    wild = dataclasses.replace(spec, lr=1.0, steps=40, batch_size=64)
    state, result = end_of(wild, base, loaded)
    assert state == "diverged" and result["collapsed"] and result["divergence_rule"] == 2
    assert 8 <= result["steps_done"] < 40 and result["reward"] < result["reward_start"] / 2
    key = f"{spec.dataset.canonical}/None/{spec.precision}/{spec.max_new_tokens}/reward"
    known = dataclasses.replace(base, at_start={key: {"test_reward": 0.9, "test_reward_se": 0.0}})
    state, result = end_of(dataclasses.replace(spec, lr=1e-5, steps=12), known, loaded)
    assert state == "done" and not result["collapsed"] and result["reward_start"] == 0.9


@pytest.mark.parametrize("value, said", [(0.0, "no completion.*easier"), (1.0, "every.*harder")])
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
    with pytest.raises(DataError, match=r"max_length=24\. Set dataset.max_length=\d+"):
        run([dataclasses.replace(spec, max_new_tokens=20)], base, loaded)  # before the first draw
    state, result = end_of(dataclasses.replace(spec, steps=8), base, loaded)
    assert state == "diverged" and result["steps_done"] == 3 and not result["collapsed"]


ENDS = ((0,), (5,), (3, 7))


def asked_of(spec, base, runs, lengths, group, longest):
    """A pack whose adapters do something; random prompts of these lengths for each run, and the
    random numbers of their completions."""
    methods = [LoRA(rank=r) for r in (1, 4, 4)[:runs]]
    trained = pack_of(methods, base.model, spec.model, perturb=0.05)
    rng, vocab = np.random.default_rng(0), spec.model.vocab_size
    prompts = [[rng.integers(1, vocab, size=n) for n in lengths] for _ in range(runs)]
    return trained, prompts, rng.random((runs, len(lengths) * group, longest))


@torch.no_grad()
def one_by_one(model, prompt, uniforms):
    """Draw one completion with a whole forward pass for every token, of a model that holds one run."""
    tokens, log_ps = list(map(int, prompt)), []
    for u in uniforms:
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].double()
        log_p = logits.log_softmax(-1).numpy()
        token = int((np.cumsum(np.exp(log_p)) <= u * np.exp(log_p).sum()).sum())
        tokens.append(token)
        log_ps.append(log_p[token])
        if any(tuple(tokens[-len(end) :]) == end for end in ENDS):
            break
    return tokens[len(prompt) :], log_ps


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("lengths", [[5] * 4, [3, 9, 5, 4]], ids=["equal lengths", "ragged ones"])
def test_a_pack_with_a_cache_draws_what_each_run_draws_alone_without(family, lengths, monkeypatch):
    """Runs end their completions at different tokens, and ended rows are dropped on the way."""
    monkeypatch.setattr(sampling, "ROWS", 8)  # two rounds
    spec, base, _ = rewarded_world("words")
    if family == "qwen3":  # random, and another family than the shipped bases
        spec = tiny_spec(precision="fp64")
        shape = dataclasses.replace(spec.model, name="qwen3-tiny", n_layers=2, qk_norm=True)
        torch.manual_seed(0)
        spec = dataclasses.replace(spec, model=shape)
        base = Base(empty_model(shape).double().eval(), None, "random")
    asked = (spec, base, 3, lengths, 4, 7)
    trained, prompts, uniforms = asked_of(*asked)
    together = sample(base.model, prompts, uniforms, ENDS, "fp64")
    for n in (2, 0):
        trained.keep([n])
        for k in (0, 3, 5, 10, 15):
            tokens, log_p = one_by_one(base.model, prompts[n][k // 4], uniforms[n, k])
            assert together[n].tokens[k].tolist() == tokens
            assert np.abs(together[n].log_p[k] - log_p).max() < 1e-10
            assert together[n].ended[k] == any(tuple(tokens[-len(e) :]) == e for e in ENDS)
        trained.detach()
        trained, *_ = asked_of(*asked)
    assert len({len(t) for own in together for t in own.tokens}) > 3


def test_the_entropy_is_the_policys_and_draws_are_repeatable(worlds):
    _, base, loaded = worlds["bandit"]
    prompt, uniforms = loaded.test[0].tokens[:-1], np.random.default_rng(1).random((1, 256, 1))
    with torch.no_grad():
        logits = base.model(input_ids=torch.tensor(prompt[None].astype(int))).logits[0, -1]
    p = logits.softmax(-1).numpy()
    one, other = (sample(base.model, [[prompt] * 4], uniforms, (), "fp64")[0] for _ in range(2))
    assert one.entropy == pytest.approx(-(p * np.log(p)).sum(), rel=1e-9)
    assert one.largest_logit == pytest.approx(float(logits.abs().max()), rel=1e-9)
    assert [t.tolist() for t in one.tokens] == [t.tolist() for t in other.tokens]


def test_without_random_numbers_an_answer_is_that_of_generate():
    _, base, loaded = rewarded_world("words")
    prompts = [row.tokens[: 3 + k] for k, row in enumerate(loaded.test[:6])]
    greedy, end = np.full((1, 6, 9), np.nan), 7
    how = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 0}
    ids = [torch.tensor(p[None].astype(int)) for p in prompts]
    whole = [base.model.generate(i, attention_mask=torch.ones_like(i), **how)[0] for i in ids]
    theirs = [w[len(p) :].tolist() for w, p in zip(whole, prompts)]
    (ours,) = sample(base.model, [prompts], greedy, (), "fp64", forward_parts=512)
    assert [t.tolist() for t in ours.tokens] == theirs and len({*map(tuple, theirs)}) > 2
    end = theirs[0][2]
    (ours,) = sample(base.model, [prompts], greedy, [(end,)], "fp64")
    cut = [t[: t.index(end) + 1] if end in t else t for t in theirs]
    assert [t.tolist() for t in ours.tokens] == cut
    assert ours.ended.tolist() == [end in t for t in theirs]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [[6] * 3, [3, 9, 6]], ids=["equal prompts", "ragged prompts"])
def test_keys_are_cached_in_bf16_and_change_no_number(attention, lengths, monkeypatch):
    """Autocast leaves rotated keys in fp32, and attention rounds them: so it may be done before."""
    spec, base, _ = rewarded_world("words", precision="bf16")
    _, prompts, uniforms = asked_of(spec, base, 2, lengths, 2, 5)
    update, drawn, held = DynamicCache.update, [], {}

    def watched(cache, keys, values, layer, *args, **kwargs):
        held[len(drawn), layer] = update(cache, keys, values, layer, *args, **kwargs)
        return held[len(drawn), layer]

    monkeypatch.setattr(DynamicCache, "update", watched)
    base.model.set_attn_implementation(attention)
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setitem(sampling.COMPUTE_DTYPES, "bf16", dtype)
        drawn.append(sample(base.model, prompts, uniforms, (), "bf16"))
    kept = [t for pair in held.values() for t in pair if t.dtype == torch.bfloat16]
    assert len(kept) == len(held)  # half of all keys and values
    tokens = 2 * 3 * 2 * (max(lengths) + 5 - 1)  # the last one drawn is never read
    assert sum(t.nbytes for t in kept) == tokens * cache_bytes(spec.model, 2)
    for one, other in zip(*drawn, strict=True):
        for ours, theirs in ((one.tokens, other.tokens), (one.log_p, other.log_p)):
            assert list(map(list, ours)) == list(map(list, theirs))
        assert (one.entropy, one.largest_logit) == (other.entropy, other.largest_logit)


@pytest.mark.parametrize("name", ["cache", "past_key_values", "another"])
def test_the_cache_is_passed_under_the_name_that_the_model_takes(name, monkeypatch):
    """transformers calls it `cache` from 5.24 on. A forward pass ignores unknown arguments."""
    _, base, loaded = rewarded_world("words")
    forward, given = base.model.forward, []

    def renamed(input_ids, **kwargs):
        given.append(kwargs.pop(name))
        return forward(input_ids=input_ids, past_key_values=given[-1], **kwargs)

    keyword = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
    renamed.__signature__ = inspect.Signature([keyword])
    monkeypatch.setitem(base.model.__dict__, "forward", renamed)
    refused = pytest.raises(ModelError, match="cache of keys and values")
    with refused if name == "another" else contextlib.nullcontext():
        sample(base.model, [[loaded.test[0].tokens[:5]]], np.full((1, 1, 3), 0.5), (), "fp64")
    drawn = 0 if name == "another" else 3
    assert [isinstance(c, DynamicCache) for c in given] == [True] * drawn


GROUP, PROMPTS, MOST = 8, 16, 8


@pytest.mark.slow
def test_one_update_has_the_gradient_of_trls_grpo_up_to_its_constant(tmp_path):
    from transformers import TrainerCallback

    from benchmarks import trl_baseline as trl

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

    groups, advantage = [], policy_gradient.advantages(given, "none").ravel()
    for k in range(0, len(seen), GROUP):
        drawn = [
            policy_gradient.Completion(np.array(ids), np.zeros(len(ids)), advantage[k + i])
            for i, (_, ids, _) in enumerate(seen[k : k + GROUP])
        ]
        groups.append(policy_gradient.Group(prompt_of(rows[seen[k][0]]), drawn))
    assert any(len(a.tokens) < MOST for g in groups for a in g.completions)
    signal = [g for g in groups if any(a.advantage for a in g.completions)]
    assert len(signal) < PROMPTS
    (batch,) = policy_gradient.collate_rollouts([signal], 10**6, len(seen))
    for p in model.parameters():
        p.requires_grad_(True).grad = None
    log_p = token_log_p(model, batch, "fp64")
    advantage_NM, weight_NM = map(torch.from_numpy, (batch.advantage_NM, batch.weight_NM))
    gap = log_p - log_p.detach()  # the sampler is the learner
    loss = policy_gradient.surrogate(gap, advantage_NM.to(gap), weight_NM)
    (loss.sum() / batch.episodes).backward()
    ours = torch.cat([p.grad.flatten() for p in model.parameters()])
    # dr_grpo divides by the most tokens that the answers could have had together
    theirs = torch.cat([g.flatten() for g in theirs]) * MOST
    assert float((ours - theirs).norm()) < 1e-6 * float(ours.norm())

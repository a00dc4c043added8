"""A pack is its runs alone, to rounding, whatever their data sets, lengths and ends, also where runs end
by their held-out loss. Held-out losses: over true distributions and by rows, equal to sums by hand;
the error of a gain; logits in chunks, never whole in memory."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import stdtrit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorasweep.data import splits as data
from lorasweep.data.examples import Data, Example, by_length, collate, eval_batches, merge, shuffled
from lorasweep.errors import ModelError
from lorasweep.launch.torch_trainer import finetune
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.models.forward import logits_of
from lorasweep.plan import needs as memory
from lorasweep.plan.detect import Hardware
from lorasweep.plan.needs import checkpoint_bytes
from lorasweep.plan.planner import pack_key, place
from lorasweep.spec.metric import Best, eval_steps, no_better, why_not_early
from lorasweep.spec.streams import stream
from lorasweep.train.divergence import FIRST_UPDATES, Measured, Signal
from lorasweep.train.loop import Progress
from lorasweep.train.objectives import nll
from tests import training
from tests.training import ROUNDING, Trained, as_alone, customer, ragged, run, small_world, worst
from tests.world import tiny_spec


@pytest.fixture(scope="module")
def world():
    spec, base, rows = small_world(lr=2e-3, steps=10, batch_size=2)
    few = dataclasses.replace(spec.dataset, n_test=8, n_test_curve=8)
    return dataclasses.replace(spec, dataset=few), base, rows


def mixed(spec, count, wild=()):
    """`count` runs that mix learning rates, ranks (equal ones are neighbours), alphas and seeds."""
    ranks = sorted((1, 4, 8, 16)[k % 4] for k in range(count))
    lrs = [*wild, *(5e-4 * (1 + k) for k in range(len(wild), count))]
    methods = [LoRA(rank=rank, alpha=(8.0, 32.0)[k % 2]) for k, rank in enumerate(ranks)]
    return [
        dataclasses.replace(spec, lr=lr, seed=k % 3, method=method)
        for k, (lr, method) in enumerate(zip(lrs, methods))
    ]


@pytest.mark.numerics
def test_one_step_in_a_pack_is_one_step_alone(world, other_weights):
    """From the same state, at three points of a run: gradient, moments and update. Catches whatever
    runs mix up, and one beyond the edge of stability that reaches its neighbours."""
    spec, base, rows = world
    # the pack is attached to `base` meanwhile
    other = other_weights(models.load(spec.model, [], "fp64"))
    pack = mixed(spec, 16, wild=(0.12,))
    checked = {2: pack, 5: pack[::5], 8: pack[::5]}  # at update 2 all, then one of each rank
    before, wild = {}, []
    for event in finetune(pack, base, rows):
        after = training.copied(event.snapshot())
        wild.append(event.records[pack[0].id]["train_nll"])
        for one in checked.get(event.step, ()):
            resume = {one.id: before[one.id]}
            alone = next(iter(finetune([one], other, rows, resume=resume))).snapshot()
            # beyond the edge of stability a gradient amplifies rounding, too
            bound = ROUNDING[10] if one is pack[0] else ROUNDING[1]
            assert worst(alone[one.id], after[one.id]) < bound, (event.step, one.lr)
        if event.step == max(checked):
            break
        before = after
    assert max(wild) - wild[0] > 0.5


@pytest.mark.numerics
@pytest.mark.parametrize("micro_batch", [None, 1])
def test_the_first_update_is_computed_once_for_all_rates(world, other_weights, micro_batch):
    """Until then runs that differ in nothing else have the same weights, rows and gradients."""
    spec, base, rows = world
    other, counted = other_weights(models.load(spec.model, [], "fp64")), []
    pack = [
        dataclasses.replace(spec, lr=lr, seed=seed, steps=2, method=LoRA(rank=rank, alpha=32.0))
        for rank, seed, lr in [(2, 0, 1e-3), (2, 1, 2e-3), (2, 0, 2e-3), (4, 0, 1e-3), (4, 0, 3e-3)]
    ]

    def count(module, args, kwargs):
        counted.append(torch.is_grad_enabled() * len(kwargs["input_ids"]))

    with base.model.base_model.register_forward_pre_hook(count, with_kwargs=True):
        as_alone(pack, base, rows, other, micro=micro_batch)
    assert sum(counted) == (3 + 5) * spec.batch_size


@pytest.mark.slow
@pytest.mark.parametrize("text", [False, pytest.param(True, marks=pytest.mark.numerics)])
def test_ten_updates_of_a_pack_are_those_of_its_runs_alone(world, text, other_weights):
    """Of four ranks and three data orders, so that ragged rows have other widths in the pack; one
    ends early, and two resume from the fifth update as another pack."""
    spec, base, rows = world
    rows, other = ragged(longest=40) if text else rows, other_weights(base)
    pack = mixed(dataclasses.replace(spec, weight_decay=0.1, clip_norm=0.5), 8)
    pack[5] = dataclasses.replace(pack[5], steps=8)
    found = as_alone(pack, base, rows, other, pack[::5], at=(5,))
    some = pack[3:7:3]
    rest, _ = run(some, other, rows, resume={s.id: found.at[5][s.id] for s in some})
    assert max(worst(rest[s.id], found.states[s.id]) for s in some) < ROUNDING[10]


@pytest.mark.numerics
@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_of_full_fine_tuning_change_nothing(world, micro, other_weights):
    """Of adapters: with the data sets below."""
    spec, base, rows = world
    spec = dataclasses.replace(spec, method=FullFT(), lr=1e-3, steps=6, batch_size=4)
    as_alone([spec], base, rows, other_weights(base), micro=micro)


def test_a_run_that_diverges_or_is_dropped_leaves_and_disturbs_no_other(world, norms_in_float64):
    spec, base, rows = world
    pack = wild, dropped, steady = mixed(spec, 3, wild=(3.0,))

    def dropping(pack, step):
        for event in finetune(pack, base, rows):
            if event.step == step:
                event.dropped.add(pack[len(pack) // 2].id)
            yield event

    found = Trained(dropping(pack, 2))
    assert found.ends == {wild.id: "diverged", steady.id: "done"}
    counts = [len(found.records[s.id]) for s in pack]
    assert counts[0] < 10 and counts[1:] == [2, 10] and dropped.id not in found.states
    for weights in (base, training.moved(base)):
        alone, _ = run([steady], weights, rows)
        assert worst(alone[steady.id], found.states[steady.id]) < ROUNDING[10]
    assert len(list(dropping([dataclasses.replace(spec, method=FullFT(), lr=1e-3)], 1))) == 1


CUSTOMERS = {
    **{"few": (5, 12, 3, 1e-3, 4), "many": (40, 30, 9, 2e-3, 4)},
    **{"long": (12, 70, 6, 4e-3, 4), "one": (1, 20, 7, 2e-3, 8)},
}
"""Name: training rows, longest row, steps, learning rate, rank."""
SECRET = 31
"""A symbol of the vocabulary that customers' rows leave out."""


@pytest.fixture(scope="module")
def fleet():
    spec, base, _ = small_world(batch_size=4)
    made = []
    for name, (train, longest, steps, lr, rank) in CUSTOMERS.items():
        changes = {"steps": steps, "lr": lr, "method": LoRA(rank=rank)}
        made.append(customer(spec, name, longest, train, 4, 3, curve=2, **changes))
    return base, [s for s, _ in made], {s.id: d for s, d in made}


@pytest.mark.numerics
@pytest.mark.parametrize("rows", [None, 3])
def test_each_data_set_trains_and_measures_as_alone_until_it_is_done(fleet, rows, other_weights):
    base, pack, data = fleet
    found = as_alone(pack, base, data, other_weights(base), micro=rows)
    assert [len(found.records[one.id]) for one in pack] == [one.steps for one in pack]


def test_validation_rows_are_measured_during_training_and_test_rows_only_at_the_end(fleet):
    base, pack, data = fleet
    one, found = pack[1], []
    for test in (data[one.id].test, data[pack[0].id].test):
        base.at_start.clear()
        _, records = run([one], base, {one.id: dataclasses.replace(data[one.id], test=test)})
        found.append(records[one.id])
    for a, b in zip(*found):
        assert a.get("test_nll_curve") == b.get("test_nll_curve")
        assert (a.get("test_nll") == b.get("test_nll")) == (a["step"] < one.steps)


def test_nothing_of_one_customers_rows_is_in_what_another_gets(fleet):
    """A symbol planted in one customer's rows: with or without it, all that others get is the same,
    bit for bit."""
    base, pack, data = fleet
    owner, mine = pack[2], data[pack[2].id]

    def with_secret(examples):
        return [dataclasses.replace(e, tokens=np.full_like(e.tokens, SECRET)) for e in examples]

    held_out = {"test": with_secret(mine.test), "validation": with_secret(mine.validation)}
    planted = dataclasses.replace(mine, train=lambda *at: with_secret(mine.train(*at)), **held_out)
    found = []
    for rows in (mine, planted):
        base.at_start.clear()
        found.append(Trained(finetune(pack, base, {**data, owner.id: rows})))
    clean, secret = found
    assert worst(clean.states[owner.id], secret.states[owner.id]) > 0
    for one in pack[:2] + pack[3:]:
        tensors = (found.states[one.id]["tensors"] for found in (clean, secret))
        assert all(a.equal(b) for a, b in zip(*map(dict.values, tensors), strict=True))
        for a, b in zip(clean.records[one.id], secret.records[one.id], strict=True):
            assert all(a[k] == b[k] for k in a.keys() | b.keys() if not k.endswith("_s"))


def noisy(spec, name, longest, steps, patience=2, lr=1e-2, train=6):
    """A run on few rows of noise, which it can only memorise; other rows of noise are held out."""
    changes = {"steps": steps, "lr": lr, "early_stopping": patience}
    return customer(spec, name, longest, train, 12, 8, **changes)


def trained(pack, data, base, resume=None):
    """What a pack gives, and its snapshots after 5 and 10 updates."""
    base.at_start.clear()
    found = Trained(finetune(pack, base, data, resume=resume), at=(5, 10))
    assert set(found.ends.values()) == {"done"}
    return found


@pytest.fixture(scope="module")
def together():
    """One pack: two that overfit, one of them patient; one that only learns; one without patience."""
    spec, base, _ = small_world(batch_size=4)
    made = [
        noisy(spec, "hasty", 30, 48, patience=1),
        noisy(spec, "patient", 60, 64, patience=3, lr=5e-3),
        noisy(spec, "slow", 20, 24, lr=1e-4, train=40),
        noisy(spec, "all", 40, 40, patience=0),
    ]
    runs, data = [s for s, _ in made], {s.id: d for s, d in made}
    return runs, data, base, trained(runs, data, base)


@pytest.mark.full
@pytest.mark.numerics
def test_each_stops_where_it_would_alone_and_leaves_the_same(together):
    """Over ten updates to rounding. At the end, after up to 40 updates at 1e-2, a run alone is within
    1e-7 of itself on moved weights. Where each stops does not hang on that: evaluations differ by
    far more."""
    runs, data, base, found = together
    hasty, patient, slow, late = (found.results[each.id]["steps_done"] for each in runs)
    assert hasty < patient < 64 and slow == 24 and late == 40
    for each in runs:
        alone, packed = trained([each], data, base), found.results[each.id]
        if each.id in found.at.get(10, ()):
            assert worst(alone.at[10][each.id], found.at[10][each.id]) < ROUNDING[10]
        assert worst(alone.states[each.id], found.states[each.id]) < 1e-4
        for name in ("steps_done", "best_step", "tokens"):
            assert alone.results[each.id].get(name) == packed.get(name)
        for name in ("test_nll", "test_nll_curve", "train_nll", "norm_b", "code_nats"):
            assert alone.results[each.id][name] == pytest.approx(packed[name], rel=1e-4)


def test_the_best_evaluation_is_kept_and_its_memory_is_planned(together):
    runs, _, _, trained = together
    for each in runs:
        found = trained.results[each.id]
        points = found["curve"][1:]
        losses = {p["step"]: p.get("test_nll_curve", p["test_nll"]) for p in points}
        if not each.early_stopping:
            assert "best_step" not in found and losses == {each.steps: found["test_nll_curve"]}
            continue
        assert found["best_step"] == min(losses, key=losses.get)
        assert found["test_nll_curve"] == pytest.approx(min(losses.values()), abs=1e-12)
        since = len([s for s in losses if s > found["best_step"] and s >= each.steps / 10])
        assert found["early_stopping_rule"] == 2 and "test_nll_curve" in points[-1]
        assert (found["steps_done"] < each.steps) == (since == each.early_stopping)
        assert list(losses) == [s for s in eval_steps(each.steps) if s <= found["steps_done"]]
    each, endless = runs[0], dataclasses.replace(runs[0], early_stopping=0)
    assert pack_key(each) == pack_key(endless) and each.id != endless.id
    machine = Hardware(name="any", cores=2, memory_gib=8.0)
    one, other = (place(s, machine, 4).memory_bytes for s in (each, endless))
    best = 4 * each.method.n_trainable(each.model)
    assert one - other == 8 * best
    assert checkpoint_bytes([each]) - checkpoint_bytes([endless]) == 2 * best


def test_a_run_resumes_after_a_kill_to_the_same_bits(together):
    """From a checkpoint between its best evaluation and its end."""
    runs, data, base, found = together
    rest = [s for s in runs if s.id in found.at[5]]
    assert any(0 < found.results[s.id].get("best_step", 0) < 5 for s in rest)
    again = trained(rest, data, base, resume=found.at[5])
    for each in rest:
        ours, wanted = again.results[each.id], found.results[each.id]
        assert all(ours[k] == wanted[k] for k in ours.keys() | wanted if not k.endswith("_s"))
        tensors = again.states[each.id]["tensors"]
        assert all(t.equal(tensors[n]) for n, t in found.states[each.id]["tensors"].items())


def test_a_customer_that_overfits_is_not_worse_for_it(together):
    """Of full fine-tuning; of adapters the best evaluation is proven above."""
    runs, _, base, _ = together
    each, data = noisy(dataclasses.replace(runs[0], method=FullFT()), "noisy", 30, 48, lr=2e-3)
    both = (each, dataclasses.replace(each, early_stopping=0))
    early, late = (trained([one], {one.id: data}, base).results[one.id] for one in both)
    assert early["steps_done"] < 48 and early["test_nll"] < late["test_nll"] - 0.1
    assert late["train_nll"] < early["test_nll"] - 0.5  # it does memorise its rows
    assert early["tokens"] < late["tokens"]


def end_of(losses, patience, steps):
    """The update at which planted losses of evaluations end a run of `steps` updates."""
    best, evaluated = Best(), []
    for step, loss in zip(eval_steps(steps), losses):
        evaluated.append(step)
        best.note(step, loss)
        if no_better(best.step, evaluated, steps) >= patience:
            return step
    return steps


SPIKE = [2.0, 2.5, 2.4, 2.3, 2.2, 2.1, 1.9, 1.5, 1.2, 1.0, 1.1, 1.2, 0.9, 0.8]


@pytest.mark.parametrize(
    ("losses", "steps", "ends"),
    [  # with a patience of 1, 2 and 3
        (SPIKE, 128, [48, 64, 128]),
        ([1.0] + [2.0] * 13, 128, [16, 24, 32]),  # the best one is in the head, and is kept
        # 20 updates: 2 is a tenth. Up to 10 updates all but the first count, as they always did.
        ([1.0, 2.0], 20, [2, 20, 20]),
        ([1.0, 2.0], 21, [21, 21, 21]),
        ([1.0, 2.0, 3.0], 21, [3, 21, 21]),
        ([1.0, 2.0], 10, [2, 10, 10]),
    ],
)
def test_patience_begins_after_a_tenth_of_the_updates(losses, steps, ends):
    """Updates 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128: 16 is the first that counts."""
    assert [end_of(losses, patience, steps) for patience in (1, 2, 3)] == ends


def test_evaluations_and_the_patience_that_they_allow():
    assert eval_steps(8) == [1, 2, 3, 4, 6, 8] and eval_steps(30, curve=False) == [30]
    assert set(eval_steps(30)[:-1]) <= set(eval_steps(1000)) and eval_steps(1) == [1]
    for steps in range(2, 200):  # a patience that is allowed can end a run before its last update
        for patience in range(1, 12):
            early = end_of([1.0] + [2.0] * 20, patience, steps) < steps
            assert early == (why_not_early(patience, steps, 4) == "")
    # a checkpoint of an earlier version resumes without counts of its first evaluations
    progress = Progress([])
    progress.load({"curve": [{"step": 1, "test_nll": 3.0}], "tokens": 5, "best": [2.0, 1, 2]})
    for step, loss in ((4, 2.0), (6, float("nan")), (8, 2.5)):  # equal is no better
        progress.best.note(step, loss)
    assert progress.state()["best"] == (2.0, 1)


NAME = "test_nll"


@pytest.fixture(scope="module")
def base():
    return small_world()[1]


def dataset(draw_by_seed=False, rule_shift=0.25):
    params = {"rule_shift": rule_shift, "new_exceptions": 0.0, "shift_rank": 2}
    sizes = {"n_test": 24, "n_test_curve": 8, "draw_by_seed": draw_by_seed, "exact_loss": True}
    return dataclasses.replace(tiny_spec().dataset, generator_params=params, **sizes)


@pytest.mark.numerics
def test_the_exact_loss_is_the_sum_by_hand(base, norms_in_float64):
    drawn = (data.load(dataset(draw_by_seed=True), [], draw=d).test for d in (100, 101))
    tests = [rows[:n] for rows, n in zip(drawn, (24, 10))]
    found = nll.evaluate_exact(base.model, [eval_batches(t, 256) for t in tests], "fp64", NAME)
    assert found[0] != found[1]
    for test, fast in zip(tests, found):
        tokens = torch.stack([torch.from_numpy(e.tokens).long() for e in test])
        log_q = base.model(input_ids=tokens).logits.detach()[:, 2:-1].log_softmax(-1)
        p = torch.stack([torch.from_numpy(e.truth.probabilities) for e in test]).double()
        by_hand = -(p * log_q).sum(-1)
        changed = torch.stack([torch.from_numpy(e.truth.changed) for e in test])
        for end, chosen in zip(nll.PARTS, (torch.ones_like(changed), changed, ~changed)):
            wanted = float(by_hand[chosen].mean())
            assert fast[NAME + end] == pytest.approx(wanted, rel=ROUNDING[1])
    test = data.load(dataset(rule_shift=1.0), []).test  # a part without contexts is NaN
    found = nll.evaluate_exact(base.model, [eval_batches(test, 256)], "fp64", NAME)[0]
    assert math.isnan(found[f"{NAME}_unchanged"]) and found[NAME] == found[f"{NAME}_changed"]


def test_a_run_records_parts_code_length_and_bits(base):
    """On a base that already knows the language: the exact loss lies above its floor."""
    spec = dataclasses.replace(tiny_spec(steps=6, precision="fp64"), dataset=dataset())
    loaded = data.load(spec.dataset, [])
    found = Trained(finetune([spec], base, loaded))
    result = found.results[spec.id]
    assert found.ends[spec.id] == "done"
    per_update = spec.batch_size * (spec.dataset.max_length - 3)
    nats = per_update * sum(record["train_nll"] for record in found.records[spec.id])
    assert result["code_nats"] == pytest.approx(nats, rel=1e-9)
    assert result["bits_generator"] == loaded.bits(6 * per_update)["generator"] > 0
    assert result["test_nll"] > result["floor_nats"] > 0 and 0 < result["changed_share"] < 1
    first, last = result["curve"][0], result["curve"][-1]
    assert {f"{NAME}{end}" for end in nll.PARTS} <= first.keys() & last.keys()
    assert last["test_nll_curve"] != last["test_nll"]  # 8 rows and 24
    (begun,) = nll.evaluate_exact(base.model, [eval_batches(loaded.test[:8], 256)], "fp64", NAME)
    assert first["test_nll_curve"] == result["nll_start_curve"] == pytest.approx(begun[NAME])
    assert result["nll_start_curve"] != result["nll_start"] == first["test_nll"]


def test_losses_of_rows_are_those_of_each_row_alone_and_add_up(base):
    drawn = ragged(longest=40)
    both = [drawn.train(0, 0, 9), drawn.train(1, 0, 3)]
    found = nll.row_nlls(base.model, both, [eval_batches(r, 64) for r in both], "fp64")
    for own, sums in zip(both, found):
        for i, value in zip(by_length(own), sums, strict=True):
            (alone,) = nll.evaluate(base.model, [eval_batches([own[i]], 64)], "fp64")
            assert value == pytest.approx(alone * own[i].loss.sum(), rel=ROUNDING[1])
        (mean,) = nll.evaluate(base.model, [eval_batches(own, 64)], "fp64")
        assert sums.sum() / sum(r.loss.sum() for r in own) == pytest.approx(mean, rel=ROUNDING[1])


def test_the_error_of_a_gain_is_that_of_a_mean_and_a_prompt_is_one_draw():
    """Where rows are alike; rows of one prompt, put together into one row, are the same draw."""
    before, after = np.array([3.0, 5.0, 4.0, 8.0]), np.array([2.0, 5.5, 1.0, 4.0])
    mean = (before - after) / 10
    found = nll.gain_se(before, after, np.full(4, 10))
    assert found == pytest.approx(mean.std(ddof=1) / 2, abs=1e-15)
    assert nll.gain_se(before, before, np.array([1, 2, 3, 4])) == 0
    assert math.isnan(nll.gain_se(before[:1], after[:1], np.array([3])))
    rng, prompts = np.random.default_rng(0), np.array([0, 1, 0, 2, 2, 2, 3])
    rows = (rng.gamma(9, 1, 7), rng.gamma(8, 1, 7), np.array([3, 5, 1, 2, 2, 9, 4]))
    joined = [np.array([x[prompts == k].sum() for k in range(4)]) for x in rows]
    assert nll.gain_se(*rows, prompts) == pytest.approx(nll.gain_se(*joined), rel=1e-12)
    assert nll.gain_se(*rows, range(7)) == pytest.approx(nll.gain_se(*rows), rel=1e-12)
    assert math.isnan(nll.gain_se(*rows, [0] * 7))


@pytest.mark.parametrize("n, least", [(4, 0.90), (8, 0.89), (32, 0.91)])
def test_an_interval_over_prompts_holds_the_gain_where_one_over_rows_does_not(n, least):
    """2,000 fleets of one: rows of unequal lengths with skewed gains. Of prompts with one to eight
    rows that share half of their spread; and of prompts with one row, where both intervals hold."""
    rng, holds = np.random.default_rng(n), np.zeros((2, 2))
    for most in (1, 8) * 2000:
        prompts = np.repeat(np.arange(n), rng.integers(1, most + 1, n))
        rows = len(prompts)
        tokens = np.maximum(1, np.round(np.exp(rng.normal(3.5, 0.5, rows))))
        shared, alone = ((rng.gamma(2, 1, k) - 2) / 2 for k in (n, rows))
        gains = tokens * (0.1 + 0.1 * (shared[prompts] + alone))
        gains += np.sqrt(tokens) * rng.normal(0, 0.3, rows)
        before = rng.gamma(9, 1, rows) * tokens
        missed = abs(gains.sum() / tokens.sum() - 0.1)
        for k, (units, by) in enumerate(((n, prompts), (rows, None))):
            error = nll.gain_se(before, before - gains, tokens, by)
            holds[int(most > 1), k] += missed <= stdtrit(units - 1, 0.975) * error
    (one_a, one_b), (many_a, many_b) = holds / 2000
    assert one_a == one_b and least < one_a < 0.97 and least < many_a < 0.97 and many_b < 0.82


def test_runs_measure_their_own_held_out_rows_and_retention(other_weights):
    spec, base, _ = small_world(lr=1e-2, steps=1)
    few = {"n_test": 24, "n_test_curve": 16}
    theirs = dataclasses.replace(spec.dataset, name="theirs", **few, n_retain=8)
    ours = dataclasses.replace(spec.dataset, name="ours", n_test=20, n_test_curve=16)
    with_retain = data.load(theirs, [])
    rows = [with_retain.test[0], *data.load(spec.dataset, []).test[1:20]]
    pack = [dataclasses.replace(spec, dataset=dataset) for dataset in (ours, theirs)]
    without = dataclasses.replace(with_retain, test=rows, retain=())
    both = {pack[0].id: without, pack[1].id: with_retain}
    found = as_alone(pack, base, both, other_weights(base))
    first, second = (found.results[one.id] for one in pack)
    assert "retain_nll" not in first
    # the base knows its own language better than the dialect
    assert second["retain_start"] < second["nll_start"] != first["nll_start"]


@pytest.mark.parametrize("rate", [5e-3, 3.0])
def test_only_a_far_too_high_rate_diverges_on_rows_harder_than_the_held_out_ones(rate):
    """The training rows are noise, while the held-out rows are what the base knows. Resumed, it ends
    as uninterrupted."""
    given = {"method": LoRA(rank=8), "batch_size": 8, "steps": 24, "eps": 1e-8, "lr": rate}
    spec, base, _ = small_world(**given)
    language = {"rule_shift": 0.0, "new_exceptions": 0.0}
    dataset = dataclasses.replace(spec.dataset, generator_params=language)
    rng = stream("noise", "train")
    rows = [Example(rng.integers(0, 32, 24).astype(np.int32), np.arange(24) > 8) for _ in range(64)]
    hard = Data(shuffled(dataset, rows), data.load(dataset, []).test, 64)
    spec = dataclasses.replace(spec, dataset=dataset)

    def trained(resume=None):
        base.at_start.clear()
        found = Trained(finetune([spec], base, hard, resume=resume), at=(5,))
        nlls = [r["train_nll"] for r in found.records[spec.id]]
        return found.ends[spec.id], found.results[spec.id], nlls, found.at.get(5)

    state, result, losses, middle = trained()
    assert result["divergence_rule"] == 2
    if rate == 3.0:  # at the first update with eight losses in a row above the bound
        above = [loss > 1.5 * max(losses[0], result["nll_start"]) for loss in losses]
        full = [step for step in range(8, len(above) + 1) if all(above[step - 8 : step])]
        assert state == "diverged" and full == [len(losses)] and len(losses) < 14
    else:
        assert state == "done" and result["steps_done"] == spec.steps
        assert min(losses[:9]) > 1.5 * result["nll_start"]  # the first nine: once called diverged
        assert losses[-1] < losses[0] - 0.5
    assert json.loads(json.dumps(middle[spec.id]["meta"]["first_nll"])) == losses[0]
    again = trained(middle)
    assert again[0] == state and again[2] == losses[5:]


@pytest.mark.parametrize(
    ("losses", "after"),
    [
        ([2.0] + [3.1] * 8, 9),  # above 3 from the second update on
        ([2.0] + [3.0] * 50, None),
        ([2.0, *[9.0] * 7, 2.9, *[9.0] * 8], 17),  # eight in a row
        ([4.81, 4.7, 4.6, *[4.5] * 20, 4.03], None),
        ([4.0, *[6.1] * 8], 9),
        ([0.9] + [2.0] * 20, None),  # one easy batch is not what the base can do
    ],
)
def test_a_divergence_by_hand_from_a_base_at_2(losses, after):
    rule = Measured(2.0)
    assert next((k for k, nll in enumerate(losses, 1) if rule.note(nll)), None) == after


@pytest.mark.parametrize(
    "given, after",
    [
        ([0.15, 0.1, *[0.15, 0.2] * 10], None),  # prompts harder than the held-out ones
        ([0.4, 0.3, *[0.1] * 8], 10),
        ([0.15] * 12 + [0.05] * 8, 20),
        ([0.4, 0.1, *[0.0] * 20], 9),  # in its first updates
        # the first updates alone count: one that has learned and falls back is no worse than the base
        ([0.15] * 8 + [0.9] * 20 + [0.1] * 20, None),
    ],
)
def test_a_collapse_is_judged_by_the_first_updates_and_resumed(given, after):
    def collapsed_after(signal, given):
        for k, reward in enumerate(given, 1):
            signal.note({"reward": reward}, 32)
            if signal.collapsed:
                return k

    assert collapsed_after(Signal(0.4), given) == after and FIRST_UPDATES == 8
    first, second = Signal(0.4), Signal(0.4)
    assert collapsed_after(first, given[:6]) is None
    second.load(json.loads(json.dumps(first.state())))
    assert collapsed_after(second, given[6:]) == (after and after - 6)


# ---------------------------------------------------------------- logits in chunks

VOCAB, LIMIT = 2048, 1 << 14
FAMILIES = {
    # plain heads; one tied to the embedding with a softcap; two that scale their logits; experts
    "Llama": {"tie_word_embeddings": False},
    "Qwen3": {"tie_word_embeddings": False},
    "Gemma2": {"tie_word_embeddings": True, "final_logit_softcapping": 0.5},
    "Cohere": {"tie_word_embeddings": True, "logit_scale": 0.3},
    "Granite": {"tie_word_embeddings": False, "logits_scaling": 3.0},
    "Qwen3Moe": {
        **{"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2},
        "experts_implementation": "eager",  # the grouped product has no float64
    },
}
LENGTHS = (150, 70, 5)
LORA = [LoRA(rank=2, layers="attention"), LoRA(rank=3, layers="attention")]
both_methods = pytest.mark.parametrize("methods", [LORA, [FullFT()]], ids=["lora", "fullft"])


def model_of(family):
    return training.family_model(family, vocab_size=VOCAB, **FAMILIES[family]).double()


def batch_of(n_runs, lengths=(40, 17)):
    rng = np.random.default_rng(0)
    parts = []
    for k in range(n_runs):
        rows = [rng.integers(VOCAB - 1, size=n + 5 * k).astype(np.int32) for n in lengths]
        examples = [Example(r, np.arange(len(r)) >= 3 + k) for r in rows]
        parts.append(collate(examples))
    return merge(parts)


def loss_and_gradients(model, trainables, batch):
    sums = nll.nll_sums(model, batch, "fp64")
    (sums * torch.arange(1.0, len(sums) + 1)).sum().backward()
    gradients = [p.grad for p in trainables.parameters().values()]
    model.zero_grad()
    return sums.detach(), gradients


@pytest.mark.parametrize("family", FAMILIES)
@both_methods
def test_chunks_have_the_loss_and_gradients_of_whole_logits(monkeypatch, family, methods):
    model, batch = model_of(family), batch_of(len(methods), LENGTHS)
    trainables, found = training.pack_of(methods, model, perturb=0.02), []
    for limit in (1 << 24, LIMIT):
        monkeypatch.setattr(nll, "LOGITS", limit)
        loss, gradients = loss_and_gradients(model, trainables, batch)
        with torch.no_grad():
            assert training.apart(nll.nll_sums(model, batch, "fp64"), loss) < 1e-13
        log_p = nll.token_log_p(model, batch, "fp64")
        found.append([loss, log_p, *nll.log_probabilities(model, batch, "fp64"), *gradients])
    assert any(float(gradient.abs().max()) > 0 for gradient in gradients)
    assert max(map(training.apart, *found)) < 1e-9
    assert training.apart(found[0][0], found[1][0]) < 1e-12


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@both_methods
def test_logits_are_never_whole(monkeypatch, methods):
    model, batch = model_of("Qwen3"), batch_of(len(methods))
    trainables, sizes = training.pack_of(methods, model, perturb=0.02), {}
    for limit in (1 << 24, LIMIT):
        monkeypatch.setattr(nll, "LOGITS", limit)
        with Largest() as largest:
            loss_and_gradients(model, trainables, batch)
            nll.evaluate(model, [[batch_of(1)]] * len(methods), "fp64")
        sizes[limit] = largest.numel
    whole = 2 * len(methods) * 37 * VOCAB
    assert sizes[1 << 24] >= whole > 3 * sizes[LIMIT] and sizes[LIMIT] <= max(LIMIT, VOCAB * 16)
    assert memory.CHUNK_LOGITS == nll.GPU_LOGITS  # the plan's


def test_a_model_that_hides_its_decoder_is_refused():
    class Other(nn.ModuleDict):
        base_model_prefix = "model"

        def forward(self, inputs_embeds, use_cache):
            return SimpleNamespace(logits=self.head(inputs_embeds))

    decoder = nn.Identity()
    other = Other({"model": decoder, "head": nn.Linear(4, 8)})
    with pytest.raises(ModelError, match="Choose another model"):
        logits_of(other, torch.zeros(1, 2, 4))
    assert other.model is decoder


def test_padded_rows_need_no_mask():
    """Without one, attention takes its fast path, and the plan counts none."""
    model, batch = model_of("Qwen3"), batch_of(2, LENGTHS)
    saved = training.saved_for_backward(model, lambda: nll.nll_sums(model, batch, "fp64"))
    entries = [t.untyped_storage().nbytes() // t.element_size() for t in saved]
    rows, side = 2 * len(LENGTHS), batch.tokens_NRT.shape[2]
    assert rows * side**2 not in entries and max(entries) > rows * side

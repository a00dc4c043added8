"""A pack is its runs alone, to rounding, whatever their data sets, lengths and ends; runs that end by
their held-out loss: resumed, and with their best weights."""

import dataclasses

import numpy as np
import pytest
import torch

from lorasweep.launch.trainer import finetune
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.plan.detect import Hardware
from lorasweep.plan.load import checkpoint_bytes
from lorasweep.plan.planner import pack_key, place
from lorasweep.spec.metric import Best, eval_steps, no_better, why_not_early
from lorasweep.train.loop import Progress
from tests.training import (
    ROUNDING,
    Trained,
    as_alone,
    copied,
    customer,
    moved,
    ragged,
    run,
    small_world,
    worst,
)


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
        after = copied(event.snapshot())
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
def test_the_first_update_is_computed_once_for_all_learning_rates(
    world, other_weights, micro_batch
):
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
    for weights in (base, moved(base)):
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
def made():
    spec, base, _ = small_world(batch_size=4)
    made = []
    for name, (train, longest, steps, lr, rank) in CUSTOMERS.items():
        changes = {"steps": steps, "lr": lr, "method": LoRA(rank=rank)}
        made.append(customer(spec, name, longest, train, 4, 3, curve=2, **changes))
    return base, [s for s, _ in made], {s.id: d for s, d in made}


@pytest.fixture
def fleet(made):
    made[0].at_start.clear()
    return made


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

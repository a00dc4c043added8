"""A pack is its runs alone, to rounding, whatever their data sets, lengths and ends."""

import dataclasses
import itertools
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from lorasweep.launch.trainer import finetune
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.train.objectives import nll, sft
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


@pytest.mark.slow
def test_in_float32_packing_is_far_within_the_noise_between_seeds():
    """Sixteen runs of four ranks and four seeds: the first losses agree to rounding, the final
    held-out loss to a twentieth of the noise between seeds."""
    spec, base, rows = small_world(lr=3e-3, steps=10, precision="fp32", eps=1e-8)
    settings = itertools.product((1, 4, 8, 16), range(4))
    pack = [dataclasses.replace(spec, method=LoRA(rank=r), seed=s) for r, s in settings]
    _, together = run(pack, base, rows)
    noise = np.std([together[one.id][-1]["test_nll"] for one in pack[4:8]], ddof=1)
    for one in (pack[5], pack[-1]):
        ours, theirs = together[one.id], run([one], base, rows)[1][one.id]
        for a, b in zip(ours[:5], theirs[:5]):
            assert a["train_nll"] == pytest.approx(b["train_nll"], abs=1e-5)
        assert abs(ours[-1]["test_nll"] - theirs[-1]["test_nll"]) < noise / 20


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


def test_only_runs_that_are_due_are_measured(fleet, monkeypatch):
    """Runs in held-out passes, from the fourth update on: those that are due, of one data set."""
    base, pack, data = fleet
    twin = dataclasses.replace(pack[2], lr=2 * pack[2].lr)
    pack, data = [*pack, twin], {**data, twin.id: data[pack[2].id]}
    passes = Mock(wraps=nll)
    for name in ("evaluate", "row_nlls"):
        monkeypatch.setattr(sft, name, getattr(passes, name))
    # the end of a run: its test rows, then its validation rows
    wanted = {4: [1, 2, 1], 5: [], 6: [2, 2, 1, 1], 7: [1, 1], 8: [1], 9: [1, 1]}
    for event in finetune(pack, base, data):
        found = [len(call.args[1]) for call in passes.method_calls]
        assert event.step < 4 or found == wanted[event.step]
        passes.reset_mock()


def test_nothing_of_one_customers_rows_is_in_what_another_gets(fleet, monkeypatch):
    """A symbol planted in one customer's rows: in no row of the batches that others are trained and
    measured on, and with or without it, all that others get is the same, bit for bit."""
    base, pack, data = fleet
    owner, sums = pack[2], Mock(wraps=nll.nll_sums)
    mine = data[owner.id]

    def with_secret(examples):
        return [dataclasses.replace(e, tokens=np.full_like(e.tokens, SECRET)) for e in examples]

    for module in (sft, nll):
        monkeypatch.setattr(module, "nll_sums", sums)
    held_out = {"test": with_secret(mine.test), "validation": with_secret(mine.validation)}
    planted = dataclasses.replace(mine, train=lambda *at: with_secret(mine.train(*at)), **held_out)
    found = []
    for rows in (mine, planted):
        base.at_start.clear()
        sums.reset_mock()
        found.append(Trained(finetune(pack, base, {**data, owner.id: rows})))
    clean, secret = found
    assert worst(clean.states[owner.id], secret.states[owner.id]) > 0
    for one in pack[:2] + pack[3:]:
        tensors = (found.states[one.id]["tensors"] for found in (clean, secret))
        assert all(a.equal(b) for a, b in zip(*map(dict.values, tensors), strict=True))
        for a, b in zip(clean.records[one.id], secret.records[one.id], strict=True):
            assert all(a[k] == b[k] for k in a.keys() | b.keys() if not k.endswith("_s"))
    seen = [call.args[1] for call in sums.call_args_list]
    holds = [(b.tokens_NX == SECRET).any(1) | (b.targets_NM == SECRET).any(1) for b in seen]
    full = [h for h in holds if len(h) == len(pack)]
    assert full and all(h.tolist() == [False, False, True, False] for h in full)
    assert all(h.sum() <= 1 for h in holds)

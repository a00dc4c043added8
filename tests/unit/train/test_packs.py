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
from tests.training import ROUNDING, Trained, copied, moved, noise, ragged, run, small_world, worst


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
    other = other_weights(models.load(spec.model, [], "fp64"))
    pack = [
        dataclasses.replace(spec, lr=lr, seed=seed, method=LoRA(rank=rank, alpha=32.0))
        for rank, seed, lr in [(2, 0, 1e-3), (2, 1, 2e-3), (2, 0, 2e-3), (4, 0, 1e-3), (4, 0, 3e-3)]
    ]
    trained_rows = []

    def count(module, args, kwargs):
        if torch.is_grad_enabled():
            trained_rows[-1] += len(kwargs["input_ids"])

    with base.model.base_model.register_forward_pre_hook(count, with_kwargs=True):
        trained_rows.append(0)
        states = []
        for event in finetune(pack, base, rows, micro_batch):
            states.append((event.records, copied(event.snapshot())))
            trained_rows.append(0)
            if event.step == 2:
                break
    assert trained_rows[:2] == [3 * spec.batch_size, 5 * spec.batch_size]
    for one in pack:
        alone = finetune([one], other, rows, micro_batch)
        for records, state in states:
            event = next(alone)
            assert worst(event.snapshot()[one.id], state[one.id]) < ROUNDING[10]
            for name in ("tokens", "examples"):
                assert records[one.id][name] == event.records[one.id][name]
            for name in ("train_nll", "grad_norm"):
                assert records[one.id][name] == pytest.approx(event.records[one.id][name], rel=1e-9)


def test_a_run_that_the_caller_drops_is_trained_no_further(world):
    spec, base, rows = world
    pack = mixed(dataclasses.replace(spec, steps=6), 3)

    def dropping(pack, step):
        for event in finetune(pack, base, rows):
            if event.step == step:
                event.dropped.add(pack[len(pack) // 2].id)
            yield event

    found = Trained(dropping(pack, 2))
    assert [len(found.records[s.id]) for s in pack] == [6, 2, 6] and pack[1].id not in found.states
    alone, _ = run([pack[2]], base, rows)
    assert worst(alone[pack[2].id], found.states[pack[2].id]) < ROUNDING[10]
    one = dataclasses.replace(spec, method=FullFT(), lr=1e-3)
    assert len(list(dropping([one], 1))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("text", [False, pytest.param(True, marks=pytest.mark.numerics)])
def test_ten_updates_of_a_pack_are_those_of_its_runs_alone(world, text):
    """Of four ranks and three data orders, so that ragged rows have other widths in the pack; one
    ends early, and two resume from the fifth update as another pack."""
    spec, base, rows = world
    rows = ragged(longest=40) if text else rows
    pack = mixed(dataclasses.replace(spec, weight_decay=0.1, clip_norm=0.5), 8)
    pack[5] = dataclasses.replace(pack[5], steps=8)
    found = Trained(finetune(pack, base, rows), at=(5,))
    together, middle = found.states, found.at[5]
    for weights in (base, moved(base)):
        for one in pack[::5]:
            alone, _ = run([one], weights, rows)
            assert worst(alone[one.id], together[one.id]) < ROUNDING[10]
        some = pack[3:7:3]
        rest, _ = run(some, weights, rows, resume={s.id: middle[s.id] for s in some})
        for one in some:
            assert worst(rest[one.id], together[one.id]) < ROUNDING[10]


@pytest.mark.numerics
@pytest.mark.parametrize("method", [LoRA(rank=4), FullFT()])
def test_micro_batches_change_nothing(world, method, norms_in_float64, other_weights):
    spec, base, rows = world
    spec = dataclasses.replace(spec, method=method, lr=1e-3, steps=6, batch_size=4)
    whole, _ = run([spec], base, rows)
    for micro in (1, 3):
        parts, _ = run([spec], other_weights(base), rows, micro_batch_size=micro)
        assert worst(whole[spec.id], parts[spec.id]) < ROUNDING[10], micro


def test_a_diverging_run_leaves_and_disturbs_no_other(world, norms_in_float64):
    spec, base, rows = world
    steady, wild = (dataclasses.replace(spec, lr=lr, steps=10) for lr in (1e-3, 3.0))
    found = Trained(finetune([wild, steady], base, rows))
    assert [found.ends[s.id] for s in (wild, steady)] == ["diverged", "done"]
    assert len(found.records[wild.id]) < len(found.records[steady.id]) == 10
    for weights in (base, moved(base)):
        alone, _ = run([steady], weights, rows)
        assert worst(alone[steady.id], found.states[steady.id]) < ROUNDING[10]


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
"""A symbol of the vocabulary that `noise` leaves out: only the rows of one customer hold it."""


def customer(spec, name):
    count, longest, steps, rate, rank = CUSTOMERS[name]
    dataset = dataclasses.replace(spec.dataset, name=name, n_test=4, n_test_curve=2)
    data = noise(dataset, longest, train=count, test=4, validation=3)
    changes = {"dataset": dataset, "steps": steps, "lr": rate, "method": LoRA(rank=rank)}
    return dataclasses.replace(spec, **changes), data


@pytest.fixture(scope="module")
def made():
    spec, base, _ = small_world(batch_size=4)
    made = [customer(spec, name) for name in CUSTOMERS]
    return base, [s for s, _ in made], {s.id: d for s, d in made}


@pytest.fixture
def fleet(made):
    made[0].at_start.clear()
    return made


@pytest.mark.parametrize("rows", [pytest.param(None, marks=pytest.mark.numerics), 3])
def test_each_data_set_trains_and_measures_as_alone_until_it_is_done(fleet, rows, other_weights):
    base, pack, data = fleet
    together, records = run(pack, base, data, micro_batch_size=rows)
    for one in pack:
        base.at_start.clear()
        alone, own = run([one], other_weights(base), {one.id: data[one.id]})
        assert worst(alone[one.id], together[one.id]) < ROUNDING[10]
        assert len(records[one.id]) == len(own[one.id]) == one.steps
        for ours, theirs in zip(records[one.id], own[one.id]):
            assert ours.keys() == theirs.keys()
            names = ["train_nll", "test_nll", "test_nll_curve", "gain_se", "grad_norm", "tokens"]
            own_numbers, wanted = ([r.get(n, 0.0) for n in names] for r in (ours, theirs))
            assert own_numbers == pytest.approx(wanted, rel=ROUNDING[10])


def test_validation_rows_are_measured_during_training_and_test_rows_only_at_the_end(fleet):
    base, pack, data = fleet
    one, last = pack[1], []
    for test in (data[one.id].test, data[pack[0].id].test):
        base.at_start.clear()
        _, records = run([one], base, {one.id: dataclasses.replace(data[one.id], test=test)})
        last.append(records[one.id])
    for a, b in zip(last[0][:-1], last[1][:-1]):
        assert a.get("test_nll") == b.get("test_nll")
    first, second = (records[-1] for records in last)
    assert first["test_nll"] != second["test_nll"]
    assert first["test_nll_curve"] == second["test_nll_curve"]


def test_only_runs_that_are_due_are_measured(fleet, monkeypatch):
    """Runs in held-out passes, from the fourth update on: those that are due, of one data set."""
    base, pack, data = fleet
    twin = dataclasses.replace(pack[2], lr=2 * pack[2].lr)
    pack, data = [*pack, twin], {**data, twin.id: data[pack[2].id]}
    measured = []

    def watched(function):
        def measure(model, rows, *more):
            measured.append(len(rows))
            return function(model, rows, *more)

        return measure

    for name in ("evaluate", "row_nlls"):
        monkeypatch.setattr(sft, name, watched(getattr(nll, name)))
    passes = {}
    for event in finetune(pack, base, data):
        passes[event.step], measured = measured, []
    # the end of a run: its test rows, then its validation rows
    wanted = {4: [1, 2, 1], 5: [], 6: [2, 2, 1, 1], 7: [1, 1], 8: [1], 9: [1, 1]}
    assert {s: n for s, n in passes.items() if s > 3} == wanted


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
        found.append(run(pack, base, {**data, owner.id: rows}))
    (clean, clean_records), (states, records) = found
    assert worst(clean[owner.id], states[owner.id]) > 0
    timed = ("step_s", "tokens_per_s")
    for one in pack[:2] + pack[3:]:
        for name, tensor in states[one.id]["tensors"].items():
            assert tensor.equal(clean[one.id]["tensors"][name])
        for a, b in zip(records[one.id], clean_records[one.id]):
            assert all(a[k] == b[k] for k in a.keys() | b.keys() if k not in timed)
    seen = [call.args[1] for call in sums.call_args_list]
    holds = [(b.tokens_NX == SECRET).any(1) | (b.targets_NM == SECRET).any(1) for b in seen]
    full = [h for h in holds if len(h) == len(pack)]
    assert full and all(h.tolist() == [False, False, True, False] for h in full)
    assert all(h.sum() <= 1 for h in holds)

"""Packs whose members have data sets of their own: of other rows, lengths, numbers and steps."""

import dataclasses

import numpy as np
import pytest

from lorasweep.data.examples import Data, Example, shuffled
from lorasweep.launch.trainer import finetune
from lorasweep.methods.lora import LoRA
from lorasweep.models import load as models
from lorasweep.spec.streams import stream
from lorasweep.train.objectives import held_out, sft
from lorasweep.train.objectives.nll import nll_sums
from tests.training import EPS, ROUNDING, copied, run, worst
from tests.world import tiny_spec

CUSTOMERS = {"few": (5, 12, 3), "many": (40, 30, 9), "long": (12, 70, 6), "one": (1, 20, 7)}
"""Name: training rows, longest row, steps."""
SECRET = 31
"""A symbol that only the rows of one customer hold."""


def rows_of(name, count, longest, split):
    rng = stream(name, split)
    found = []
    for _ in range(count):
        tokens = rng.integers(0, SECRET, rng.integers(5, longest + 1)).astype(np.int32)
        found.append(Example(tokens, np.arange(len(tokens)) > len(tokens) // 3))
    return found


def customer(spec, name, validation=True):
    """A customer's run, and its data."""
    count, longest, steps = CUSTOMERS[name]
    dataset = dataclasses.replace(spec.dataset, name=name, n_test=4, n_test_curve=2)
    data = Data(
        shuffled(dataset, rows_of(name, count, longest, "train")),
        rows_of(name, 4, longest, "test"),
        count,
        validation=rows_of(name, 3, longest, "validation") if validation else (),
    )
    rates = {"few": 1e-3, "many": 2e-3, "long": 4e-3, "one": 2e-3}
    rank = 8 if name == "one" else 4
    changes = {"dataset": dataset, "steps": steps, "lr": rates[name], "method": LoRA(rank=rank)}
    return dataclasses.replace(spec, **changes), data


@pytest.fixture(scope="module")
def world():
    spec = tiny_spec(precision="fp64", method=LoRA(rank=4), batch_size=4, eps=EPS)
    return spec, models.load(spec.model, ["/nonexistent"], "fp64")


def everyone(spec, **how):
    made = [customer(spec, name, **how) for name in CUSTOMERS]
    return [s for s, _ in made], {s.id: d for s, d in made}


@pytest.mark.parametrize("rows", [pytest.param(None, marks=pytest.mark.numerics), 3])
def test_each_is_trained_and_measured_as_alone_and_leaves_when_it_is_done(
    world, rows, other_weights
):
    spec, base = world
    pack, data = everyone(spec)
    base.at_start.clear()
    together, records = run(pack, base, data, micro_batch_size=rows)
    for member in pack:
        base.at_start.clear()
        alone, own = run([member], other_weights(base), {member.id: data[member.id]})
        assert worst(alone[member.id], together[member.id]) < ROUNDING[10]
        assert len(records[member.id]) == len(own[member.id]) == member.steps
        for ours, theirs in zip(records[member.id], own[member.id]):
            for name in (
                "train_nll",
                "test_nll",
                "test_nll_curve",
                "gain_se",
                "grad_norm",
                "tokens",
            ):
                assert (name in ours) == (name in theirs)
                assert ours.get(name, 0.0) == pytest.approx(theirs.get(name, 0.0), rel=ROUNDING[10])


def test_validation_rows_are_measured_on_the_way_and_test_rows_only_at_the_end(world):
    spec, base = world
    base.at_start.clear()
    member, data = customer(spec, "many")
    other = dataclasses.replace(data, test=rows_of("other", 4, 30, "test"))
    _, first = run([member], base, {member.id: data})
    base.at_start.clear()
    _, second = run([member], base, {member.id: other})
    for a, b in zip(first[member.id][:-1], second[member.id][:-1]):
        assert a.get("test_nll") == b.get("test_nll")
    last, changed = first[member.id][-1], second[member.id][-1]
    assert last["test_nll"] != changed["test_nll"]
    assert last["test_nll_curve"] == changed["test_nll_curve"]


def test_a_member_is_measured_when_it_is_due_and_not_for_anothers_sake(world, monkeypatch):
    """Members of held-out passes, from the fourth update on: those that are due, of one data set."""
    spec, base = world
    pack, data = everyone(spec)
    twin = dataclasses.replace(pack[2], lr=2 * pack[2].lr)
    pack, data = [*pack, twin], {**data, twin.id: data[pack[2].id]}
    base.at_start.clear()
    measured = []

    def watched(function):
        def measure(model, rows, *more):
            measured.append(len(rows))
            return function(model, rows, *more)

        return measure

    for name in ("evaluate", "row_nlls"):
        monkeypatch.setattr(sft, name, watched(getattr(held_out, name)))
    passes = {}
    for event in finetune(pack, base, data):
        passes[event.step], measured = measured, []
    # the end of a run: its test rows, then its validation rows
    assert {s: n for s, n in passes.items() if s > 3} == {
        4: [1, 2, 1],
        5: [],
        6: [2, 2, 1, 1],
        7: [1, 1],
        8: [1],
        9: [1, 1],
    }


def test_a_pack_goes_on_in_its_company_bit_for_bit(world):
    """From a checkpoint after a member has left."""
    spec, base = world
    pack, data = everyone(spec)
    whole, middle = {}, {}
    for event in finetune(pack, base, data):
        if event.ended:
            whole |= copied(event.snapshot())
        if event.step == 5:
            middle = copied(event.snapshot())
    rest = [s for s in pack if s.id in middle]
    assert len(rest) == 3
    again, _ = run(rest, base, {s.id: data[s.id] for s in rest}, resume=middle)
    for member in rest:
        tensors = whole[member.id]["tensors"]
        for name, tensor in again[member.id]["tensors"].items():
            assert tensor.equal(tensors[name]), name


def test_nothing_of_one_customers_rows_is_in_what_another_gets(world, monkeypatch):
    """A symbol planted in one customer's rows: in no row of the batches that others are trained and
    measured on, and with or without it, all that others get is the same, bit for bit."""
    spec, base = world
    pack, data = everyone(spec)
    owner = pack[2]

    def with_secret(examples):
        return [dataclasses.replace(e, tokens=np.full_like(e.tokens, SECRET)) for e in examples]

    mine = data[owner.id]
    planted = dataclasses.replace(
        mine,
        train=lambda *at: with_secret(mine.train(*at)),
        test=with_secret(mine.test),
        validation=with_secret(mine.validation),
    )
    seen, of = [], {s.id: k for k, s in enumerate(pack)}

    def watched(model, batch, precision):
        seen.append(batch)
        return nll_sums(model, batch, precision)

    for module in ("sft", "held_out"):
        monkeypatch.setattr(f"lorasweep.train.objectives.{module}.nll_sums", watched)
    base.at_start.clear()
    clean, clean_records = run(pack, base, data)
    base.at_start.clear()
    seen.clear()
    states, records = run(pack, base, {**data, owner.id: planted})
    timed = ("step_s", "tokens_per_s")
    for member in pack:
        if member is owner:
            assert worst(clean[member.id], states[member.id]) > 0
            continue
        for name, tensor in states[member.id]["tensors"].items():
            assert tensor.equal(clean[member.id]["tensors"][name])
        for a, b in zip(records[member.id], clean_records[member.id]):
            assert {k: v for k, v in a.items() if k not in timed} == {
                k: v for k, v in b.items() if k not in timed
            }
    holds = [
        (batch.tokens_NX == SECRET).any(1) | (batch.targets_NM == SECRET).any(1) for batch in seen
    ]
    full = [h for h in holds if len(h) == len(pack)]
    assert full and all(h.tolist() == [k == of[owner.id] for k in range(len(pack))] for h in full)
    assert all(h.sum() <= 1 for h in holds)

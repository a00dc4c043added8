"""What sweeps take: fresh seeds, shared runs, packs, what is left out and what does not fit."""

import dataclasses

import pytest

from lorasweep.errors import SpecError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.plan import forecast as planning
from lorasweep.plan.forecast import Forecaster, hours_of, refuse_unfit, settings_of
from lorasweep.plan.hardware import Hardware
from lorasweep.plan.placement import Misfit
from lorasweep.spec.execution import Exec
from lorasweep.sweep.grid import Point
from lorasweep.sweep.question import Replicates
from tests.unit.plan.test_placement import card, spec_of

RATES = (1e-4, 2e-4, 4e-4)


def points(arm, method, model="llama-3.1-8b", seeds=(0,), **changes):
    return [
        Point(arm, spec_of(model, method, lr=lr, seed=seed, **changes))
        for lr in RATES
        for seed in seeds
    ]


def forecast(runs, second=None, **settings):
    return Forecaster(card(), Exec(**settings)).forecast("mine", runs, second or Replicates())


def test_a_sweep_takes_what_its_runs_take_alone():
    runs = points("lora", LoRA(rank=16))
    found = forecast(runs)
    ((kind, where, n),) = found.placed()
    assert (n, found.n_runs, found.packs, found.jobs(120)) == (3, 3, 3, 3)
    assert found.gpu_hours == pytest.approx(3 * where.seconds / 3600)
    spec = runs[0].spec
    assert found.tokens == 3 * spec.steps * spec.batch_size * round(0.4 * 1024)
    assert hours_of(kind, where, 2) == pytest.approx(found.gpu_hours * 2 / 3)


def test_ways_to_share_a_rank_among_experts_cost_apart():
    made = Forecaster(card(), Exec())
    kinds = [
        made.kind(spec_of("qwen3-30b-a3b-base", LoRA(rank=128, expert_rank=way)))
        for way in ("active", "all", "whole")
    ]
    assert len({id(k) for k in kinds}) == 3
    hours = [k.place.gpu_hours for k in kinds]
    assert hours[1] < hours[0] < hours[2]


def test_fresh_seeds_of_the_second_stage_are_counted_once():
    runs = points("fullft", FullFT()) + points("lora", LoRA(rank=16), seeds=(0, 1))
    found = forecast(runs, Replicates(seeds=[1, 2], n_lrs=2))
    assert found.n_runs == 9 + 2 * 2 + 1 * 2  # the adapters have seed 1 at every rate already
    first, second = found.stage_hours()
    assert first + second == pytest.approx(found.gpu_hours) and second > 0
    one_arm = forecast(runs, Replicates(seeds=[1, 2], n_lrs=9, arms=["fullft"]))
    assert one_arm.n_runs == 9 + 3 * 2


def test_runs_that_sweeps_share_count_once_in_a_total():
    made = Forecaster(card(), Exec())
    second = Replicates(seeds=[1], n_lrs=1)
    one = made.forecast("one", points("lora", LoRA(rank=16)), second)
    two = made.forecast("two", points("other", LoRA(rank=16), steps=10), second)
    total = made.total([one, one, two])
    assert total.n_runs == one.n_runs + two.n_runs == 8
    assert total.gpu_hours == pytest.approx(one.gpu_hours + two.gpu_hours)


def test_small_batches_train_in_packs_over_one_base():
    runs = points("lora", LoRA(rank=16), batch_size=8)
    found, alone = forecast(runs), forecast(runs, pack_size=1)
    ((kind, where, _),), ((_, apart, _),) = found.placed(), alone.placed()
    assert kind.pack_size > 1 and (found.packs, alone.packs) == (1, 3)
    assert alone.gpu_hours >= found.gpu_hours
    assert where.memory["frozen weights"] == apart.memory["frozen weights"]


def test_runs_beyond_max_gpus_are_priced_apart():
    runs = points("lora", LoRA(rank=16)) + points("fullft", FullFT(), "llama-3.1-70b")
    all_of_them = forecast(runs)
    found = forecast(runs, max_gpus=16)
    ((kind, where, n),) = found.placed(left_out=True)
    assert (kind.label, where.layout.gpus, n) == ("fullft of llama-3.1-70b", 32, 3)
    assert found.n_runs == 3 and not found.misfits()
    assert found.gpu_hours + hours_of(kind, where, n) == pytest.approx(all_of_them.gpu_hours)


def test_runs_beyond_the_limit_are_left_out_and_others_must_fit_as_they_are_trained():
    small = points("lora", LoRA(rank=16))
    large = points("lora", LoRA(rank=16), "llama-3.1-70b")
    full = points("fullft", FullFT())
    assert planning.without_too_large([*small, *large], card(), Exec(max_gpus=1)) == small
    assert planning.without_too_large([*small, *large], card(), Exec()) == [*small, *large]
    refuse_unfit(small, card(), Exec())
    with pytest.raises(SpecError, match=r"lora of llama-3.1-70b takes .* exec.world_size=4"):
        refuse_unfit(large, card(), Exec())
    with pytest.raises(SpecError, match=r"world_size=4 .*activation_checkpointing=true"):
        refuse_unfit([*small, *full], card(), Exec())
    refuse_unfit(full, card(), Exec(world_size=4, activation_checkpointing=True))


def test_settings_are_the_plans_unless_the_user_set_them():
    runs = [*points("lora", LoRA(rank=16)), *points("fullft", FullFT())]
    (one, adapters), (four, full) = settings_of(runs, card(), Exec(runs_dir="mine"))
    assert (adapters, full) == (runs[:3], runs[3:]) and one.runs_dir == "mine"
    assert (one.world_size, four.world_size, four.activation_checkpointing) == (1, 4, True)
    for spec, exec_ in ((adapters[0].spec, one), (full[0].spec, four)):
        layout = Forecaster(card(), Exec()).kind(spec).place.layout
        assert (exec_.micro_batch_size, exec_.world_size) == (layout.rows, layout.gpus)
    ((eight, both),) = settings_of(runs, card(), Exec(world_size=8, micro_batch_size=1))
    assert both == runs and (eight.world_size, eight.micro_batch_size) == (8, 1)
    nowhere = Hardware("box", gpus=8)
    assert settings_of(runs, nowhere, Exec()) == [(Exec(), runs)]


def test_what_does_not_fit_is_told_and_an_unknown_precision_refused():
    runs = points("fullft", FullFT(), batch_size=3)
    ((kind, misfit, n),) = forecast(runs).misfits()
    assert isinstance(misfit, Misfit) and n == 3 and kind.label == "fullft of llama-3.1-8b"
    hardware = dataclasses.replace(card(), matmul_flops_s={"bf16": 1e14})
    with pytest.raises(SpecError, match=r"no speed in fp32\. Add matmul_flops_s\.fp32"):
        Forecaster(hardware, Exec()).kind(spec_of(precision="fp32"))

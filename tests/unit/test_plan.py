"""The planner: packs by what was measured, no packing where it does not pay, memory, GPUs."""

import dataclasses
import json

import pytest

from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.plan import flops as cost
from lorasweep.plan import hardware as machine
from lorasweep.plan import packing as plan
from lorasweep.plan import throughput as calibrate
from lorasweep.store.run_store import RunStore
from tests.world import tiny_spec


@pytest.fixture
def asked(compose):
    return compose("+sweep=lr_ratio", "scale=smoke", "sweep.arms.lora.lr=${around:1e-3,16,1.3}")


def measured(exec_, spec, step_s):
    """Keep a calibration as if this machine had made it."""
    path = calibrate._path(spec, exec_)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"step_s": step_s}))


def packs(asked, tmp_path):
    now = plan.make_plan(asked.points, RunStore(tmp_path), asked.exec)
    return now, [len(p.points) for p in now.packs if p.points[0].arm == "lora"]


@pytest.mark.parametrize(
    "step_s, sizes",
    [
        ({1: 0.010, 2: 0.008, 4: 0.007, 8: 0.0069}, [4] * 4),  # 8 gains less than noise
        ({1: 0.010, 2: 0.011}, [1] * 16),  # packing does not pay: refused
        (
            {1: 0.010, 2: 0.009, 4: 0.008, 8: 0.006, 16: 0.005},
            [16],
        ),  # full fine-tuning keeps the other worker busy
    ],
)
def test_pack_sizes_are_what_was_measured_to_pay(asked, tmp_path, monkeypatch, step_s, sizes):
    monkeypatch.setattr(machine, "cores", lambda: 2)
    lora = next(p.spec for p in asked.points if p.arm == "lora")
    measured(asked.exec, lora, step_s)
    assert packs(asked, tmp_path)[1] == sizes


def test_a_calibration_of_another_machine_or_model_is_not_used(asked, tmp_path, monkeypatch):
    lora = next(p.spec for p in asked.points if p.arm == "lora")
    measured(asked.exec, lora, {1: 0.010, 2: 0.011})
    assert calibrate.known(lora, asked.exec) is not None
    assert calibrate.known(dataclasses.replace(lora, batch_size=5), asked.exec) is None
    assert calibrate.known(dataclasses.replace(lora, method=LoRA(rank=2)), asked.exec) is None
    assert calibrate.known(dataclasses.replace(lora, lr=0.5, seed=3), asked.exec) is not None
    monkeypatch.setattr(machine, "cores", lambda: 64)
    assert calibrate.known(lora, asked.exec) is None


def test_a_plan_says_what_it_expects_and_why(asked, tmp_path):
    from lorasweep.cli.actions import _plan_text

    for spec in {p.arm: p.spec for p in asked.points}.values():
        measured(
            asked.exec, spec, {1: 0.010, 2: 0.012} if spec.method.name == "lora" else {1: 0.02}
        )
    now, _ = packs(asked, tmp_path)
    text = _plan_text(asked, now)
    assert now.basis == "calibrated" and "packing does not pay" in text and "GiB" in text


@pytest.mark.parametrize(
    "precision, slow, said", [("bf16", True, True), ("bf16", False, False), ("fp32", True, False)]
)
def test_bf16_on_a_processor_without_it_is_said_and_counted(
    compose, tmp_path, monkeypatch, precision, slow, said
):
    from lorasweep.cli.actions import _plan_text

    monkeypatch.setattr(machine, "slow_bf16", lambda: slow)
    found = compose("+sweep=lr_ratio", "scale=smoke", f"precision={precision}")
    now = plan.make_plan(found.points, RunStore(tmp_path), found.exec)
    assert ("no bf16 instructions" in _plan_text(found, now)) == said
    rate = {(True, "bf16"): 7e8, (False, "bf16"): 2.5e11, (True, "fp32"): 6e10}[slow, precision]
    assert now.hours * 3600 * machine.cores() * rate == pytest.approx(now.flops)


def test_no_worker_is_left_without_a_pack(compose, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 4)
    alone = compose(
        "+sweep=lr_ratio",
        "scale=smoke",
        "sweep.arms.lora.lr=${around:1e-3,16,1.3}",
        "~sweep.arms.fullft",
    )
    measured(alone.exec, alone.points[0].spec, {1: 0.010, 2: 0.009, 4: 0.008, 8: 0.006, 16: 0.005})
    assert packs(alone, tmp_path)[1] == [4] * 4
    alone.exec.workers = 1
    assert packs(alone, tmp_path)[1] == [16]


def test_an_empty_calibration_is_none(asked, tmp_path):
    lora = next(p.spec for p in asked.points if p.arm == "lora")
    measured(asked.exec, lora, {})
    assert (
        calibrate.known(lora, asked.exec) is None and packs(asked, tmp_path)[0].basis == "assumed"
    )


def test_ranks_are_mixed_only_where_one_alone_fills_little_and_stand_together(compose, tmp_path):
    few = compose(
        "+sweep=lr_ratio",
        "scale=smoke",
        "scale.ranks=[1,2,4,8]",
        "exec.pack_size=16",
        "sweep.arms.lora.lr=[1e-3,2e-3]",
        "~sweep.arms.fullft",
    )
    (pack,) = plan.make_plan(few.points, RunStore(tmp_path), few.exec).packs
    assert [p.spec.method.rank for p in pack.points] == [1, 1, 2, 2, 4, 4, 8, 8]
    many = compose(
        "+sweep=lr_ratio",
        "scale=smoke",
        "scale.ranks=[1,8]",
        "exec.pack_size=4",
        "~sweep.arms.fullft",
        "sweep.arms.lora.lr=[1e-3,2e-3,3e-3]",
    )
    found = plan.make_plan(many.points, RunStore(tmp_path), many.exec).packs
    assert all(len({p.spec.method.rank for p in pack.points}) == 1 for pack in found)


def test_full_fine_tuning_is_spread_over_workers(compose, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 3)
    full = compose("+sweep=lr_ratio", "scale=smoke", "~sweep.arms.lora")
    now = plan.make_plan(full.points, RunStore(tmp_path), full.exec)
    assert [len(p.points) for p in now.packs] == [1, 1, 1] and (now.workers, now.threads) == (3, 1)


def test_workers_are_as_many_as_memory_holds(compose, tmp_path, monkeypatch):
    full = compose("+sweep=lr_ratio", "scale=smoke", "~sweep.arms.lora")
    one = cost.pack_bytes(1, full.points[0].spec, 4)
    monkeypatch.setattr(machine, "cores", lambda: 4)
    monkeypatch.setattr(machine, "memory_bytes", lambda: int(2.1 * one / plan.MEMORY_SHARE))
    assert plan.make_plan(full.points, RunStore(tmp_path), full.exec).workers == 2


def test_memory_grows_with_members_and_full_fine_tuning_costs_most():
    spec = tiny_spec(method=LoRA(rank=4))
    assert cost.pack_bytes(1, spec) < cost.pack_bytes(4, spec) < 4 * cost.pack_bytes(1, spec)
    big = dataclasses.replace(
        spec, model=dataclasses.replace(spec.model, hidden_size=1024, mlp_size=4096)
    )
    assert cost.pack_bytes(1, dataclasses.replace(big, method=FullFT())) > 1.5 * cost.pack_bytes(
        1, big
    )


SMI = "0, GPU-aaa, NVIDIA H100 80GB HBM3, 81559\n1, GPU-bbb, NVIDIA H100 80GB HBM3, 81559\n2, GPU-ccc, GB10, [N/A]\n"


@pytest.mark.parametrize(
    "wanted, indices",
    [
        (None, ["0", "1"]),
        ("1", ["1"]),
        ("GPU-bbb,0", ["1", "0"]),
        ("GPU-b", ["1"]),
        ("", []),
        ("7", []),
    ],
)
def test_gpus_are_those_that_the_environment_leaves(wanted, indices):
    found = machine.visible(SMI, wanted)
    assert [gpu.uuid for gpu in found] == [{"0": "GPU-aaa", "1": "GPU-bbb"}[i] for i in indices]
    assert all(gpu.memory_bytes == 81559 * 2**20 for gpu in found)


def test_one_worker_a_gpu(asked, tmp_path, monkeypatch):
    from lorasweep.launch.local import _devices_of

    monkeypatch.setattr(machine, "gpus", lambda: machine.visible(SMI, None))
    monkeypatch.setattr(machine, "cores", lambda: 16)
    now, sizes = packs(asked, tmp_path)
    assert (now.workers, now.threads) == (2, 8) and max(sizes) == 16
    assert [_devices_of(k, 3)["CUDA_VISIBLE_DEVICES"] for k in range(3)] == [
        "GPU-aaa",
        "GPU-bbb",
        "GPU-aaa",
    ]

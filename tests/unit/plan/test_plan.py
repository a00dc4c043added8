"""The planner: packs, speeds of finished runs, memory, hardware; budgets of a search."""

import dataclasses
import itertools
import json
import os
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from lorasweep.cli.plans import plan_lines
from lorasweep.errors import SpecError
from lorasweep.launch.local import devices_of
from lorasweep.launch.slurm.submit import hardware_of
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.methods.registry import spec_from
from lorasweep.plan import detect
from lorasweep.plan.budget import parse_budget
from lorasweep.plan.detect import Hardware, from_plain
from lorasweep.plan.load import run_flops
from lorasweep.plan.planner import MEMORY_SHARE, Planner, make_plan, place, seconds_at, speeds_of
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.execution import Exec
from lorasweep.store.run_store import RunStore
from lorasweep.sweep.grid import Point
from tests.world import ROOT, compose_request, tiny_spec, write_json

CPU = Hardware("cpu", processor="a processor", cores=2, memory_gib=16.0, fast_bf16=True)
SMOKE = ("+sweep=lr_ratio", "scale=smoke")
SIXTEEN = "sweep.arms.lora.lr=${around:1e-3,16,1.3}"


composed = cache(compose_request)


@pytest.fixture
def compose(tmp_path):
    """Compose a request once for all tests; its runs lie below tmp_path."""

    def make(*overrides):
        request = composed(overrides)
        exec_ = dataclasses.replace(request.exec, runs_dir=str(tmp_path / "runs"))
        return dataclasses.replace(request, exec=exec_)

    return make


@pytest.fixture
def asked(compose):
    return compose(*SMOKE, SIXTEEN)


@pytest.fixture
def lora(asked):
    return [p for p in asked.points if p.arm == "lora"]


def planned(asked, hardware=CPU):
    now = make_plan(asked.points, RunStore(asked.exec.runs_dir), asked.exec, hardware)
    return now, [len(p.points) for p in now.packs if p.points[0].arm == "lora"]


def seconds(todo, *runs):
    """The expected seconds of specs, after finished runs (spec, seconds)."""
    results = {spec.id: {"wall_s": seconds} for spec, seconds in runs}
    done = [Point("", spec) for spec, _ in runs]
    return seconds_at(speeds_of(done, SimpleNamespace(result=results.get)), todo)


def test_what_is_left_goes_at_the_speed_of_finished_runs_on_this_machine(asked, lora):
    store = RunStore(asked.exec.runs_dir)
    store.prepare()
    store.claim(lora[0].spec)
    store.finish(lora[0].id, "done", {"test_nll": 2.0, "wall_s": 3.0})
    now, _ = planned(asked)
    expected = 3.0 * now.flops / run_flops(lora[0].spec) / now.workers
    assert now.basis == "measured" and now.hours * 3600 == pytest.approx(expected)
    assert planned(asked, dataclasses.replace(CPU, processor=None))[0].basis == "assumed"
    # each method at its own speed
    adapters, full = (tiny_spec(method=m) for m in (LoRA(rank=4), FullFT()))
    known = ((adapters, 2.0), (full, 8.0))
    assert seconds([adapters, full] * 3, *known) == pytest.approx(30)
    exact = dataclasses.replace(adapters, precision="fp64")
    overall = (run_flops(adapters) + run_flops(full)) / 10
    assert seconds([exact], *known) == pytest.approx(run_flops(exact) / overall)


@pytest.mark.slow
def test_seconds_measured_here_are_planned_within_a_fifth():
    """Of each kept answer, every second run's seconds from the others'; one in five may fail."""
    errors = []
    for path in sorted((ROOT / "analysis/results").glob("*/table.parquet")):
        table = pd.read_parquet(path)
        if "wall_s" in table:
            table = table[table["wall_s"] > 0]
            runs = [(spec_from(json.loads(s)), t) for s, t in zip(table["spec"], table["wall_s"])]
            expected = seconds((s for s, _ in runs[1::2]), *runs[::2])
            errors.append(expected / sum(t for _, t in runs[1::2]) - 1)
    assert len(errors) >= 18 and sum(abs(e) <= 0.2 for e in errors) >= 0.8 * len(errors), errors


def test_a_pack_with_checkpoints_stays_as_it_was(asked, lora):
    asked = dataclasses.replace(asked, exec=dataclasses.replace(asked.exec, pack_size=1))
    store, kept = RunStore(asked.exec.runs_dir), [lora[k].id for k in (2, 0, 1)]
    for p in lora[:3]:
        store.write_end(p.id, store.claim(p.spec), "stopped", "planted")
        saved = store.folder(p.id) / "checkpoint" / "a.json"
        write_json(saved, [{"step": 5, "layout": kept, "sha256": ""}])
    packs = [[p.id for p in k.points] for k in planned(asked)[0].packs]
    assert kept in packs and max(len(k) for k in packs if lora[0].id not in k) == 1


def test_bf16_on_a_processor_without_it_is_warned_of(compose):
    for precision, fast, rate in (
        ("bf16", False, 7e8),
        ("bf16", True, 2.5e11),
        ("fp32", False, 6e10),
    ):
        asked = compose(*SMOKE, f"precision={precision}")
        now, _ = planned(asked, dataclasses.replace(CPU, fast_bf16=fast))
        assert ("no bf16 instructions" in "".join(plan_lines(asked, now))) == (rate == 7e8)
        assert now.hours * 3600 * CPU.cores * rate == pytest.approx(now.flops)


def test_hardware_that_cannot_be_planned_for_is_refused():
    for values, setting in (
        ({"core": 2}, "'cores'"),
        ({"cores": 2}, "memory_gib"),
        ({"gpus": 1, "gpu_memory_gib": "80 GiB"}, "gpu_memory_gib"),
        ({"gpus": 1, "gpu_memory_gib": 80, "matmul_flops_s": {"bf16": 0}}, "matmul_flops_s"),
        ({"name": None}, "name"),
    ):
        with pytest.raises(SpecError, match=setting):
            from_plain({"name": "mine", **values})


def test_no_worker_is_left_without_a_pack_and_ranks_mix_only_where_one_alone_fills_little(compose):
    four, alone = dataclasses.replace(CPU, cores=4), (*SMOKE, "~sweep.arms.fullft")
    for workers, sizes in (("null", [4] * 4), ("1", [16])):
        asked = compose(*alone, SIXTEEN, f"exec.workers={workers}")
        assert planned(asked, four)[1] == sizes
    for ranks, lrs, size, packs in (
        ("1,2,4,8", "1e-3,2e-3", 16, [[1, 1, 2, 2, 4, 4, 8, 8]]),
        ("1,8", "1e-3,2e-3,3e-3", 4, [[1, 1, 1], [8, 8, 8]]),
    ):
        grid = (f"sweep.arms.lora.rank=[{ranks}]", f"sweep.arms.lora.lr=[{lrs}]")
        found = planned(compose(*alone, *grid, f"exec.pack_size={size}"))[0].packs
        assert sorted([p.spec.method.rank for p in pack.points] for pack in found) == packs


def test_workers_are_as_many_and_packs_as_large_as_memory_holds(compose, asked, lora):
    def machine(gib, **more):
        return dataclasses.replace(CPU, memory_gib=gib / MEMORY_SHARE, **more)

    full, spec = compose(*SMOKE, "~sweep.arms.lora"), lora[0].spec
    now, _ = planned(full, dataclasses.replace(CPU, cores=3))
    assert [len(p.points) for p in now.packs] == [1, 1, 1] and (now.workers, now.threads) == (3, 1)
    two = 2.1 * place(full.points[0].spec, CPU, rows=4).memory_gib
    assert planned(full, machine(two, cores=4))[0].workers == 2
    exec_ = dataclasses.replace(asked.exec, micro_batch_size=4)
    assert Planner(CPU, exec_).kind(spec).pack_size == 16
    little = machine(1.01 * place(spec, CPU, 4, rows=4).memory_gib)
    assert Planner(little, exec_).kind(spec).pack_size == 4
    small = machine(place(spec, CPU, 2).memory_gib * 1.0001)
    assert max(len(p.points) for p in planned(asked, small)[0].packs) <= 2


def test_peaks_measured_here_are_planned_within_a_fifth(compose):
    """The kept benchmark's peaks of resident memory, one run on one thread, a torch with CUDA."""
    machine = dataclasses.replace(CPU, process_gib=1.0)
    kept = json.loads((ROOT / "analysis/results/bench/bench.json").read_text())
    for case in kept["memory"]["cases"]:
        scale = "tiny" if case["model"].startswith("tiny") else "small"
        fields = (f"{k}={case[k]}" for k in ("model", "method", "precision", "batch_size"))
        (point,) = compose(f"scale={scale}", *fields).points
        peak = place(point.spec, machine).memory_bytes
        assert peak == pytest.approx(case["peak_bytes"], rel=0.2), case


@pytest.mark.parametrize("method, gib", [("lora", 23.9), ("fullft", 157.8)])
def test_a_plan_counts_a_base_published_in_bf16_as_it_is_held(compose, method, gib):
    """Llama-3.1-8B on an H100, one row a pass. Published in fp32, it has two bytes more a weight,
    and a bf16 copy of the weights of products."""
    asked = compose("scale=paper", f"method={method}", "hardware=h100", "action=plan")
    spec, h100, model = asked.points[0].spec, hardware_of(asked), asked.points[0].spec.model
    in_fp32 = dataclasses.replace(spec, model=dataclasses.replace(model, weights_dtype="fp32"))
    held, in_full = (place(s, h100, rows=1).memory_bytes for s in (spec, in_fp32))
    assert held / 2**30 == pytest.approx(gib, abs=0.1)
    copies = 2 * model.n_matmul_params if method == "lora" else 0
    assert in_full - held == 2 * model.n_params + copies


SMI = """0, GPU-aaa, NVIDIA H100 80GB HBM3, 81559
1, GPU-bbb, NVIDIA H100 80GB HBM3, 81559
2, GPU-ccc, GB10, [N/A]
"""
MIG = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaa)
  MIG 1g.10gb     Device  0: (UUID: MIG-1111-aa)
  MIG 3g.40gb     Device  1: (UUID: MIG-2222-bb)
  MIG 1g.10gb+me  Device  2: (UUID: MIG-3333-cc)
"""


def test_gpus_are_those_that_the_environment_leaves_with_a_worker_each(asked, monkeypatch):
    wanted = {None: "ab", "1": "b", "GPU-bbb,0": "ba", "GPU-b": "b", "": "", "7": ""}
    for variable, names in wanted.items():
        found = [(gpu.uuid, gpu.memory_bytes) for gpu in detect.visible(SMI, variable)]
        assert found == [(f"GPU-{3 * name}", 81559 * 2**20) for name in names]
    # a slice of a GPU counts as a GPU with the memory of its profile
    found = detect.visible(MIG, "MIG-2222-bb,MIG-3333-cc")
    assert found[0] == ("MIG-2222-bb", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", 40 * 10**9)
    assert len(found) == 2
    monkeypatch.setattr(detect, "gpus", lambda: detect.visible(SMI, None))
    monkeypatch.setattr(detect, "cores", lambda: 16)
    now, sizes = planned(asked, detect.this_machine())
    assert (now.workers, now.threads) == (2, 8) and max(sizes) == 16
    found = [devices_of(k, 3)["CUDA_VISIBLE_DEVICES"] for k in range(3)]
    assert found == ["GPU-aaa", "GPU-bbb", "GPU-aaa"]


def runs(count, rates=3, lengths=(64,)):
    """`rates` runs of each of `count` customers."""
    found = []
    for k, rate in itertools.product(range(count), range(rates)):
        rows = {"max_length": lengths[k % len(lengths)], "n_test": 4, "n_test_curve": 4}
        dataset = DatasetSpec(name=f"c{k}", source="jsonl", location=f"c{k}", **rows)
        how = {"lr": 1e-3 * 2**rate, "batch_size": 4, "steps": 8}
        found.append(Point(f"c{k}", tiny_spec(dataset=dataset, method=LoRA(rank=4), **how)))
    return found


def test_customers_of_few_runs_share_packs_with_neighbours_of_like_lengths(tmp_path):
    def packs_of(points, **settings):
        exec_ = Exec(runs_dir=str(tmp_path), workers=1, **settings)
        packs = make_plan(points, RunStore(tmp_path), exec_, CPU).packs
        return packs, [len(p.points) for p in packs]

    _, sizes = packs_of(runs(10))
    assert sum(sizes) == 30 and len(sizes) == 2
    alone, _ = packs_of(runs(3, rates=16))  # that fill a pack
    assert all(len({p.spec.dataset.name for p in pack.points}) == 1 for pack in alone)
    # one would be padded to four times its length
    assert packs_of(runs(2, rates=2, lengths=(16, 60)), pack_size=8)[1] == [2, 2]
    ((pack,), _) = packs_of(runs(2, rates=2, lengths=(32, 60)), pack_size=8)
    longest = max((p.spec for p in pack.points), key=lambda s: s.dataset.max_length)
    assert pack.memory_bytes == place(longest, CPU, 4, pack.micro_batch_size).memory_bytes
    sampled = {"objective": "policy_gradient", "group_size": 2, "max_new_tokens": 4}
    attention = {"method": LoRA(rank=4, layers="attention")}
    for first, other in ((3, {"batch_size": 2}), (3, attention), (0, sampled)):  # they stay apart
        points = runs(2)
        others = (dataclasses.replace(p.spec, **other) for p in points[first:])
        points[first:] = [Point(s.dataset.name, s) for s in others]
        assert packs_of(points, pack_size=16)[1] == [3, 3]


# ---------------------------------------------------------------- budgets of a search


def test_a_budget_is_an_amount_with_its_unit():
    for text, amount in (("2h", 7200), ("90min", 5400), ("1.5h", 5400), ("40runs", 40)):
        assert parse_budget(text, 40).amount == amount
    assert parse_budget("", 40) is None
    for text in ("2", "h", "0h", "-1h", "2 days", "1e3runs"):
        with pytest.raises(SpecError, match=r"budget=.*500gpuh"):
            parse_budget(text, 40)


def finished(store, spec, spans, **result):
    """A run with attempts at these times, in seconds."""
    for n, (begin, end) in enumerate(spans, 1):
        store.claim(spec)
        attempt = store.attempt(spec.id, n)
        store.log(spec.id, n, "")
        (attempt / ".partial").symlink_to("a file that was renamed since")
        if n < len(spans):
            store.write_end(spec.id, n, "stopped", "")
        for file in filter(Path.exists, attempt.iterdir()):
            at = begin if file.name == "owner.json" else end
            os.utime(file, (at, at))
    store.finish(spec.id, "done", {"test_nll": 1.0, **result})
    os.utime(store.folder(spec.id) / "result.json", (spans[-1][1],) * 2)
    return Point("lora", spec)


@pytest.fixture
def finished_runs(tmp_path):
    store = RunStore(tmp_path)
    store.prepare()
    specs = [tiny_spec(lr=lr, steps=40) for lr in (1e-3, 2e-3, 4e-3)]
    short = finished(store, dataclasses.replace(specs[0], steps=10), [(1000, 1010)])
    together = [finished(store, s, [(1010, 1050)], pack_size=2) for s in specs[:2]]
    resumed = finished(store, specs[2], [(1030, 1060), (5000, 5020)])
    return store, [short, *together, resumed]


def test_time_is_the_union_of_all_attempts_and_packs_share_a_gpu(finished_runs):
    store, known = finished_runs
    assert parse_budget("1h", 40).used(known, store) == 10 + 50 + 20
    assert parse_budget("1gpuh", 40).used(known, store) == 10 + 40 + 50
    assert parse_budget("9runs", 40).used(known, store) == 3  # a short run counts in the longer one
    # several processes of a run take a GPU each
    store.write_env(known[0].id, 1, {"processes": 4})
    os.utime(next(store.attempt(known[0].id, 1).glob("env*")), (1000, 1000))
    assert parse_budget("1gpuh", 40).used(known[:1], store) == 40


def test_runs_may_begin_if_the_measured_cost_of_such_runs_fits(finished_runs):
    store, known = finished_runs
    new = [Point("lora", tiny_spec(lr=lr, steps=40)) for lr in (1e-2, 2e-2, 4e-2)]
    # 3 full runs took 80 s, so 3 more take as long
    assert parse_budget("2.67min", 40).allows(new, known, store)
    assert not parse_budget("2.66min", 40).allows(new, known, store)
    assert parse_budget("6runs", 40).allows(new, known, store)
    assert not parse_budget("5.9runs", 40).allows(new, known, store)
    # 10 s for a quarter of a run, so one more takes 40 s
    fits = [parse_budget(t, 40).allows(new[:1], known[:1], store) for t in ("0.83min", "0.84min")]
    assert fits == [False, True]
    store.claim(new[0].spec)  # begun: they go on
    assert parse_budget("1min", 40).allows(new, known, store)
    assert parse_budget("1min", 40).allows(new, [], store)

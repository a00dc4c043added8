"""action=check_gpu: cases, predictions, results and page with planted measurements; its checks of
correctness, which pass here and on a GPU, and find faults."""

import dataclasses
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from lorasweep.check import cases as all_cases
from lorasweep.check import measures
from lorasweep.check.cases import CORRECTNESS, PACKS, SPEED, Case
from lorasweep.cli import check
from lorasweep.config import catalogue
from lorasweep.config.catalogue import conf_dir
from lorasweep.config.compose import compose_request
from lorasweep.errors import SpecError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.plan.planner import place
from tests.training import OtherLibrary
from tests.world import tiny_spec

MODELS = catalogue.models([Path(conf_dir())])
H100 = catalogue.machines([Path(conf_dir())])["h100"]()
NODE = {
    **{"name": H100.gpu_name, "gpus": 2, "memory_gib": 79.0, "software": {"torch": "2.11"}},
    **{"matmul_flops_s": {"bf16": 7e14, "fp32": 5e13, "fp64": None}, "launch_s": 5e-6},
    **{"bandwidth_bytes_s": 3.0e12, "attention": {"flops_s": 3e14}},
}


@pytest.fixture(scope="module")
def planted():
    """The cases on a GPU, their predictions, and results 1.2 times the plan's; all checks pass."""
    cases = all_cases.cases_of(MODELS, tiny_spec(), True, "bf16")
    predicted, found = all_cases.predictions(cases, H100), {"node": NODE}
    for case in cases[1:]:
        before = predicted["cases"].get(case.name, {"difference": 1e-12, "bound": 1e-10})
        kept = {k: v / 1.2 for k, v in before.items() if k in ("tokens_s", "sampled_tokens_s")}
        if "step_s" in before:
            kept |= {"step_s": 1.2 * before["step_s"], "memory_gib": before["memory_gib"]}
        found[case.name] = kept or before
    return cases, predicted, found


def test_a_prediction_is_the_plans_number_for_the_layout_that_is_measured(planted):
    cases, predicted, _ = planted
    of = predicted["cases"]
    case = next(c for c in cases if c.name == "llama-3.2-1b 8 rows x 4")
    where = place(case.spec, H100, 4, checkpointing=(False, True))
    wanted = {"step_s": where.step_s, "memory_gib": where.memory_gib, "rows": where.layout.rows}
    assert of[case.name].items() >= wanted.items()
    assert "fullft of llama-3.1-8b takes" in of["llama-3.1-8b fullft"]["misfit"]
    assert of["qwen3-30b-a3b lora"]["memory_gib"] < H100.gpu_memory_gib
    names = {c.name for c in cases if c.part in (SPEED, PACKS)}
    assert len(names) == 8 + 2 * 3 * 5 and names <= of.keys()


def test_the_page_names_what_the_plan_got_wrong_by_more_than_a_quarter(planted):
    cases, predicted, results = planted
    text = all_cases.page(cases, predicted, results)
    assert "Wrong by" not in text and "measured / predicted is 1.20; 0 of" in text
    assert "6 of 6 checks passed" in text and "takes" in text.partition("## Not measured")[2]
    slow = {n: {**results[n], "step_s": 9.0} for n in ("llama-3.2-1b lora",)}
    for count, seconds in ((1, 0.5), (16, 2.0)):
        name = f"llama-3.2-1b 1 rows x {count}"
        slow[name] = {**results[name], "step_s": seconds}
    slow["a pack in bf16, against its runs"] = {"difference": 0.5, "bound": 0.02}
    text = all_cases.page(cases, predicted, {**results, **slow})
    mostly = predicted["cases"]["llama-3.2-1b lora"]["parts"]
    wrong = text.partition("Wrong by more than 25%")[2].partition("##")[0]
    assert "| llama-3.2-1b lora | seconds an update |" in wrong
    assert max(mostly, key=mostly.get) in wrong and "5 of 6 checks passed" in text
    assert "| a pack in bf16, against its runs | 0.5 | 0.02 | **failed** |" in text
    (row,) = re.findall(r"\n\| llama-3.2-1b 1 rows x 16 \|.*", text.partition("## Packs")[2])
    assert row.endswith("| 4.00 |")  # runs one by one / the pack


def test_the_hardware_file_has_the_measured_constants_and_can_be_read(tmp_path):
    measured = all_cases.measured_hardware(NODE, H100, "mine")
    speeds = {p: s * measured.attainable_share for p, s in measured.matmul_flops_s.items()}
    assert speeds == pytest.approx({"bf16": 7e14, "fp32": 5e13}, rel=0.01)
    assert measured.matmul_flops_s["bf16"] == H100.matmul_flops_s["bf16"]
    assert (measured.gpus, measured.bandwidth_bytes_s) == (2, 3.0e12)
    assert measured.price_per_gpu_h == H100.price_per_gpu_h
    (tmp_path / "hardware").mkdir()
    file = tmp_path / "hardware" / "mine.yaml"
    file.write_text(all_cases.hardware_file(measured, NODE, "2026-11-28"))
    assert catalogue.machines([tmp_path])["mine"]() == measured
    # measured again with its own file: the same constants
    assert all_cases.measured_hardware(NODE, measured, "mine") == measured
    assert all_cases.measured_hardware(NODE, None, "mine").attainable_share == 1.0


@pytest.mark.slow
def test_a_case_that_fails_or_dies_fails_alone_and_is_measured_again(tmp_path, monkeypatch):
    # without it a process of xdist cannot start processes
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None, raising=False)
    case = Case(CORRECTNESS, "good", "update_as_on_cpu", tiny_spec(steps=1))
    bad = Case(CORRECTNESS, "bad", "no_such_function")
    dies = Case(CORRECTNESS, "dies", "update_as_on_cpu", case.spec)

    def found(cases, large, **more):
        got = {}
        all_cases.measure(cases, tmp_path, 1, large, lambda c, r: got.update({c.name: r}), **more)
        return got

    assert not found([bad, case], {}, limit_s=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(all_cases, "LAST_S", 0.2)  # its alarm ends the process
        late = found([dies], {}, limit_s=0.2)["dies"]["failed"]
    assert late.startswith("its process died") and "more than 0 s" in late
    first = found([bad, dies, case], {})
    assert "no_such_function" in first["bad"]["failed"] and "failed" not in first["dies"]
    assert first["good"]["difference"] < 1e-10 and list(found([bad, case], {})) == ["bad"]
    large = {"good": {"misfit": "too large"}}  # left out without a process
    assert found([case], large) == large


def test_a_torch_without_cuda_beside_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(check.shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(SpecError, match="no GPU can be used: torch is"):
        check.check_gpu(compose_request(["action=check_gpu"]), None)


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])
devices = pytest.mark.parametrize("device", ["cpu", GPU])
SPEC = tiny_spec(method=LoRA(rank=4), steps=10, lr=1e-3)
SPEC = dataclasses.replace(SPEC, dataset=dataclasses.replace(SPEC.dataset, n_test=8))


@pytest.mark.numerics
@devices
@pytest.mark.parametrize("method", [LoRA(rank=4), FullFT()], ids=["lora", "fullft"])
def test_an_update_is_the_cpus(device, method):
    spec = dataclasses.replace(SPEC, method=method)
    found = measures.update_as_on_cpu(spec, torch.device(device))
    assert 0 < found["difference"] <= found["bound"]


@pytest.mark.parametrize("method", [LoRA(rank=4), FullFT()], ids=["lora", "fullft"])
def test_another_devices_arithmetic_stays_within_the_bound_and_float32_is_nowhere(
    method, monkeypatch
):
    """transformers computes norms and rotary positions in float32, which moved an update by 1e-4."""
    other, train, calls = OtherLibrary(), measures.finetune, []

    def finetune(*given):
        calls.append(given)
        with other if len(calls) == 2 else nullcontext():
            yield from train(*given)

    monkeypatch.setattr(measures, "finetune", finetune)
    spec = dataclasses.replace(SPEC, method=method)
    found = measures.update_as_on_cpu(spec, torch.device("cpu"))
    assert 1e-14 < found["difference"] < found["bound"] and not other.narrower


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
@devices
def test_a_pack_is_its_runs(precision, device):
    found = measures.pack(dataclasses.replace(SPEC, precision=precision), 4)
    assert found["difference"] <= found["bound"] < found["loss_fell_by"]

"""Cases, predictions, kept results and the page of action=check_gpu, with planted measurements."""

import re
from pathlib import Path

import pytest

from lorasweep.check import cases as all_cases
from lorasweep.check import page, process
from lorasweep.check.cases import CORRECTNESS, PACKS, SPEED, Case
from lorasweep.cli import check
from lorasweep.config import catalogue
from lorasweep.config.compose import compose_request
from lorasweep.config.folders import conf_dir
from lorasweep.errors import SpecError
from lorasweep.plan.planner import place
from tests.world import tiny_spec

FOLDERS = [Path(conf_dir())]
H100 = catalogue.machines(FOLDERS)["h100"]()
NODE = {
    "name": H100.gpu_name,
    "gpus": 2,
    "memory_gib": 79.0,
    "software": {"torch": "2.11"},
    "matmul_flops_s": {"bf16": 7e14, "fp32": 5e13, "fp64": None},
    "bandwidth_bytes_s": 3.0e12,
    "attention": {"flops_s": 3e14, "kernels": {"flash": 3e14}},
    "launch_s": 5e-6,
}


@pytest.fixture(scope="module")
def cases():
    models = catalogue.models(FOLDERS)
    return all_cases.cases_of(models, tiny_spec(), all_cases.ON_GPU, "bf16")


@pytest.fixture(scope="module")
def predicted(cases):
    return all_cases.predictions(cases, H100)


def planted(cases, predicted, factor):
    """Results in which all checks pass and everything takes `factor` times the plan's number."""
    found = {"node": NODE}
    for case in cases:
        before = predicted["cases"].get(case.name, {})
        if case.part == CORRECTNESS:
            found[case.name] = {"difference": 1e-12, "bound": 1e-10}
        elif "misfit" in before:
            found[case.name] = {"misfit": before["misfit"]}
        elif before:
            speed = {"tokens_s": before["tokens_s"] / factor}
            if seconds := before["parts"].get("sampling"):
                tokens = case.spec.batch_size * case.spec.max_new_tokens
                speed = {"sampled_tokens_s": tokens / seconds / factor}
            memory = before["memory_gib"]
            found[case.name] = {"step_s": factor * before["step_s"], "memory_gib": memory, **speed}
    return found


def test_a_prediction_is_the_plans_number_for_the_layout_that_is_measured(cases, predicted):
    of = predicted["cases"]
    case = next(c for c in cases if c.name == "llama-3.2-1b 8 rows x 4")
    where = place(case.spec, H100, 4, checkpointing=(False, True))
    assert of[case.name]["step_s"] == where.step_s
    assert of[case.name]["memory_gib"] == where.memory_gib
    assert of[case.name]["rows"] == where.layout.rows
    assert "fullft of llama-3.1-8b takes" in of["llama-3.1-8b fullft"]["misfit"]
    assert of["qwen3-30b-a3b lora"]["memory_gib"] < H100.gpu_memory_gib
    names = {c.name for c in cases if c.part in (SPEED, PACKS)}
    assert len(names) == 8 + 2 * 3 * 5 and names <= of.keys()


def test_the_page_names_what_the_plan_got_wrong_by_more_than_a_quarter(cases, predicted):
    results = planted(cases, predicted, 1.2)
    text = page.page(cases, predicted, results, None)
    assert "Wrong by" not in text and "measured / predicted is 1.20; 0 of" in text
    assert "7 of 7 checks passed" in text and "takes" in text.partition("## Not measured")[2]
    results["llama-3.2-1b lora"] = {**results["llama-3.2-1b lora"], "step_s": 9.0}
    results["a pack in bf16, against its runs"] = {"difference": 0.5, "bound": 0.02}
    results["llama-3.2-1b 1 rows x 1"]["step_s"] = 0.5
    results["llama-3.2-1b 1 rows x 16"]["step_s"] = 2.0
    text = page.page(cases, predicted, results, None)
    mostly = predicted["cases"]["llama-3.2-1b lora"]["parts"]
    wrong = text.partition("Wrong by more than 25%")[2].partition("##")[0]
    assert "| llama-3.2-1b lora | seconds an update |" in wrong
    assert max(mostly, key=mostly.get) in wrong and "6 of 7 checks passed" in text
    (row,) = re.findall(r"\n\| llama-3.2-1b 1 rows x 16 \|.*", text.partition("## Packs")[2])
    assert row.endswith("| 4.00 |")  # runs one by one / the pack


def test_the_hardware_file_has_the_measured_constants_and_can_be_read(tmp_path):
    measured = page.measured_hardware(NODE, H100, "mine")
    speeds = {p: s * measured.attainable_share for p, s in measured.matmul_flops_s.items()}
    assert speeds == pytest.approx({"bf16": 7e14, "fp32": 5e13}, rel=0.01)
    assert measured.matmul_flops_s["bf16"] == H100.matmul_flops_s["bf16"]
    assert (measured.gpus, measured.bandwidth_bytes_s) == (2, 3.0e12)
    assert measured.price_per_gpu_h == H100.price_per_gpu_h
    (tmp_path / "hardware").mkdir()
    file = tmp_path / "hardware" / "mine.yaml"
    file.write_text(page.hardware_file(measured, NODE, "2026-11-28"))
    assert catalogue.machines([tmp_path])["mine"]() == measured
    # measured again with its own file: the same constants
    assert page.measured_hardware(NODE, measured, "mine") == measured
    alone = page.measured_hardware(NODE, None, "mine")
    assert alone.attainable_share == 1.0 and alone.matmul_flops_s["bf16"] == 7e14


@pytest.mark.slow
def test_a_case_that_dies_fails_alone_and_is_measured_again(tmp_path):
    case = Case(CORRECTNESS, "good", "correctness:update_as_on_cpu", tiny_spec(steps=1))
    bad = Case(CORRECTNESS, "bad", "speed:no_such_function")

    def told(cases, large, **more):
        found = []
        process.measure(cases, tmp_path, 1, large, lambda c, r: found.append((c.name, r)), **more)
        return found

    assert not told([bad, case], {}, limit_s=0.0)
    (dead, failed), (well, found) = told([bad, case], {})
    assert (dead, well) == ("bad", "good") and "no_such_function" in failed["failed"]
    assert found["difference"] < 1e-10
    assert [name for name, _ in told([bad, case], {})] == ["bad"]
    large = {"good": {"misfit": "too large"}}  # left out without a process
    assert told([case], large)[-1] == ("good", {"misfit": "too large"})


def test_a_torch_without_cuda_beside_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(check.shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(SpecError, match="no GPU can be used: torch is"):
        check.check_gpu(compose_request(["action=check_gpu"]), None)


def test_shrunken_shapes_keep_what_makes_a_model_different():
    models = catalogue.models(FOLDERS)
    for name in all_cases.MODELS:
        whole, small = models[name](), all_cases.shrink(models[name]())
        assert small.n_params < 1e6 and not small.problem
        for key in ("tied", "qk_norm", "attention", "mlp", "weights_dtype"):
            assert getattr(whole, key) == getattr(small, key)
        assert bool(small.n_experts) == bool(whole.n_experts)

"""The checks of action=check_gpu that need no worker: they pass here and on a GPU, and find faults."""

import dataclasses

import pytest
import torch

from lorasweep.check import correctness
from lorasweep.launch.trainer import finetune
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from tests.world import tiny_spec

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])


@pytest.fixture
def spec():
    spec = tiny_spec(method=LoRA(rank=4), steps=10, lr=1e-3)
    return dataclasses.replace(spec, dataset=dataclasses.replace(spec.dataset, n_test=8))


@pytest.mark.numerics
@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("method", [LoRA(rank=4), FullFT()], ids=["lora", "fullft"])
def test_an_update_is_the_cpus(spec, device, method):
    spec = dataclasses.replace(spec, method=method)
    found = correctness.update_as_on_cpu(spec, torch.device(device))
    assert 0 < found["difference"] <= found["bound"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp64", "bf16"])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_pack_is_its_runs(spec, precision, device):
    found = correctness.pack(dataclasses.replace(spec, precision=precision), 4)
    assert found["difference"] <= found["bound"] < found["loss_fell_by"]


@pytest.mark.slow
def test_a_pack_that_mixes_up_its_runs_is_found(spec, monkeypatch):
    def mixed(runs, base, data):
        rates = [run.lr for run in runs]
        others = [dataclasses.replace(r, lr=rates[k - 1]) for k, r in enumerate(runs)]
        events = list(finetune(others, base, data))
        ends = [result["test_nll"] for event in events for _, result in event.ended.values()]
        return dict(zip([r.id for r in runs], ends, strict=True))

    monkeypatch.setattr(correctness, "_losses", mixed)
    found = correctness.pack(dataclasses.replace(spec, precision="fp64"), 2)
    assert found["difference"] > 100 * found["bound"]

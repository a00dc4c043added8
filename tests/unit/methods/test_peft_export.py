"""The adapter's file: PEFT computes what was trained, for every rule of scaling, rank and kind of head."""

import copy
import dataclasses
import itertools
import json

import pytest
import torch
from peft import PeftModel

from lorasweep.cli import finished_runs
from lorasweep.cli.actions import act
from lorasweep.errors import TrainingError
from lorasweep.launch.trainer import TorchTrainer
from lorasweep.methods.lora import LoRA
from lorasweep.methods.stacked.peft_export import save_peft
from lorasweep.models.load import empty_model
from lorasweep.store.run_store import RunStore
from tests.training import SMALL, SMALL_MOE, moe, pack_of, state_of

TIED = dataclasses.replace(SMALL, tied=True)
CASES = [
    *itertools.product((SMALL, TIED), ("all", "attention"), ({},)),
    *itertools.product(
        (SMALL_MOE,), ("attention+mlp+unembedding+router",), ({}, {"expert_outer": "shared"})
    ),
]


@pytest.mark.parametrize(("shape", "layers", "more"), CASES)
@pytest.mark.parametrize("scaling_by", ["rank", "sqrt_rank", "none"])
def test_peft_computes_the_logits_that_were_trained(
    tmp_path, norms_in_float64, shape, layers, more, scaling_by
):
    torch.manual_seed(0)
    base = moe("eager") if shape is SMALL_MOE else empty_model(shape).double()
    tokens = torch.randint(20, (2, 9))
    if shape is SMALL_MOE:
        more = {"expert_alpha": 6.0, **more}
    for rank in (4,) if shape is SMALL_MOE else (1, 3, 4):
        method = LoRA(rank=rank, alpha=5.0, layers=layers, scaling_by=scaling_by, **more)
        model = moe() if shape is SMALL_MOE else copy.deepcopy(base)
        trainables = pack_of([method], model, shape, perturb=0.3)
        folder, experts = tmp_path / str(rank), (shape.n_experts, method.scaling_of_experts(shape))
        assert not shape.n_experts or experts[1] == 6 / {"rank": 2, "sqrt_rank": 2**0.5}.get(
            scaling_by, 1
        )
        save_peft(
            folder, state_of(trainables), rank, "nobody/small", "abc", method.scaling, *experts
        )
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder).double()
        with torch.no_grad():
            got, want, start = (m(input_ids=tokens).logits for m in (loaded, model, base))
        assert (got - start).abs().max() > 0.1  # it does something
        assert torch.allclose(got, want, rtol=0, atol=1e-5)  # PEFT holds adapters in fp32
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["lora_alpha"] == method.scaling * rank  # a float is kept exactly
        assert (config["base_model_name_or_path"], config["revision"]) == ("nobody/small", "abc")


class Elsewhere:
    """The real trainer on a machine that rounds differently: the final loss is off by `shift`."""

    base_sha256 = None

    def __init__(self, shift):
        self.shift, self.real = shift, TorchTrainer()

    def __call__(self, pack, exec_, resume):
        for event in self.real(pack, exec_, resume):
            for _, final in event.ended.values():
                final["test_nll"] += self.shift
                final["base_sha256"] = self.base_sha256 or final["base_sha256"]
            yield event


def test_the_command_compares_with_the_recorded_loss(compose, tmp_path, capsys, monkeypatch):
    small = ("scale=smoke", "method=lora", "method.rank=4", "lr=5e-3", "steps=2")
    asked = compose(*small, "format=json")
    act(asked, TorchTrainer())
    capsys.readouterr()
    (spec,), store = [p.spec for p in asked.points], RunStore(tmp_path / "runs")
    folder = tmp_path / "adapter"

    def save(shift, **settings):
        settings |= {"action": "adapter", "run": spec.id, "out": str(folder)}
        request = dataclasses.replace(asked, **settings)
        return finished_runs.adapter(request, store, Elsewhere(shift)).as_text()

    assert "difference +0.0e+00" in save(0.0)
    assert "difference +1.0e-03" in save(1e-3) and folder.is_dir()
    env = store.env(spec.id)
    env["packages"]["torch"] = "1.0"
    store.write_env(spec.id, 1, env)
    with pytest.raises(TrainingError, match=r"torch 1\.0 then.*add max_difference=0\.03"):
        folder = tmp_path / "other"
        save(0.025)
    assert not folder.exists()
    monkeypatch.setattr(Elsewhere, "base_sha256", "other")
    with pytest.raises(TrainingError, match=r"another base .* than is there now \(other\)"):
        save(0.0)
    monkeypatch.undo()
    assert "torch 1.0 then" in save(0.025, max_difference=0.03) and folder.is_dir()

"""What `action=layers` lists: counts that add up, what is frozen, and sets that a model lacks."""

import json

import pytest

from lorasweep.cli.actions import act
from lorasweep.config.compose import shipped_model
from lorasweep.errors import SpecError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.sweep.trained import REST, trained_by_set

METHODS = (
    LoRA(rank=8),
    LoRA(rank=8, layers="attention"),
    FullFT(),
    FullFT(scope="matrices", layers="attention+mlp"),
)


@pytest.mark.parametrize("name", ["tiny64", "tiny64-experts", "llama-3.2-1b", "qwen3-30b-a3b-base"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{m.layers}")
def test_counts_add_up(name, method):
    model = shipped_model(name)
    found = {f.layer_set: f for f in trained_by_set(method, model)}
    assert sum(f.trained for f in found.values()) == method.n_trainable(model)
    assert sum(f.weights for f in found.values()) == model.n_params
    assert ("router" in found) == bool(model.n_experts)
    whole = method.target_layers() == ()
    for layer_set, f in found.items():
        expected = whole or layer_set in method.target_layers()
        assert bool(f.trained) == (expected and not (layer_set == REST and not f.weights))


def test_the_command_lists_every_kind_of_run_of_a_sweep(compose, capsys):
    assert act(compose("+sweep=experts", "scale=paper", "action=layers")) == 0
    out = capsys.readouterr().out
    assert "lora on qwen3-30b-a3b-base (alpha=32.0, expert_alpha=32.0, expert_rank=all" in out
    (router,) = {" ".join(x.split()) for x in out.splitlines() if "router" in x and "frozen" in x}
    assert router == "router 48 2048x128 - frozen 12,582,912"
    assert act(compose("+sweep=experts", "scale=paper", "action=layers", "format=json")) == 0
    kinds = json.loads(capsys.readouterr().out)["kinds"]
    shared = next(k for k in kinds if k["method"].get("expert_outer") == "shared")
    mlp = next(f for f in shared["layer_sets"] if f["layer_set"] == "mlp")
    assert mlp["trained"] == 128 * 14_450_688 and mlp["ranks"] == [128]
    one = ("model=tiny64", "dataset=dialect", "method=lora", "action=layers", "method.rank=4")
    assert act(compose(*one, "method.layers=mlp")) == 0
    lines = [" ".join(x.split()) for x in capsys.readouterr().out.splitlines()]
    assert "mlp 12 64x224, 224x64 4 13,824 172,032" in lines
    with pytest.raises(SpecError, match="has no experts, so it has no layer set 'router'"):
        compose(*one, "method.layers=mlp+router")

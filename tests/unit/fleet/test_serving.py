"""What a server takes: the plan of a fleet, the check of a folder, the command."""

import json
import math
import struct

import pytest
import torch

from lorasweep.cli.actions import check
from lorasweep.cli.finished_runs import write_adapter
from lorasweep.config import catalogue
from lorasweep.errors import SpecError
from lorasweep.fleet.serving import ADAPTER, CONFIG, PEFT, adapted, problems, serve_command
from lorasweep.methods.lora import LoRA
from lorasweep.spec.method import parse_layers
from lorasweep.spec.model import ModelSpec
from lorasweep.store import files
from tests.unit.advise.world import CONF
from tests.world import compose_request, tiny_spec

PROFILES = {name: read() for name, read in catalogue.profiles(CONF).items()}
VLLM = PROFILES["vllm"]
LLAMA = "LlamaForCausalLM"
SHAPE = {"hidden_size": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_size": 32}
MORE = {"vocab_size": 50, "mlp_size": 96}
PLAIN = ModelSpec("plain", "hub", "us/plain", **SHAPE, **MORE)
TIED = ModelSpec("tied", "hub", "us/tied", **SHAPE, **MORE, tied=True)
QKV = {"attention": ("qkv_proj", "o_proj"), "shapes": {"qkv_proj": "64x128"}}
FUSED = ModelSpec("fused", "folder", "x/fused", **SHAPE, **MORE, **QKV)
MOE = {"mlp_size": 24, "n_experts": 4, "n_active_experts": 2, "qk_norm": True}
EXPERTS = ModelSpec("experts", "hub", "us/experts", **SHAPE, **{**MORE, **MOE})
NAMES = {"attention": "model.layers.{}.self_attn.{}", "unembedding": "{1}"}


def write(folder, model, rank, layers):
    """Write the folder that a fleet writes, with empty weights."""
    method, state = LoRA(rank=rank, layers=layers), {}
    for layer_set in parse_layers(layers):
        for name in model.modules(layer_set)[0]:
            for k in range(model.n_layers if layer_set != "unembedding" else 1):
                module = NAMES.get(layer_set, "model.layers.{}.mlp.{}").format(k, name)
                sides = {
                    module: ((64, 4) if name == "gate" else model.known_shapes.get(name), rank)
                }
                if name == "experts":
                    r = method.expert_rank_of(model.n_experts, model.n_active_experts)
                    parts = {"gate": (64, 96), "up": (64, 96), "down": (24, 256)}
                    sides = {f"{module}.{part}_proj": (io, r) for part, io in parts.items()}
                for part, ((i, o), r) in sides.items():
                    state[f"{part}.A"] = torch.ones(r * (4 if name == "experts" else 1), i)
                    state[f"{part}.B"] = torch.ones(o, r)
    write_adapter(folder, tiny_spec(model=model, method=method), state, "0" * 40)
    return folder


CLEAN = [
    *(("vllm", PLAIN, 8, layers) for layers in ("all", "attention", "mlp", "unembedding")),
    *(("vllm", PLAIN, rank, "all") for rank in (1, 7, 48)),
    *(("vllm", TIED, 31, layers) for layers in ("attention+mlp", "attention", "mlp")),
    *(("vllm", FUSED, 12, layers) for layers in ("all", "attention")),
    *(("vllm", EXPERTS, 4, layers) for layers in ("attention", "attention+unembedding")),
    *(("peft", model, 2, "all") for model in (PLAIN, TIED, FUSED, EXPERTS)),
    *(("peft", EXPERTS, 6, layers) for layers in ("mlp", "attention+mlp+router")),
]


@pytest.mark.parametrize("name, model, rank, layers", CLEAN)
def test_nothing_is_found_in_a_folder_of_a_fleet(tmp_path, name, model, rank, layers):
    profile = PROFILES[name]
    assert len(CLEAN) == 20 and adapted(profile, layers, model, LLAMA) == (layers, "")
    folder = write(tmp_path / "a", model, rank, layers)
    assert problems(folder, profile, model, profile.largest_rank(rank), LLAMA) == []
    assert problems(folder, profile, model) == []


def change(folder, config=None, tensors=None):
    """Write adapter_config.json with other values, and the weights with other tensors."""
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
    if tensors is not None:
        listed, at = {}, 0
        for name, shape in tensors.items():
            size = 4 * math.prod(shape)
            listed[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
            at += size
        header(folder, listed, at)


def header(folder, listed, size=0):
    text = json.dumps(listed).encode()
    (folder / ADAPTER).write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))


def tensors_of(folder):
    return {n: t["shape"] for n, t in files.safetensors_header(folder / ADAPTER)[0].items()}


def cut(folder, at):
    (folder / ADAPTER).write_bytes((folder / ADAPTER).read_bytes()[:at])


def renamed(folder, old, new):
    change(folder, tensors={n.replace(old, new): s for n, s in tensors_of(folder).items()})


def without(folder, part):
    change(folder, tensors={n: s for n, s in tensors_of(folder).items() if part not in n})


Q = "base_model.model.model.layers.0.self_attn.q_proj"
ODD, OTHER = "tensors that are no A or B of 'plain'", "tensors of another base than 'plain', or"
FAULTS = {
    "wrong prefix": (lambda f: renamed(f, "base_model.model.", "base."), [ODD]),
    "rank above the server's": (lambda f: None, ["rank 8 is above the largest of the server, 4"]),
    "rank of the config": (lambda f: change(f, {"r": 4}), [OTHER]),
    "no weights": (lambda f: (f / ADAPTER).unlink(), [f"{ADAPTER} is missing"]),
    "no config": (lambda f: (f / CONFIG).unlink(), [f"{CONFIG} is missing"]),
    "config of another kind": (lambda f: (f / CONFIG).write_text("[1"), ["truncated, or no JSON"]),
    "config that is a list": (lambda f: (f / CONFIG).write_text("[1]"), ["truncated, or no JSON"]),
    "no needed key": (lambda f: change(f, {"lora_alpha": None}), ["has no lora_alpha"]),
    "a pickle": (lambda f: (f / ADAPTER).rename(f / "adapter_model.bin"), ["adapter_model.bin is a pickle"]),
    "truncated": (lambda f: cut(f, -100), ["truncated: "]),
    "truncated header": (lambda f: cut(f, 50), ["no valid header"]),
    "another width": (lambda f: change(f, tensors={n: [8, 32] if s == [8, 64] else s for n, s in tensors_of(f).items()}), [OTHER]),
    "another depth": (lambda f: renamed(f, "layers.1.", "layers.7."), [OTHER]),
    "other modules": (lambda f: renamed(f, "q_proj", "c_attn"), [ODD]),
    "another base by name": (lambda f: change(f, {"base_model_name_or_path": "us/else"}), ["names the base 'us/else'"]),
    "A without B": (lambda f: without(f, "layers.0.self_attn.q_proj.lora_B"), ["q_proj has 3 A and B in 2 layers"]),
    "a layer left out": (lambda f: without(f, "layers.1.self_attn.q_proj"), ["q_proj has 2 A and B in 2 layers"]),
    "DoRA": (lambda f: change(f, {"use_dora": True}, {**tensors_of(f), f"{Q}.lora_magnitude_vector": [64]}), ["use_dora is true", ODD]),
    "modules_to_save": (lambda f: change(f, {"modules_to_save": ["norm"]}, {**tensors_of(f), "base_model.model.model.norm.weight": [64]}), ["modules_to_save is", ODD]),
    "bias": (lambda f: change(f, {"bias": "all"}), ['bias is "all", which vLLM']),
    "an ignored key": (lambda f: change(f, {"target_parameters": ["x"]}), ["vLLM 0.33.0 ignores"]),
    "transposed": (lambda f: change(f, {"fan_in_fan_out": True}), ["fan_in_fan_out is true"]),
    "a pattern that differs": (lambda f: change(f, {"rank_pattern": {"q_proj": 2}}), [OTHER]),
    "PiSSA": (lambda f: change(f, {"init_lora_weights": "pissa_niter_4"}), ["pissa_niter_4"]),
    "no regular expression": (lambda f: change(f, {"rank_pattern": {"(": 3}, "r": "8"}, {f"{Q}.lora_A.weight": [8]}), [OTHER]),
    "a tensor without a shape": (lambda f: header(f, {"a": {"data_offsets": [0, 0]}}), ["no valid header"]),
    "another method": (lambda f: change(f, {"peft_type": "LOHA"}), ["peft_type is 'LOHA'"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_by_name(tmp_path, fault):
    folder = write(tmp_path / "a", PLAIN, 8, "attention+mlp")
    plant, says = FAULTS[fault]
    plant(folder)
    found = problems(folder, VLLM, PLAIN, 4 if fault.startswith("rank above") else 8, LLAMA)
    assert len(found) == len(says) and all(s in " ".join(found) for s in says), found


def test_an_unembedding_that_the_server_refuses_is_found(tmp_path):
    tied, plain = (write(tmp_path / m.name, m, 8, "all") for m in (TIED, PLAIN))
    for given in ("", LLAMA):
        (found,) = problems(tied, VLLM, TIED, 8, given)
        assert found.startswith("an adapter of the tied unembedding lm_head: the base ties it")
    (found,) = problems(plain, VLLM, PLAIN, 8, "MistralForCausalLM")
    assert "the unembedding lm_head: vLLM 0.33.0 takes it for some" in found
    experts = write(tmp_path / "e", EXPERTS, 4, "mlp")
    ignored, refused = problems(experts, VLLM, EXPERTS, 8, LLAMA)
    assert "adapters of experts: vLLM refuses" in refused and "target_parameters" in ignored


def test_layers_and_ranks_that_a_server_takes():
    rest, all_ = "attention+mlp", "attention+mlp+unembedding"
    assert adapted(PEFT, all_, TIED, "") == (all_, "") and PROFILES["peft"] == PEFT
    assert adapted(VLLM, all_, PLAIN, LLAMA) == (all_, "")
    assert adapted(VLLM, all_, PLAIN, "Qwen2ForCausalLM")[0] == rest
    layers, why = adapted(VLLM, all_, PLAIN, "")
    assert layers == rest and "not known" in why
    assert adapted(VLLM, rest, TIED, "") == (rest, "")
    for layers, model, says in (
        ("unembedding", TIED, "has nothing else. Add method.layers=attention"),
        ("all", EXPERTS, "enable-mixed-moe-lora-format.*Add method.layers=attention"),
    ):
        with pytest.raises(SpecError, match=says):
            adapted(VLLM, layers, model, LLAMA)
    assert [VLLM.largest_rank(r) for r in (1, 2, 8, 33, 300, 512)] == [1, 8, 8, 64, 320, 512]
    with pytest.raises(SpecError, match=r"rank 513: .* up to 512, set to one of 1, 8, 16"):
        VLLM.largest_rank(513)
    assert PEFT.largest_rank(513) == 513


def test_the_command_names_every_adapter_and_an_allowed_rank():
    assert serve_command(PEFT, "b", {"a": "."}, 3) == ""
    one = serve_command(VLLM, "my base", {"ann": "."}, 3)
    options = "--enable-lora --max-lora-rank 8 --max-loras 1 --max-cpu-loras 1"
    assert one == f"vllm serve 'my base' {options} --lora-modules ann=."
    many = serve_command(VLLM, "us/plain", {f"c{k}": f"./c{k}" for k in range(100)}, 20)
    assert "--max-lora-rank 32 --max-loras 8 --max-cpu-loras 100 " in many
    assert many.endswith(" c99=./c99")
    own_form = serve_command(VLLM, "us/plain", {"ann": "."}, 3, "./chat_template.jinja")
    assert own_form.endswith(" ann=. --chat-template ./chat_template.jinja")


def test_the_setting_is_of_fleets_alone():
    fleet, refused = ("customers=x.csv", "serve=vllm"), "serve is only for action=fleet"
    for action in ("fleet", "plan"):
        assert compose_request([f"action={action}", *fleet]).serve == "vllm"
    for given in (["serve=vllm"], ["action=advise", *fleet]):
        with pytest.raises(SpecError, match=refused):
            check(compose_request(given))
    with pytest.raises(SpecError, match="changes a rule"):
        compose_request(["action=fleet", *fleet, "serve.ranks=[4]"])

"""What a server takes: the plan of a fleet, the check of a folder, the command."""

import json
import struct

import pytest

from lorasweep.config import catalogue
from lorasweep.errors import SpecError
from lorasweep.fleet import folders
from lorasweep.fleet.folders import ADAPTER, CONFIG, problems
from lorasweep.fleet.rows import Rules
from lorasweep.fleet.runs import read_rules, write_rules
from lorasweep.fleet.serving import PEFT, adapted, serve_command
from lorasweep.methods.lora import LoRA
from lorasweep.spec.method import parse_layers
from lorasweep.spec.model import ModelSpec
from tests.unit.customers.world import CONF
from tests.world import compose_request

PROFILES = {name: read() for name, read in catalogue.profiles(CONF).items()}
VLLM = PROFILES["vllm"]
LLAMA = "LlamaForCausalLM"
SHAPE = {"hidden_size": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_size": 32}
PLAIN = ModelSpec("plain", "hub", "us/plain", **SHAPE, mlp_size=96, vocab_size=50)
TIED = ModelSpec("tied", "hub", "us/tied", **SHAPE, mlp_size=96, vocab_size=50, tied=True)
FUSED = ModelSpec(
    "fused",
    "folder",
    "x/fused",
    **SHAPE,
    mlp_size=96,
    vocab_size=50,
    attention=("qkv_proj", "o_proj"),
    shapes={"qkv_proj": "64x128"},
)
EXPERTS = ModelSpec(
    "experts",
    "hub",
    "us/experts",
    **SHAPE,
    mlp_size=24,
    vocab_size=50,
    n_experts=4,
    n_active_experts=2,
    qk_norm=True,
)


def write(folder, model, rank, layers):
    """Write the folder that a fleet writes, with empty weights."""
    import torch

    from lorasweep.cli.finished_runs import write_adapter
    from lorasweep.spec.run import RunSpec

    method, state = LoRA(rank=rank, layers=layers), {}
    for layer_set in parse_layers(layers):
        names = {
            "attention": "self_attn.{}",
            "mlp": "mlp.{}",
            "unembedding": "{}",
            "router": "mlp.{}",
        }
        for name in model.modules(layer_set)[0]:
            for k in range(model.n_layers if layer_set != "unembedding" else 1):
                module = names[layer_set].format(name)
                module = module if layer_set == "unembedding" else f"model.layers.{k}.{module}"
                if name == "experts":
                    r = method.expert_rank_of(model.n_experts, model.n_active_experts)
                    for part, (i, o) in {
                        "gate": (64, 24),
                        "up": (64, 24),
                        "down": (24, 64),
                    }.items():
                        state[f"{module}.{part}_proj.A"] = torch.randn(4 * r, i)
                        state[f"{module}.{part}_proj.B"] = torch.randn(4 * o, r)
                    continue
                i, o = (64, 4) if name == "gate" else model.known_shapes[name]
                state[f"{module}.A"], state[f"{module}.B"] = (
                    torch.zeros(rank, i),
                    torch.zeros(o, rank),
                )
    spec = RunSpec(model=model, dataset=compose_request([]).points[0].spec.dataset, method=method)
    write_adapter(folder, spec, state, "0" * 40)
    return folder


CLEAN = [
    ("vllm", PLAIN, 1, "all"),
    ("vllm", PLAIN, 7, "all"),
    ("vllm", PLAIN, 8, "attention"),
    ("vllm", PLAIN, 16, "mlp"),
    ("vllm", PLAIN, 32, "attention+mlp"),
    ("vllm", PLAIN, 48, "unembedding"),
    ("vllm", TIED, 4, "attention+mlp"),
    ("vllm", TIED, 16, "attention"),
    ("vllm", TIED, 31, "mlp"),
    ("vllm", FUSED, 8, "all"),
    ("vllm", FUSED, 12, "attention"),
    ("vllm", EXPERTS, 4, "attention"),
    ("vllm", EXPERTS, 8, "attention+unembedding"),
    ("peft", PLAIN, 50, "all"),
    ("peft", TIED, 2, "all"),
    ("peft", FUSED, 16, "all"),
    ("peft", EXPERTS, 4, "all"),
    ("peft", EXPERTS, 8, "mlp"),
    ("peft", EXPERTS, 2, "attention+mlp+router"),
    ("peft", EXPERTS, 6, "attention+mlp"),
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
        header, at = {}, 0
        for name, shape in tensors.items():
            size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        (folder / ADAPTER).write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))


def tensors_of(folder):
    return {n: t["shape"] for n, t in folders._tensors(folder).items()}


def renamed(folder, old, new):
    change(folder, tensors={n.replace(old, new): s for n, s in tensors_of(folder).items()})


def without(folder, part):
    change(folder, tensors={n: s for n, s in tensors_of(folder).items() if part not in n})


Q = "base_model.model.model.layers.0.self_attn.q_proj"
FAULTS = {
    "wrong prefix": (lambda f: renamed(f, "base_model.model.", "base."), ["without the prefix"]),
    "rank above the server's": (lambda f: None, ["rank 8 is above the largest of the server, 4"]),
    "rank of the config": (lambda f: change(f, {"r": 4}), ["another rank in the tensors"]),
    "no weights": (lambda f: (f / ADAPTER).unlink(), [f"{ADAPTER} is missing"]),
    "no config": (lambda f: (f / CONFIG).unlink(), [f"{CONFIG} is missing"]),
    "config of another kind": (lambda f: (f / CONFIG).write_text("[1"), ["truncated, or no JSON"]),
    "no needed key": (lambda f: change(f, {"lora_alpha": None}), ["has no lora_alpha"]),
    "a pickle": (
        lambda f: (f / ADAPTER).rename(f / "adapter_model.bin"),
        ["adapter_model.bin is a pickle"],
    ),
    "truncated": (
        lambda f: (f / ADAPTER).write_bytes((f / ADAPTER).read_bytes()[:-100]),
        ["truncated: "],
    ),
    "truncated header": (
        lambda f: (f / ADAPTER).write_bytes((f / ADAPTER).read_bytes()[:50]),
        ["no valid header"],
    ),
    "another width": (
        lambda f: change(f, tensors={n: [8, 32] if s == [8, 64] else s for n, s in tensors_of(f).items()}),
        ["weights of another base"],
    ),
    "another depth": (lambda f: renamed(f, "layers.1.", "layers.7."), ["weights of another base", "1 of 2 layers"]),
    "other modules": (lambda f: renamed(f, "q_proj", "c_attn"), ["weights of another base"]),
    "another base by name": (lambda f: change(f, {"base_model_name_or_path": "us/else"}), ["names the base 'us/else'"]),
    "A without B": (lambda f: without(f, "layers.0.self_attn.q_proj.lora_B"), ["A without B"]),
    "a layer left out": (lambda f: without(f, "layers.1.self_attn.q_proj"), ["q_proj in 1 of 2"]),
    "DoRA": (
        lambda f: change(f, {"use_dora": True}, {**tensors_of(f), f"{Q}.lora_magnitude_vector": [64]}),
        ["use_dora is true", "DoRA's lora_magnitude_vector"],
    ),
    "modules_to_save": (
        lambda f: change(f, {"modules_to_save": ["norm"]}, {**tensors_of(f), "base_model.model.model.norm.weight": [64]}),
        ["modules_to_save is", "neither A nor B"],
    ),
    "bias": (lambda f: change(f, {"bias": "all"}), ['bias is "all", which vLLM']),
    "an ignored key": (lambda f: change(f, {"target_parameters": ["x"]}), ["vLLM 0.33.0 ignores"]),
    "transposed": (lambda f: change(f, {"fan_in_fan_out": True}), ["fan_in_fan_out is true"]),
    "a pattern that differs": (lambda f: change(f, {"rank_pattern": {"q_proj": 2}}), ["has 8, not 2"]),
    "PiSSA": (lambda f: change(f, {"init_lora_weights": "pissa_niter_4"}), ["pissa_niter_4"]),
    "another method": (lambda f: change(f, {"peft_type": "LOHA"}), ["peft_type is 'LOHA'"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_by_name(tmp_path, fault):
    folder = write(tmp_path / "a", PLAIN, 8, "attention+mlp")
    plant, says = FAULTS[fault]
    plant(folder)
    found = problems(folder, VLLM, PLAIN, 4 if fault.startswith("rank above") else 8, LLAMA)
    assert len(found) == len(says) and all(s in f for f, s in zip(found, says)), found


def test_an_unembedding_that_the_server_refuses_is_found(tmp_path):
    tied, plain = (write(tmp_path / m.name, m, 8, "all") for m in (TIED, PLAIN))
    for given in ("", LLAMA):
        (found,) = problems(tied, VLLM, TIED, 8, given)
        assert found.startswith("an adapter of the tied unembedding lm_head: the base ties it")
    (found,) = problems(plain, VLLM, PLAIN, 8, "MistralForCausalLM")
    assert "the unembedding lm_head: vLLM 0.33.0 takes it for some" in found
    (found, ignored) = problems(write(tmp_path / "e", EXPERTS, 4, "mlp"), VLLM, EXPERTS, 8, LLAMA)[
        ::-1
    ]
    assert "adapters of experts: vLLM refuses" in found and "target_parameters" in ignored


def test_an_exotic_file_is_a_problem_and_no_crash(tmp_path):
    folder = write(tmp_path / "a", PLAIN, 8, "attention")
    change(
        folder,
        {"rank_pattern": {"(": 3}, "target_modules": ".*", "r": "8"},
        {f"{Q}.lora_A.weight": [8]},
    )
    assert any("another base" in p for p in problems(folder, VLLM, PLAIN))
    header = json.dumps({"a": {"data_offsets": [0, 0]}}).encode()
    (folder / ADAPTER).write_bytes(struct.pack("<Q", len(header)) + header)
    assert any("no valid header" in p for p in problems(folder, VLLM, PLAIN))


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
    assert (
        one
        == "vllm serve 'my base' --enable-lora --max-lora-rank 8 --max-loras 1 --max-cpu-loras 1 --lora-modules ann=."
    )
    many = serve_command(VLLM, "us/plain", {f"c{k}": f"./c{k}" for k in range(100)}, 20)
    assert "--max-lora-rank 32 --max-loras 8 --max-cpu-loras 100 " in many and many.endswith(
        " c99=./c99"
    )
    own_form = serve_command(VLLM, "us/plain", {"ann": "."}, 3, "./chat_template.jinja")
    assert own_form.endswith(" ann=. --chat-template ./chat_template.jinja")


def test_the_fleets_folder_keeps_the_profile(tmp_path):
    (tmp_path / "fleet.json").write_text('{"mask": null, "answers": "last"}')
    assert read_rules(tmp_path).serve == "peft"
    write_rules(tmp_path, Rules(serve="vllm"))
    assert read_rules(tmp_path).serve == "vllm"


def test_the_setting_is_of_fleets_alone():
    assert compose_request(["action=fleet", "customers=x.csv", "serve=vllm"]).serve == "vllm"
    assert compose_request(["action=plan", "customers=x.csv", "serve=vllm"]).serve == "vllm"
    assert compose_request([]).serve == "peft"
    for given, says in (
        (["serve=vllm"], "serve is only for action=fleet"),
        (["action=advise", "customers=x.csv", "serve=vllm"], "serve is only for"),
        (
            ["action=fleet", "customers=x.csv", "serve=vllm", "serve.ranks=[4]"],
            "serve.ranks=.*changes a rule",
        ),
    ):
        with pytest.raises(SpecError, match=says):
            compose_request(given)

"""What a server takes: the plan of a fleet, the check of a folder, the command; and its answers."""

import json
import struct
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasweep.config import catalogue
from lorasweep.data.examples import Example
from lorasweep.errors import SpecError
from lorasweep.fleet import serving
from lorasweep.fleet.serving import ADAPTER, CONFIG, KEY, OF_CHANGE, PEFT, Server, adapted, problems
from lorasweep.methods.lora import LoRA
from lorasweep.models.load import write_adapter
from lorasweep.spec.method import parse_layers
from lorasweep.spec.model import ModelSpec
from tests.customers import CONF, answering, vllm
from tests.world import tiny_spec

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
                sides = {module: (model.known_shapes.get(name), rank)}
                if name == "experts":
                    r = method.expert_rank_of(model.n_experts, model.n_active_experts)
                    parts = {"gate": (64, 96), "up": (64, 96), "down": (24, 256)}
                    sides = {f"{module}.{part}_proj": (sizes, r) for part, sizes in parts.items()}
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
    *(("peft", EXPERTS, 6, layers) for layers in ("mlp", "attention+mlp")),
]


@pytest.mark.parametrize("name, model, rank, layers", CLEAN)
def test_nothing_is_found_in_a_folder_of_a_fleet(tmp_path, name, model, rank, layers):
    profile = PROFILES[name]
    assert adapted(profile, layers, model, LLAMA) == (layers, "")
    folder = write(tmp_path / "a", model, rank, layers)
    assert problems(folder, profile, model, LoRA(rank=rank, layers=layers), LLAMA) == []


def change(folder, config=None, tensors=lambda found: found):
    """Write adapter_config.json with other values, and the weights with other tensors."""
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
    save_file(tensors(load_file(folder / ADAPTER)), folder / ADAPTER)


def cut(folder, at):
    (folder / ADAPTER).write_bytes((folder / ADAPTER).read_bytes()[:at])


def renamed(folder, old, new):
    change(folder, tensors=lambda found: {n.replace(old, new): t for n, t in found.items()})


def without(folder, part):
    change(folder, tensors=lambda found: {n: t for n, t in found.items() if part not in n})


Q = "base_model.model.model.layers.0.self_attn.q_proj"
ODD, LOST = "tensors that were not trained on 'plain'", "tensors that were trained, of"
SHAPELESS = b'{"a": {"dtype": "F32", "data_offsets": [0, 0]}}'
FAULTS = {
    "wrong prefix": (lambda f: renamed(f, "base_model.model.", "base."), [ODD, LOST]),
    "rank of the config": (lambda f: change(f, {"r": 4}), ["r is 4, and 8 was trained"]),
    "no weights": (lambda f: (f / ADAPTER).unlink(), [f"{ADAPTER} cannot be read"]),
    "no config": (lambda f: (f / CONFIG).unlink(), [f"{CONFIG} cannot be read"]),
    "config that is a list": (lambda f: (f / CONFIG).write_text("[1]"), ["truncated, or no JSON"]),
    "no module named": (lambda f: change(f, {"target_modules": ["q_proj"]}), ["target_modules lacks k_proj"]),
    "another scale": (lambda f: change(f, {"use_rslora": True}), ["use_rslora is true"]),
    "a module's alpha": (lambda f: change(f, {"alpha_pattern": {"q_proj": 1}}), ["alpha_pattern is"]),
    "weights in a folder": (lambda f: ((f / ADAPTER).unlink(), (f / ADAPTER).mkdir()), ["cannot be read"]),
    "a layer in a layer": (lambda f: renamed(f, "layers.0.", "layers.0.5."), [ODD, LOST]),
    "another alpha": (lambda f: change(f, {"lora_alpha": 5}), ["lora_alpha is 5"]),
    "truncated": (lambda f: cut(f, -100), ["truncated"]),
    "truncated header": (lambda f: cut(f, 50), ["no valid header"]),
    "another width": (lambda f: change(f, tensors=lambda t: {n: s[:, :32].contiguous() if s.shape == (8, 64) else s for n, s in t.items()}), [ODD]),
    "another depth": (lambda f: renamed(f, "layers.1.", "layers.7."), [ODD, LOST]),
    "another base by name": (lambda f: change(f, {"base_model_name_or_path": "us/else"}), ["names the base 'us/else'"]),
    "A without B": (lambda f: without(f, "layers.0.self_attn.q_proj.lora_B"), ["lacks 1 tensors that were trained, of q_proj"]),
    "DoRA": (lambda f: change(f, {"use_dora": True}, lambda t: {**t, f"{Q}.lora_magnitude_vector": torch.ones(64)}), ["use_dora is true", ODD]),
    "modules_to_save": (lambda f: change(f, {"modules_to_save": ["norm"]}, lambda t: {**t, "base_model.model.model.norm.weight": torch.ones(64)}), ["modules_to_save is", ODD]),
    "bias": (lambda f: change(f, {"bias": "all"}), ['bias is "all", which vLLM']),
    "an ignored key": (lambda f: change(f, {"target_parameters": ["x"]}), ["vLLM 0.33.0 ignores"]),
    "PiSSA": (lambda f: change(f, {"init_lora_weights": "pissa_niter_4"}), ["pissa_niter_4"]),
    "a tensor without a shape": (lambda f: (f / ADAPTER).write_bytes(struct.pack("<Q", len(SHAPELESS)) + SHAPELESS), [ODD, LOST]),
    "another method": (lambda f: change(f, {"peft_type": "LOHA"}), ["peft_type is 'LOHA'"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_by_name(tmp_path, fault):
    folder = write(tmp_path / "a", PLAIN, 8, "attention+mlp")
    plant, says = FAULTS[fault]
    plant(folder)
    found = problems(folder, VLLM, PLAIN, LoRA(rank=8, layers="attention+mlp"), LLAMA)
    assert len(found) == len(says) and all(s in " ".join(found) for s in says), found


def test_an_unembedding_or_experts_that_the_server_refuses_are_found(tmp_path):
    some = ["unembedding lm_head: vLLM 0.33.0 takes it for some"]
    for model, given, layers, says in (
        (TIED, "", "all", ["an adapter of the unembedding lm_head: the base ties it"]),
        (PLAIN, "MistralForCausalLM", "all", some),
        (EXPERTS, LLAMA, "mlp", ["target_parameters", "adapters of experts: vLLM refuses"]),
    ):
        folder = write(tmp_path / model.name, model, 8, layers)
        found = problems(folder, VLLM, model, LoRA(rank=8, layers=layers), given)
        assert len(found) == len(says) and all(s in f for s, f in zip(says, found)), found


def test_layers_and_ranks_that_a_server_takes():
    rest, all_ = "attention+mlp", "attention+mlp+unembedding"
    assert adapted(PEFT, all_, TIED, "") == (all_, "") and PROFILES["peft"] == PEFT
    assert adapted(VLLM, all_, PLAIN, LLAMA) == (all_, "")
    assert adapted(VLLM, all_, PLAIN, "Qwen2ForCausalLM")[0] == rest
    layers, why = adapted(VLLM, all_, PLAIN, "")
    assert layers == rest and "not known" in why
    assert adapted(VLLM, rest, TIED, "") == (rest, "")
    for layers, model, says in (("unembedding", TIED, "ties it"), ("all", EXPERTS, "enable-mixed")):
        with pytest.raises(SpecError, match=f"{says}.*Add method.layers=attention"):
            adapted(VLLM, layers, model, LLAMA)
    assert [VLLM.largest_rank(r) for r in (1, 2, 8, 33, 300, 512)] == [1, 8, 8, 64, 320, 512]
    with pytest.raises(SpecError, match=r"rank 513: .* up to 512, set to one of 1, 8, 16"):
        VLLM.largest_rank(513)
    assert PEFT.largest_rank(513) == 513


# ---------------------------------------------------------------- answers

COMMON, OWN, NOISE = 64, 16, 0.02


def planted(seed, change=0.5, customers=5, noise=NOISE):
    """The trainer's base and its adapters, by name; and errors of a server, drawn by name."""
    rng = np.random.default_rng(seed)
    base = rng.normal(-3, 2, COMMON + OWN)
    trained = {f"c{k}": base + rng.normal(0, change, base.shape) for k in range(customers)}
    return base, trained, lambda: rng.normal(0, noise, base.shape)


def judged(base, trained, served, served_base, name="c0", noise=NOISE):
    common = {n: v[:COMMON] for n, v in trained.items()}
    return serving.judge(name, base, trained[name], served_base, served, common, noise)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("change", [0.05, 0.5, 3.0])
def test_each_fault_has_its_verdict_and_a_right_adapter_none(seed, change):
    base, trained, error = planted(seed, change)
    own, served_base = trained["c0"], base + error()
    # as measured on a server in bf16, errors also grow with the change
    rough = error() / NOISE * OF_CHANGE / 5 * change
    # an adapter of another base, or of nobody here
    stranger = base + 3 * change * np.random.default_rng(seed + 99).normal(size=base.shape)
    for served, verdict, factor in (
        (own + error() + rough, serving.SERVED, 1),
        (served_base.copy(), serving.NOT_APPLIED, 0),
        (trained["c3"] + error() + rough, serving.ANOTHERS, None),
        (2 * own - base + error(), serving.DIFFERS, 2),
        ((own + base) / 2 + error(), serving.DIFFERS, 0.5),
        (stranger + error(), serving.DIFFERS, None),
    ):
        found = judged(base, trained, served, served_base)
        assert found["verdict"] == verdict and found["nearest"] in trained, found
        if factor is not None:
            assert abs(found["factor"] - factor) <= 4 * found["factor_se"] + OF_CHANGE


@pytest.mark.parametrize("seed", range(20))
def test_what_is_smaller_than_the_noise_is_neither_right_nor_a_fault(seed):
    base, trained, error = planted(seed, change=NOISE / 4)
    served_base = base + error()
    # a large change under the name is a fault nevertheless
    big = {**trained, "c1": base + 0.5 * np.random.default_rng(seed).normal(size=base.shape)}
    for own, served, verdict in (
        (trained, trained["c0"] + error(), serving.TOO_SMALL),
        (trained, trained["c1"] + error(), serving.TOO_SMALL),
        (trained, served_base.copy(), serving.TOO_SMALL),
        (big, big["c1"] + error(), serving.ANOTHERS),
        (trained, big["c1"] + error(), serving.DIFFERS),
    ):
        assert judged(base, own, served, served_base)["verdict"] == verdict
    # two customers with the same rows are both served
    base, trained, error = planted(seed)
    twins = {**trained, "c1": trained["c0"] + NOISE / 10 * error()}
    for name in ("c0", "c1"):
        found = judged(base, twins, twins["c0"] + error(), base + error(), name)
        assert found["verdict"] == serving.SERVED


def test_an_exact_server_and_an_adapter_that_learnt_nothing_are_no_division_by_zero():
    base, trained, _ = planted(0)
    assert judged(base, trained, trained["c0"], base, noise=0.0)["verdict"] == serving.SERVED
    nothing = {"c0": base.copy()}
    assert judged(base, nothing, base, base, noise=NOISE)["verdict"] == serving.TOO_SMALL


ROWS = [
    Example(np.array([5, 6, 7, 8]), np.array([False, False, True, True])),
    Example(np.array([9, 4, 3]), np.array([False, True, False])),
]


def log_p_of(model, tokens):
    return [-(len(model) + sum(tokens[:t]) + 10 * t) / 7 for t in range(2, len(tokens) + 1)]


@pytest.fixture
def serve():
    """Start a server that answers as `reply(path, body, headers)` says; returns its address."""
    with ExitStack() as started:
        yield lambda reply: started.enter_context(answering(reply))


REPLY = vllm({"base": None, "ann": "base"}, log_p_of)


def test_the_answer_tokens_come_in_order_and_the_key_goes_to_no_other_address(serve, monkeypatch):
    seen = []

    def keyed(path, body, headers):
        seen.append(headers["Authorization"])
        return REPLY(path, body, headers)

    monkeypatch.setenv(KEY, "secret")
    there = serve(keyed)
    server = Server(there + "/v1/")
    assert server.bases == {"ann": "base"}
    expected = [log_p_of("ann", t)[-1] for t in ([5, 6, 7], [5, 6, 7, 8], [9, 4])]
    assert server.log_p("ann", ROWS) == pytest.approx(expected)
    other = there.replace("127.0.0.1", "localhost") + "/v1/models"
    with pytest.raises(SpecError, match="redirects"):
        Server(serve(lambda path, body, headers: (302, other)))
    assert seen == 4 * ["Bearer secret"]


LISTED = '{"data": [{"id": "ann", "owned_by": "vllm"}]}'
NO_NUMBERS = "returns no log-probabilities of given tokens"
WRONG = [  # status and text of the list of models, text of a completion, message
    (404, "nope", "", "/v1/models gives no answer.*404: nope"),
    (401, "no", "", f"set {KEY}"),
    (302, "http://elsewhere/v1", "", "302.* redirects to http://elsewhere/v1"),
    (200, "<html>", "", "no answer of the OpenAI API"),
    (200, "[]", "", "no list of vLLM's models"),
    (200, LISTED.replace("vllm", "sglang"), "", "no list of vLLM's models"),
    (200, LISTED, '{"choices": [{"text": "x"}]}', NO_NUMBERS),
    (200, LISTED, '{"choices": [{"logprobs": {"token_logprobs": [null]}}]}', NO_NUMBERS),
    (200, LISTED, '{"choices": [{"logprobs": {"token_logprobs": [NaN]}}]}', NO_NUMBERS),
]


@pytest.mark.parametrize("status, listed, completion, message", WRONG)
def test_what_is_no_server_or_cannot_answer_says_so(serve, status, listed, completion, message):
    url = serve(lambda path, body, headers: (status, listed) if body is None else (200, completion))
    with pytest.raises(SpecError, match=message):
        Server(url).log_p("ann", ROWS)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "localhost:8000"])
def test_where_nothing_answers_the_message_says_what_to_type(url):
    with pytest.raises(SpecError, match=r"no answer .*url=http://localhost:8000"):
        Server(url)

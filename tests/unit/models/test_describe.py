"""Models described from their own files: every count equals that of transformers' modules, and what
is described loads, trains and is exported."""

import dataclasses
import json
import shutil

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lorasweep.advise.read import RowError, customer_of, shape_of
from lorasweep.errors import ModelError
from lorasweep.launch.trainer import finetune
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.methods.stacked.peft_export import save_peft
from lorasweep.models import find
from lorasweep.models import load as models
from lorasweep.models.describe import describe_model, with_shape
from lorasweep.spec.model import LAYER_SETS, ROUTER, ModelSpec
from lorasweep.store.checkpoint import PARAM
from lorasweep.sweep.trained import trained_by_set
from tests import small_hub
from tests.bpe import qwen_like
from tests.training import EPS, Trained, noise, run
from tests.world import compose_request, tiny_spec

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
FAMILIES = {
    **{name: {} for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Olmo2", "Phi3")},
    "Qwen3Moe": EXPERTS,
    # not hidden size / heads; windows shorter than the rows of these tests
    "Gemma3": {"head_dim": 12, "sliding_window": 4},
}
"""Architectures, and changes to a small config of each."""
CALLED_OTHERWISE = {
    "GPTNeoX": {},  # Pythia
    "OPT": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "Falcon": {},
    "GPTJ": {"rotary_dim": 4, "n_inner": 24},
    "Bloom": {},
}
"""Architectures whose forward pass passes the tokens by position, or calls an inner decoder."""
COMMIT = "0123456789abcdef" * 2 + "01234567"


def config_name(family):
    return "Gemma3Text" if family == "Gemma3" else family


def random_model(family, **changes):
    """A model with random weights and biases; its vocabulary is the tokenizer's."""
    cls = getattr(transformers, f"{config_name(family)}Config")
    torch.manual_seed(0)
    shape = {
        **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
        **{"vocab_size": len(qwen_like()), "max_position_embeddings": 128},
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
        **{**FAMILIES, **CALLED_OTHERWISE}.get(family, {}),
        **changes,
    }
    if family == "Falcon":  # which computes it
        del shape["head_dim"]
    config = cls(**shape)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    return model


def save(model, folder, dtype=torch.float32):
    """Save a model with a tokenizer; returns the folder."""
    model.to(dtype).save_pretrained(folder)
    qwen_like().save_pretrained(folder)
    return folder


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def saved(family, tmp_path):
    """A model's modules, and the folder where it is saved."""
    model = random_model(family)
    return model, save(model, tmp_path / "mine")


def weights_in(model, *words):
    """Count the weights of two or more axes whose names have one of the words, by shape."""
    named = model.named_parameters()
    return sum(p.numel() for n, p in named if p.dim() > 1 and any(w in n for w in words))


def test_every_count_is_that_of_the_modules(saved, family):
    model, folder = saved
    spec, models_dir = describe_model(str(folder))
    config, moe = model.config, family == "Qwen3Moe"
    assert (spec.source, spec.location, models_dir) == ("folder", "mine", str(folder.parent))
    assert spec.n_params == sum(p.numel() for p in model.parameters())
    by_set = {f.layer_set: f for f in trained_by_set(FullFT(), spec)}
    assert by_set["attention"].weights == weights_in(model, "self_attn")
    assert by_set["mlp"].weights == weights_in(model, "mlp") - weights_in(model, "mlp.gate.")
    assert by_set["unembedding"].weights == model.lm_head.weight.numel()
    router = weights_in(model, "mlp.gate.")
    assert by_set[ROUTER].weights == router if moe else not router
    n_attention, n_mlp = (2, 2) if family == "Phi3" else (4, 3)
    counts = {s: spec.modules(s)[1] for s in LAYER_SETS}
    assert counts == {
        "attention": 2 * n_attention,
        "mlp": 2 if moe else 2 * n_mlp,
        "unembedding": 1,
    }
    idle = weights_in(model, "experts") // 2 if moe else 0  # two of four experts
    assert spec.n_active_params == spec.n_matmul_params - idle
    assert spec.n_matmul_params == weights_in(model, "layers") + model.lm_head.weight.numel()
    assert (spec.n_experts, spec.n_active_experts) == ((4, 2) if moe else (0, 0))
    assert (spec.n_heads, spec.n_kv_heads) == (2, 1)
    assert spec.head_size == (12 if family == "Gemma3" else 8)
    assert spec.tied == (family == "Gemma3") == config.tie_word_embeddings
    assert (spec.mlp_size, spec.context_length) == (12 if moe else 24, 128)


@pytest.mark.parametrize(
    ("family", "shape", "published"),
    [  # hidden size, layers, heads, key/value heads, width of the MLP, vocabulary
        ("Mistral", (4096, 32, 32, 8, 14336, 32000), 7_241_732_096),  # 7B-v0.1
        ("Qwen2", (896, 24, 14, 2, 4864, 151936), 494_032_768),  # Qwen2.5-0.5B
        ("Gemma3", (640, 18, 4, 1, 2048, 262144), 268_098_176),  # 270m
        ("Olmo2", (2048, 16, 16, 16, 8192, 100352), 1_484_916_736),  # 0425-1B
        ("Phi3", (3072, 32, 32, 32, 8192, 32064), 3_821_079_552),  # mini-4k
    ],
)
def test_published_models_have_as_many_parameters_as_their_cards_say(family, shape, published):
    hidden, n_layers, heads, kv, width, vocab = shape
    config = getattr(transformers, f"{config_name(family)}Config")(
        **{"hidden_size": hidden, "num_hidden_layers": n_layers, "num_attention_heads": heads},
        **{"num_key_value_heads": kv, "intermediate_size": width, "vocab_size": vocab},
        **{"head_dim": 256} if family == "Gemma3" else {},
        tie_word_embeddings=family in ("Qwen2", "Gemma3"),
        pad_token_id=None,
    )
    spec = with_shape(ModelSpec(name="any", source="folder", location="any"), config)
    assert spec.n_params == published


@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-8b", "qwen3-30b-a3b-base"])
def test_files_of_shipped_models_say_what_is_described(name):
    shipped = compose_request([f"model={name}"]).points[0].spec.model
    given = {f: getattr(shipped, f) for f in ("name", "source", "location", "revision")}
    found = with_shape(ModelSpec(**given, weights_dtype="bf16"), models.config_of(shipped))
    assert dataclasses.replace(found, context_length=0) == shipped


def test_what_is_described_trains_by_both_methods(saved, family):
    """Two updates of a pack of LoRA and one of full fine-tuning."""
    _, folder = saved
    model, models_dir = describe_model(str(folder))
    lora = LoRA(rank=2, layers="attention+mlp")
    spec = tiny_spec(model=model, method=lora, steps=2, lr=1e-2, batch_size=2)
    assert find.check_available(model, [models_dir])
    base = models.load(model, [models_dir], "fp32")
    assert base.tokenizer is not None
    rows = noise(spec.dataset, 12, train=8, test=4, validation=2)
    pack = [spec, dataclasses.replace(spec, lr=2e-2)]
    full = dataclasses.replace(spec, method=FullFT(), steps=1, lr=1e-3)
    for runs in (pack, [full]):
        found = Trained(finetune(runs, base, rows))
        for one in runs:
            trained = [t for n, t in found.states[one.id]["tensors"].items() if n.startswith(PARAM)]
            assert sum(t.numel() for t in trained) == one.method.n_trainable(model)
            result = found.results[one.id]
            assert result["norm_delta"] > 0 and result["test_nll"] < result["nll_start"] + 0.1


@pytest.mark.parametrize(
    "family", ["Gemma3", "Phi3", "Qwen2", "Olmo2", *CALLED_OTHERWISE], indirect=True
)
def test_peft_computes_what_an_exported_adapter_computed(saved, family, tmp_path):
    """The reference is W + scaling B A, added to the weights of transformers' model."""
    _, folder = saved
    described, models_dir = describe_model(str(folder))
    method = LoRA(rank=2, layers="attention+mlp")
    changes = {"steps": 2, "lr": 0.05, "batch_size": 2, "precision": "fp64", "eps": EPS}
    spec = tiny_spec(model=described, method=method, **changes)
    base = models.load(described, [models_dir], "fp64")
    states, _ = run([spec], base, noise(spec.dataset, 12, train=8, test=4, validation=2))
    state = states[spec.id]["tensors"]
    weights = {n.removeprefix(PARAM): t for n, t in state.items() if n.startswith(PARAM)}
    save_peft(tmp_path / "adapter", weights, 2, str(folder), None, method.scaling)
    cls = transformers.AutoModelForCausalLM
    tokens = torch.randint(len(qwen_like()), (2, 9))
    plain = cls.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        before = plain(input_ids=tokens).logits
        for name in sorted({n[:-2] for n in weights}):
            change = method.scaling * weights[f"{name}.B"] @ weights[f"{name}.A"]
            plain.get_submodule(name).weight += change.double()
        want = plain(input_ids=tokens).logits
        loaded = PeftModel.from_pretrained(cls.from_pretrained(folder), tmp_path / "adapter")
        got = loaded(input_ids=tokens).logits
    assert (want - before).abs().max() > 1e-2
    assert torch.allclose(got.double(), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype, found", [("bfloat16", "bf16"), ("float16", "fp32")])
def test_the_type_of_weights_is_that_of_the_files(tmp_path, dtype, found):
    folder = save(random_model("Llama"), tmp_path / "a", getattr(torch, dtype))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    spec, models_dir = describe_model(str(folder))
    assert spec.weights_dtype == found
    models.load(spec, [models_dir], "bf16")


def test_gemma_in_bf16_has_the_same_bits_and_its_norms_are_computed_in_float64(tmp_path):
    model, at = describe_model(str(save(random_model("Gemma3"), tmp_path / "a", torch.bfloat16)))
    assert model.weights_dtype == "bf16"
    wide = models.load(dataclasses.replace(model, weights_dtype="fp32"), [at], "bf16").model
    narrow = models.load(model, [at], "bf16").model
    assert {p.dtype for p in narrow.parameters() if p.dim() > 1} == {torch.bfloat16}
    tokens = torch.randint(len(qwen_like()), (2, 9))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(wide(input_ids=tokens).logits, narrow(input_ids=tokens).logits)
    exact = models.load(model, [at], "fp64").model
    norm, x = exact.model.layers[0].input_layernorm, torch.randn(3, 16, dtype=torch.float64)
    norm.weight.data.normal_()
    root = (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    assert torch.allclose(norm(x), x / root * (1 + norm.weight), rtol=1e-12)


def test_a_folder_is_known_by_its_content(tmp_path):
    folder = save(random_model("Llama"), tmp_path / "a" / "mine")
    spec, at = describe_model(str(folder))
    shutil.copytree(folder, tmp_path / "b" / "mine")
    assert describe_model("mine", [str(tmp_path / "b")]) == (spec, str(tmp_path / "b"))
    (folder / "notes.txt").write_text("not a part of it")
    assert describe_model(f"{folder}/") == (spec, at)
    other = save(random_model("Llama", hidden_size=32), tmp_path / "c" / "mine")
    changed, _ = describe_model(str(other))
    assert changed.revision != spec.revision and changed.name != spec.name
    # a folder of exec.models_dir may have another model of this name
    dirs = [str(tmp_path / "c"), at]
    assert models.load(spec, dirs).model.config.hidden_size == 16
    for check in (find.check_available, models.load):
        with pytest.raises(ModelError, match=rf"{other} is sha256:.* pins {spec.revision}"):
            check(spec, dirs[:1])


def test_the_pin_of_a_folder_is_what_sha256sum_prints(tmp_path):
    import subprocess

    folder = save(random_model("Llama"), tmp_path / "mine")
    spec, _ = describe_model(str(folder))

    def pin(*more):
        command = " ".join(["sha256sum config.json model*.safetensors", *more, "| sha256sum"])
        done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
        return f"sha256:{done.stdout.split()[0]}"

    assert spec.revision == pin("tokenizer.json", "tokenizer_config.json")
    # another chat template makes other rows, so it is another model
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    changed, _ = describe_model(str(folder))
    assert changed.revision == pin("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


# ---------------------------------------------------------------- the hub, and a GGUF file


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The repository org/tiny in a cache; returns its folder there."""
    from huggingface_hub import constants

    model = compose_request(["model=smollm2-135m"]).points[0].spec.model
    small = {"n_layers": 1, "hidden_size": 16, "n_heads": 2, "n_kv_heads": 1, "head_size": 8}
    small |= {"mlp_size": 32, "vocab_size": len(qwen_like())}
    named = {"name": "tiny", "location": "org/tiny", "revision": COMMIT}
    made = dataclasses.replace(model, **small, **named)
    monkeypatch.setattr(
        constants, "HF_HUB_CACHE", small_hub.make(tmp_path, [made], [])["HF_HUB_CACHE"]
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refs = tmp_path / "hub/models--org--tiny/refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    return made


def test_a_name_of_the_hub_is_pinned_to_its_commit(hub):
    spec, models_dir = describe_model("org/tiny")
    assert models_dir == ""
    assert dataclasses.replace(spec, name="tiny", context_length=0) == hub
    assert describe_model(f"org/tiny@{COMMIT}")[0] == spec
    assert models.load(spec, []).commit == COMMIT
    for given in ("org/tinny", "org/tiny@v9"):
        with pytest.raises(ModelError, match=rf"no folder or file .*{given}.*hub"):
            describe_model(given)


def test_of_a_model_that_is_not_downloaded_headers_are_enough(hub, tmp_path, monkeypatch):
    from types import SimpleNamespace as Made

    import huggingface_hub

    folder = tmp_path / f"hub/models--org--tiny/snapshots/{COMMIT}"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    (folder / "model.safetensors").unlink()

    def headers(name, revision):
        assert (name, revision) == ("org/tiny", COMMIT)
        tensors = {"a": Made(dtype="BF16", shape=[2, 2]), "norm": Made(dtype="F32", shape=[2])}
        return Made(files_metadata={"model.safetensors": Made(tensors=tensors)})

    assert describe_model("org/tiny")[0].weights_dtype == "fp32"  # offline: as its config says
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", headers)
    spec, _ = describe_model("org/tiny")
    assert dataclasses.replace(spec, name="tiny", context_length=0) == hub


# ---------------------------------------------------------------- what is refused


def refusal(given, **more):
    with pytest.raises(ModelError) as error:
        describe_model(str(given), **more)
    return str(error.value)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("GPT2", {"n_embd": 16, "n_head": 2, "n_layer": 2}, ("GPT2", "Conv1D", "nn.Linear")),
        ("Qwen2Moe", EXPERTS, ("Qwen2Moe", "beside its experts", "shared_expert_gate")),
        ("Qwen3Moe", {**EXPERTS, "mlp_only_layers": [0]}, ("Qwen3Moe", "2 layers differ")),
    ],
)
def test_other_architectures_are_refused_by_name(tmp_path, family, changes, says):
    cls = getattr(transformers, f"{family}Config")
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    if family == "GPT2":
        shape = {"vocab_size": 32}
    heads = {} if family == "GPT2" else {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = cls(**{**shape, **heads, **changes})
    folder = save(transformers.AutoModelForCausalLM.from_config(config), tmp_path / "mine")
    found = refusal(folder)
    assert str(folder) in found and all(word in found for word in says)
    with pytest.raises(RowError, match=says[1]):
        shape_of(customer_of({"name": "a", "model": str(folder), "task": "sft"}), {})


def test_a_model_of_images_and_text_is_refused(tmp_path):
    text = random_model("Gemma3").config.to_dict()
    images = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    images |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = transformers.Gemma3Config(text_config=text, vision_config=images)
    folder = save(transformers.AutoModelForCausalLM.from_config(config), tmp_path / "mine")
    assert "Gemma3ForConditionalGeneration is more than a language model" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "nonesuch"}, "cannot read the config .*nonesuch"),
        ({"model_type": "vit"}, "cannot build it"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
        ({"num_attention_heads": 0}, "cannot|expected at least 1"),
    ],
)
def test_configs_of_other_models_are_refused(tmp_path, changes, says):
    folder = save(random_model("Llama"), tmp_path / "mine")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match=rf"(?s){folder}.*({says})"):
        describe_model(str(folder))


def test_what_is_missing_is_named(tmp_path):
    folder = save(random_model("Llama"), tmp_path / "my-model")
    config = (folder / "config.json").read_text()
    (folder / "config.json").unlink()
    found = refusal(folder)
    assert f"{folder} has no config.json, only " in found and "model.safetensors" in found
    (folder / "config.json").write_text(config)
    found = refusal(tmp_path / "my-modle")
    assert str(tmp_path / "my-modle") in found and "Nearest there: my-model." in found
    assert "owner/name" in found
    found = refusal("my-modle", models_dirs=[str(tmp_path)])
    assert "Nearest there: my-model." in found
    (folder / "tokenizer.json").rename(folder / "t.json")
    assert f"{folder} has no tokenizer, none of tokenizer.json" in refusal(folder)
    (folder / "t.json").rename(folder / "tokenizer.json")
    (folder / "model.safetensors").unlink()
    assert "0 of 1 files of weights: no model.safetensors" in refusal(folder)
    assert "is no .gguf file" in refusal(folder / "config.json")


@pytest.mark.parametrize("form", ["one file", "several files", "pickled"])
@pytest.mark.parametrize("wrong", ["missing", "no head", "unexpected", "mismatched"])
def test_weights_that_do_not_fit_are_refused_in_the_plan_and_before_training(tmp_path, wrong, form):
    folder = save(random_model("Llama"), tmp_path / "mine")
    spec, models_dir = describe_model(str(folder))
    weights = load_file(folder / "model.safetensors")
    name = "lm_head.weight" if wrong == "no head" else "model.layers.1.mlp.down_proj.weight"
    tensor = weights.pop(name)
    if wrong == "unexpected":
        weights |= {name: tensor, "model.layers.1.mlp.more.weight": tensor.clone()}
        name = "model.layers.1.mlp.more.weight"
    if wrong == "mismatched":
        weights[name] = tensor[:-1].clone()
    (folder / "model.safetensors").unlink()
    if form == "pickled":
        torch.save(weights, folder / "pytorch_model.bin")
    elif form == "one file":
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    else:
        names = sorted(weights)
        files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        for file, part in files.items():
            save_file({n: weights[n] for n in part}, folder / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": {n: f for f, part in files.items() for n in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = refusal(folder)
    assert "\n" not in found and name in found
    assert ("missing" if wrong == "no head" else wrong) in found
    unpinned = dataclasses.replace(spec, revision="")  # as a file in conf/model describes it
    with pytest.raises(ModelError, match=name):
        models.load(unpinned, [models_dir])
    with pytest.raises(RowError, match=name):
        row = {"name": "a", "model": str(folder / "config.json"), "task": "sft"}
        shape_of(customer_of(row), {})


def test_a_tied_head_may_be_stored_or_not(tmp_path):
    folder = save(random_model("Llama", tie_word_embeddings=True), tmp_path / "mine")
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # of old versions
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    spec, models_dir = describe_model(str(folder))
    assert spec.tied and models.load(spec, [models_dir])


def test_a_tokenizer_with_code_of_its_own_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "yes")  # the answer to transformers' question
    folder = save(random_model("Llama"), tmp_path / "mine")
    spec, models_dir = describe_model(str(folder))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast): pass\n"
    )
    found = refusal(folder)
    assert "tokenizer fails" in found and "custom code" in found and "\n" not in found
    unpinned = dataclasses.replace(spec, revision="")
    for load in (models.load, models.tokenizer_of):
        with pytest.raises(ValueError, match="custom code"):
            load(unpinned, [models_dir])
    assert not ran.exists()


def test_a_model_whose_training_step_fails_is_refused(tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.BioGptConfig(**shape, num_attention_heads=2, vocab_size=len(qwen_like()))
    folder = save(transformers.AutoModelForCausalLM.from_config(config), tmp_path / "mine")
    found = refusal(folder)
    assert "BioGpt" in found and "a training step fails" in found and "\n" not in found


# ---------------------------------------------------------------- customers


def test_a_customers_folder_has_the_shape_that_its_model_has(saved, family):
    """Of Llamas and Qwen3 the value is as before, and so are ids of runs."""
    model, folder = saved
    row = {"name": "a", "model": str(folder), "task": "sft"}
    spec = shape_of(customer_of(row), {})
    assert spec.n_params == sum(p.numel() for p in model.parameters())
    assert (spec.name, spec.location, spec.revision) == ("mine", str(folder), "")
    models.load(spec, ["models"])
    if family in ("Llama", "Mistral", "Qwen3", "Qwen3Moe"):
        alone = folder.parent / "alone" / "mine"
        alone.mkdir(parents=True)
        shutil.copy(folder / "config.json", alone)
        by_keys = shape_of(customer_of({**row, "model": str(alone)}), {})
        assert dataclasses.replace(by_keys, location=str(folder)).canonical == spec.canonical

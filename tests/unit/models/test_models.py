"""Models described from their own files: every count equals that of transformers' modules, and what is
described loads, trains and is exported. Bases in bf16 have the same bits; attention of short rows; the
mesh: who takes which batches, what its guard refuses, what a process holds whole."""

import copy
import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
from types import SimpleNamespace as Made
from unittest.mock import Mock, patch

import httpx
import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config

from lorasweep.advise.read import RowError, customer_of, shape_of
from lorasweep.data import splits as data
from lorasweep.data.examples import collate, merge
from lorasweep.errors import ModelError, SpecError, TrainingError
from lorasweep.launch.torch_trainer import finetune
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.methods.stacked import save_peft
from lorasweep.models import find
from lorasweep.models import load as models
from lorasweep.models.describe import describe_model, with_shape
from lorasweep.models.forward import SHORT_BYTES, attention, autocast, frozen_in_bf16, hold_in_bf16
from lorasweep.models.load import find_targets, weights_sha256
from lorasweep.models.sharding import Mesh, guard, shard
from lorasweep.plan.needs import Layout, load_of, memory_parts
from lorasweep.spec.model import LAYER_SETS, ROUTER, ModelSpec
from lorasweep.store.checkpoint import PARAM
from lorasweep.sweep.grid import trained_by_set
from lorasweep.train.objectives.nll import nll_sums
from lorasweep.work.inputs import check_available
from tests import small_hub
from tests.customers import make_base, model_of
from tests.small_hub import COMMIT, qwen_like
from tests.training import EPS, OtherLibrary, Trained, customer, family_model, pack_of, run
from tests.unit.plan.test_plan import SMALL
from tests.world import compose_request, tiny_spec, write_splits

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
    "Falcon": {"head_dim": None},  # which computes it
    "GPTJ": {"rotary_dim": 4, "n_inner": 24},
    "Bloom": {},
}
"""Architectures whose forward pass passes the tokens by position, or calls an inner decoder."""
VOCAB = len(qwen_like())


def random_model(family, **changes):
    """A model with random weights and biases; its vocabulary is the tokenizer's."""
    shape = {**{**FAMILIES, **CALLED_OTHERWISE}.get(family, {}), **changes}
    shape |= {"vocab_size": VOCAB, "max_position_embeddings": 128}
    config = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    model = family_model(family, config, **shape)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    return model


def save(model, folder, dtype=torch.float32):
    model.to(dtype).save_pretrained(folder)
    qwen_like().save_pretrained(folder)
    return folder


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The repository org/tiny as it was downloaded, in several files; returns its model, pinned."""
    model = compose_request(["model=smollm2-135m"]).points[0].spec.model
    shape = {"n_layers": 1, "hidden_size": 16, "n_heads": 2, "n_kv_heads": 1, "head_size": 8}
    shape |= {"mlp_size": 32, "vocab_size": VOCAB, "tied": False}
    named = {"name": "tiny", "location": "org/tiny", "revision": COMMIT}
    model = dataclasses.replace(model, **named, **shape)
    small_hub.make(tmp_path, [model], [], shard="10KB")
    small_hub.offline(tmp_path, monkeypatch)
    (tmp_path / "hub/models--org--tiny/refs").mkdir()
    (tmp_path / "hub/models--org--tiny/refs/main").write_text(COMMIT)
    return model


@pytest.fixture
def snapshot(hub, tmp_path):
    return tmp_path / "hub/models--org--tiny/snapshots" / COMMIT


@pytest.fixture
def llama(tmp_path):
    return save(random_model("Llama"), tmp_path / "mine")


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    """A family, its modules, the folder where they are saved, and how that is described."""
    model = random_model(request.param)
    folder = save(model, tmp_path_factory.mktemp(request.param) / "mine")
    spec, models_dir = describe_model(str(folder))
    assert (spec.source, spec.location, models_dir) == ("folder", "mine", str(folder.parent))
    return Made(family=request.param, model=model, folder=folder, spec=spec, at=[models_dir])


def test_every_count_is_that_of_the_modules(made, tmp_path):
    spec, model, family, moe = made.spec, made.model, made.family, made.family == "Qwen3Moe"

    def count(*words):
        named = model.named_parameters()
        return sum(p.numel() for n, p in named if p.dim() > 1 and any(w in n for w in words))

    assert spec.n_params == sum(p.numel() for p in model.parameters())
    by_set = {f["layer_set"]: f["weights"] for f in trained_by_set(FullFT(), spec)}
    router, head = count("mlp.gate."), model.lm_head.weight.numel()
    wanted = {"attention": count("self_attn"), "mlp": count("mlp") - router, "unembedding": head}
    assert by_set.items() >= {**wanted, **({ROUTER: router} if moe else {})}.items()
    of_attention, of_mlp = (2, 2) if family == "Phi3" else (4, 1 if moe else 3)
    assert [spec.modules(s)[1] for s in LAYER_SETS] == [2 * of_attention, 2 * of_mlp, 1]
    idle = count("experts") // 2 if moe else 0  # two of four experts
    assert spec.n_active_params == spec.n_matmul_params - idle
    assert spec.n_matmul_params == count("layers") + head
    assert (spec.n_experts, spec.n_active_experts) == ((4, 2) if moe else (0, 0))
    assert (spec.n_heads, spec.n_kv_heads, spec.context_length) == (2, 1, 128)
    assert (spec.head_size, spec.mlp_size) == (12 if family == "Gemma3" else 8, 12 if moe else 24)
    assert spec.tied == (family == "Gemma3") == model.config.tie_word_embeddings
    # a customer's folder has the same shape; of Llamas and Qwen3 its config alone, as run ids say
    spec = customers(made.folder)
    assert (spec.name, spec.location, spec.revision) == ("mine", str(made.folder), "")
    assert models.load(spec, ["models"]) and spec.n_params == made.spec.n_params
    if family in ("Llama", "Mistral", "Qwen3", "Qwen3Moe"):
        (alone := tmp_path / "mine").mkdir()
        shutil.copy(made.folder / "config.json", alone)
        by_keys = dataclasses.replace(customers(alone), location=str(made.folder))
        assert by_keys.canonical == spec.canonical


def customers(folder):
    return shape_of(customer_of({"name": "a", "model": str(folder), "task": "sft"}), {})


@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-8b", "qwen3-30b-a3b-base"])
def test_files_of_shipped_models_say_what_is_described(name):
    shipped = compose_request([f"model={name}"]).points[0].spec.model
    given = {f: getattr(shipped, f) for f in ("name", "source", "location", "revision")}
    found = with_shape(ModelSpec(**given, weights_dtype="bf16"), models.config_of(shipped))
    assert dataclasses.replace(found, context_length=0) == shipped


LORA = LoRA(rank=2, layers="attention+mlp")


@pytest.mark.parametrize("made", [*FAMILIES, *CALLED_OTHERWISE], indirect=True)
def test_what_is_described_trains_and_peft_computes_what_an_exported_adapter_did(made, tmp_path):
    """Two updates of LoRA and of full fine-tuning. The reference of PEFT is W + scaling B A, added to
    the weights of transformers' model."""
    changes = {"steps": 2, "lr": 0.05, "batch_size": 2, "precision": "fp64", "eps": EPS}
    spec = tiny_spec(model=made.spec, method=LORA, **changes)
    assert find.check_available(made.spec, made.at)
    base = models.load(made.spec, made.at, "fp64")
    _, rows = customer(spec, spec.dataset.name, 12, 8, 4, 2)
    for one in (dataclasses.replace(spec, method=FullFT(), lr=1e-3), spec):
        with OtherLibrary() as arithmetic:
            found = Trained(finetune([one], base, rows))
        assert not arithmetic.narrower or made.family in CALLED_OTHERWISE
        tensors, result = found.states[one.id]["tensors"].items(), found.results[one.id]
        weights = {n.removeprefix(PARAM): t for n, t in tensors if n.startswith(PARAM)}
        assert sum(t.numel() for t in weights.values()) == one.method.n_trainable(made.spec)
        assert result["norm_delta"] > 0 and result["test_nll"] < result["nll_start"] + 0.1
    if made.family == "Qwen3Moe":
        return  # tests/unit/methods/test_lora.py
    save_peft(tmp_path / "adapter", weights, LORA, str(made.folder), None)
    cls = AutoModelForCausalLM
    tokens = torch.randint(VOCAB, (2, 9))
    plain = cls.from_pretrained(made.folder, dtype=torch.float64)
    with torch.no_grad():
        before = plain(input_ids=tokens).logits
        for name in sorted({n[:-2] for n in weights}):
            change = LORA.scaling * weights[f"{name}.B"] @ weights[f"{name}.A"]
            plain.get_submodule(name).weight += change.double()
        want = plain(input_ids=tokens).logits
        loaded = PeftModel.from_pretrained(cls.from_pretrained(made.folder), tmp_path / "adapter")
        got = loaded(input_ids=tokens).logits
    assert (want - before).abs().max() > 1e-2
    assert torch.allclose(got.double(), want, rtol=0, atol=1e-4)


def test_gemma_in_bf16_has_the_same_bits_and_its_norms_are_computed_in_float64(tmp_path):
    """The type of weights is that of the files, whatever the config says."""
    half = save(random_model("Llama"), tmp_path / "b", torch.float16)
    assert describe_model(str(half))[0].weights_dtype == "fp32"
    folder = save(random_model("Gemma3"), tmp_path / "a", torch.bfloat16)
    edit(folder / "config.json", dtype="float32")
    model, at = describe_model(str(folder))
    assert model.weights_dtype == "bf16"
    in_fp32 = dataclasses.replace(model, weights_dtype="fp32")
    wide, narrow = (models.load(m, [at], "bf16").model for m in (in_fp32, model))
    assert {p.dtype for p in narrow.parameters() if p.dim() > 1} == {torch.bfloat16}
    tokens = torch.randint(VOCAB, (2, 9))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(wide(input_ids=tokens).logits, narrow(input_ids=tokens).logits)
    exact = models.load(model, [at], "fp64").model
    norm, x = exact.model.layers[0].input_layernorm, torch.randn(3, 16, dtype=torch.float64)
    norm.weight.data.normal_()
    root = (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    assert torch.allclose(norm(x), x / root * (1 + norm.weight), rtol=1e-12)


def test_a_folder_is_known_by_its_content(llama, tmp_path):
    """Its pin is what sha256sum prints. Another chat template makes other rows, so it is another
    model; notes are no part of it, and a stale index is not read."""
    spec, at = describe_model(str(llama))
    shutil.copytree(llama, tmp_path / "b/mine")
    assert describe_model("mine", [str(tmp_path / "b")]) == (spec, str(tmp_path / "b"))
    (llama / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone"}}')
    files = "config.json model*.safetensors tokenizer.json tokenizer_config.json"
    for more in ("", " chat_template.jinja"):
        (llama / (more.strip() or "notes.txt")).write_text("{{ messages }}")
        command = f"sha256sum {files}{more} | sha256sum"
        found = subprocess.check_output(["bash", "-c", command], cwd=llama, text=True)
        named, there = describe_model(f"{llama}/")
        assert named.revision == f"sha256:{found.split()[0]}"
        assert ((named, there) == (spec, at)) == (not more)
    (llama / "chat_template.jinja").unlink()
    other = save(random_model("Llama", hidden_size=32), tmp_path / "c/mine")
    changed, there = describe_model(str(other))
    assert changed.revision != spec.revision and changed.name != spec.name
    # a folder of exec.models_dir may have another model of this name
    assert models.load(spec, [there, at]).model.config.hidden_size == 16
    for check in (find.check_available, models.load):
        with pytest.raises(ModelError, match=rf"{other} is sha256:.* pins {spec.revision}"):
            check(spec, [there])


def test_a_name_of_the_hub_is_pinned_and_headers_are_enough(hub, snapshot, monkeypatch):
    spec, at = describe_model("org/tiny")
    assert at == "" and dataclasses.replace(spec, name="tiny", context_length=0) == hub
    assert describe_model(f"org/tiny@{COMMIT}")[0] == spec
    loaded = [models.load(m, []) for m in (dataclasses.replace(hub, revision=""), hub)]
    assert {(base.commit, base.sha256) for base in loaded} == {(COMMIT, loaded[0].sha256)}
    for given in ("org/tinny", "org/tiny@v9"):
        with pytest.raises(ModelError, match=rf"no folder or file .*{given}.*hub"):
            describe_model(given)
    edit(snapshot / "config.json", dtype="float32")
    for path in snapshot.glob("*.safetensors"):
        path.unlink()

    def headers(name, revision):
        assert (name, revision) == ("org/tiny", COMMIT)
        tensors = {"a": Made(dtype="BF16", shape=[2, 2]), "norm": Made(dtype="F32", shape=[2])}
        return Made(files_metadata={"model.safetensors": Made(tensors=tensors)})

    assert describe_model("org/tiny")[0].weights_dtype == "fp32"  # offline: as its config says
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", headers)
    assert describe_model("org/tiny")[0] == spec


def refusal(given, *more):
    with pytest.raises(ModelError) as error:
        describe_model(str(given), *more)
    assert "\n" not in str(error.value)
    return str(error.value)


TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 1}
IMAGES = {**TEXT, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}


@pytest.mark.parametrize(
    ("family", "shape", "says"),
    [
        ("GPT2", {"n_embd": 16, "n_head": 2, "n_layer": 2, "vocab_size": 32}, "Conv1D"),
        ("Qwen2Moe", {**TEXT, **EXPERTS}, "beside its experts:.* shared_expert_gate"),
        ("Qwen3Moe", {**TEXT, **EXPERTS, "mlp_only_layers": [0]}, "2 layers differ"),
        ("Gemma3", {"text_config": TEXT, "vision_config": IMAGES}, "more than a language model"),
        ("BioGpt", {**TEXT, "vocab_size": VOCAB}, "a training step fails"),
    ],
)
def test_other_architectures_are_refused_by_name(tmp_path, family, shape, says):
    config = getattr(transformers, f"{family}Config")(**shape)
    folder = save(AutoModelForCausalLM.from_config(config), tmp_path / "mine")
    found = refusal(folder)
    assert str(folder) in found and re.search(rf"\({family}.*{says}", found)
    with pytest.raises(RowError, match=says):
        customers(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "nonesuch"}, "cannot read the config .*nonesuch"),
        ({"model_type": "vit"}, "cannot build it"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
        ({"num_attention_heads": 0}, "cannot|expected at least 1"),
        ({"architectures": 5}, "cannot build it"),
    ],
)
def test_configs_of_other_models_are_refused(llama, changes, says):
    edit(llama / "config.json", **changes)
    with pytest.raises(ModelError, match=rf"(?s){llama}.*({says})"):
        describe_model(str(llama))


def test_what_is_missing_is_named(llama, tmp_path):
    for given in ((tmp_path / "mime",), ("mime", [str(tmp_path)])):
        assert "no folder or file" in (found := refusal(*given)) and str(tmp_path / "mime") in found
    assert "is no .gguf file" in refusal(llama / "config.json")
    for name, says in (
        ("config.json", "has no config.json"),
        ("tokenizer.json", "has no tokenizer, none of tokenizer.json"),
        ("model.safetensors", "0 of 1 files of weights: no model.safetensors"),
    ):
        (llama / name).rename(tmp_path / name)
        assert f"{llama} has " in (found := refusal(llama)) and says in found
        (tmp_path / name).rename(llama / name)


@pytest.mark.parametrize("form", ["one file", "several files"])
@pytest.mark.parametrize("wrong", ["missing", "no head", "unexpected", "mismatched"])
def test_weights_that_do_not_fit_are_refused_in_the_plan_and_before_training(llama, wrong, form):
    weights = load_file(llama / "model.safetensors")
    name = "lm_head.weight" if wrong == "no head" else "model.layers.1.mlp.down_proj.weight"
    tensor = weights.pop(name)
    if wrong == "unexpected":
        weights |= {name: tensor, "model.layers.1.mlp.more.weight": tensor.clone()}
        name = "model.layers.1.mlp.more.weight"
    if wrong == "mismatched":
        weights[name] = tensor[:-1].clone()
    (path := llama / "model.safetensors").unlink()
    if form == "one file":
        save_file(weights, path, {"format": "pt"})
    else:
        files = {n: f"{k % 2}.safetensors" for k, n in enumerate(sorted(weights))}
        for file in set(files.values()):
            part = {n: t for n, t in weights.items() if files[n] == file}
            save_file(part, llama / file, {"format": "pt"})
        index = json.dumps({"metadata": {}, "weight_map": files})
        (llama / "model.safetensors.index.json").write_text(index)
    found = refusal(llama)
    assert name in found and ("missing" if wrong == "no head" else wrong) in found
    with pytest.raises(RowError, match=name):
        customers(llama / "config.json")
    by_file = ModelSpec("a", "folder", "mine")  # as a file in conf/model describes it
    with pytest.raises(ModelError, match=name):
        models.load(by_file, [str(llama.parent)])


@pytest.mark.parametrize("names", ["{", "[]", "null", '{"a": 5}'])
def test_an_index_that_names_no_files_counts_as_none(llama, names):
    (llama / "model.safetensors").rename(llama / "0")
    (index := llama / "model.safetensors.index.json").write_text(f'{{"weight_map": {names}}}')
    assert "0 of 1 files of weights" in refusal(llama)
    index.write_text('{"weight_map": {"a": "0"}}')  # which transformers does not read
    assert "KeyError: 'metadata'" in refusal(llama)


def test_a_tied_head_may_be_stored_or_not(tmp_path):
    folder = save(random_model("Llama", tie_word_embeddings=True), tmp_path / "mine")
    weights = load_file(path := folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # of old versions
    save_file(weights, path, {"format": "pt"})
    spec, at = describe_model(str(folder))
    assert spec.tied and models.load(spec, [at])


def test_a_tokenizer_with_code_of_its_own_is_refused_and_not_run(llama, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "yes")  # the answer to transformers' question
    own = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    edit(llama / "tokenizer_config.json", **own)
    ran = llama / "ran"
    (llama / "own.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast): pass\n"
    )
    found = refusal(llama)
    assert "tokenizer fails" in found and "custom code" in found
    for load in (models.load, models.tokenizer_of):
        with pytest.raises(ValueError, match="custom code"):
            load(ModelSpec("a", "folder", "mine"), [str(llama.parent)])
    assert not ran.exists()


@pytest.mark.parametrize(
    ("kept", "words"),
    [(-1, r"00002-of-\d+.safetensors.* header"), (20, "20 bytes"), (0, "no model-00002-of")],
    ids=["cut short", "cut in its header", "removed"],
)
@pytest.mark.parametrize("source", ["hub", "folder"])
def test_weights_that_were_half_downloaded_are_named(hub, snapshot, source, kept, words):
    path = sorted(snapshot.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:kept]) if kept else path.unlink()
    model = dataclasses.replace(hub, source=source, revision="")
    if source == "folder":
        model = dataclasses.replace(model, location=f"models--org--tiny/snapshots/{COMMIT}")
    remedy = {"folder": "Copy the files again", "hub": "hf download org/tiny|action=fetch"}
    with pytest.raises(ModelError, match=rf"(?s){words}.*({remedy[source]})"):
        find.check_available(model, [str(snapshot.parents[2])])


def test_a_node_that_downloads_needs_no_weights_yet_but_a_job_does(hub, snapshot, monkeypatch):
    for path in snapshot.glob("*.safetensors"):
        path.unlink()
    for offline, needed in ((True, False), (False, True)):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(ModelError, match=r"no model-00001-of.*action=fetch"):
            find.check_available(hub, [], fetched=needed)
    assert find.check_available(hub, [])


@pytest.mark.parametrize("kind", ["GatedRepoError", "RevisionNotFoundError", ""])
def test_an_inaccessible_model_is_refused_with_what_to_do(hub, monkeypatch, kind):
    response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))
    error = ConnectionError("cannot reach the hub")
    if kind:
        error = getattr(huggingface_hub.errors, kind)("no", response=response)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", Mock(side_effect=error))
    with pytest.raises(ModelError, match=f"model 'tiny'.*{kind}.*co/org/tiny .*action=fetch"):
        find.check_available(dataclasses.replace(hub, revision=""), [])


def test_a_base_without_a_tokenizer_is_refused_for_text_only(hub, snapshot, tmp_path):
    def asked(*overrides):
        request = compose_request(overrides)
        (point,) = request.points
        point = dataclasses.replace(point, spec=dataclasses.replace(point.spec, model=hub))
        return dataclasses.replace(request, points=[point])

    write_splits(tmp_path / "gsm8k", [{"question": "So?", "answer": "Yes"}])
    rows = ("dataset=gsm8k", "dataset.revision=''", f"exec.data_dir=[{tmp_path}]")
    check_available(asked(*rows))
    for path in snapshot.glob("tokenizer*"):
        path.unlink()
    check_available(asked("dataset=dialect"))
    recipe = compose_request([*rows, "model=tiny64"])
    for name, request in (("tiny", asked(*rows)), ("tiny64", recipe)):
        with pytest.raises(SpecError, match=f"model '{name}' has no tokenizer"):
            check_available(request)


def test_the_measured_weights_become_a_folder_with_the_bases_tokenizer(tmp_path):
    base = make_base(tmp_path / "base")
    spec, dirs = model_of(base), [str(tmp_path)]
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    # changes far below a step of bf16, in which the base was published
    weights = {n: p.detach() * (1 + 1e-5) for n, p in before.named_parameters()}
    models.save_trained(spec, dirs, weights, tmp_path / "out")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert after.dtype == torch.float32
    assert all(torch.equal(p, weights[name]) for name, p in after.named_parameters())
    theirs, ours = (AutoTokenizer.from_pretrained(at) for at in (base, tmp_path / "out"))
    assert ours("Yes, 7").input_ids == theirs("Yes, 7").input_ids
    with pytest.raises(ModelError, match=r"has no parameters lm_head\.bias"):
        models.save_trained(spec, dirs, {"lm_head.bias": torch.zeros(1)}, tmp_path / "wrong")


@pytest.fixture(scope="module")
def world():
    """The shipped base, whose weights are bf16 numbers, held in fp32 and in bf16."""
    spec = tiny_spec(precision="bf16", method=LoRA(rank=4), lr=5e-3, steps=3)
    shapes = (dataclasses.replace(spec.model, weights_dtype=t) for t in ("fp32", "bf16"))
    wide, narrow = (models.load(shape, [], "bf16") for shape in shapes)
    return spec, wide, narrow, data.load(spec.dataset, [])


def of_family(family, tied):
    wide = family_model(family, tie_word_embeddings=tied)
    for p in wide.parameters():
        p.data = p.data.bfloat16().float()
    narrow = copy.deepcopy(wide)
    hold_in_bf16(narrow)
    return wide, narrow


def test_matrices_are_bf16_and_the_base_is_the_same(world):
    spec, wide, narrow, _ = world
    norms = {n: p for n, p in narrow.model.named_parameters() if "norm" in n}
    types = {n: p.dtype for n, p in narrow.model.named_parameters()}
    assert all(t == (torch.float32 if n in norms else torch.bfloat16) for n, t in types.items())
    n_norms = sum(p.numel() for p in norms.values())
    held = sum(p.nbytes for p in narrow.model.parameters())
    assert held == 2 * (spec.model.n_params - n_norms) + 4 * n_norms
    assert wide.sha256 == narrow.sha256 == weights_sha256(narrow.model)
    in_fp32 = models.load(dataclasses.replace(spec.model, weights_dtype="bf16"), [], "fp32")
    assert {p.dtype for p in in_fp32.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_logits_loss_and_gradients_have_the_same_bits(world, family, tied):
    batch = merge([collate(world[3].train(k, 0, 3)) for k in range(2)])
    found = []
    for model in of_family(family, tied):
        with torch.no_grad(), autocast("bf16", torch.device("cpu")):
            logits = model(input_ids=torch.from_numpy(batch.tokens_NRT).flatten(0, 1)).logits
        params = pack_of([LoRA(rank=2), LoRA(rank=3)], model, perturb=0.1).parameters()
        assert {p.dtype for p in params.values()} == {torch.float32}
        sums = nll_sums(model, batch, "bf16")
        sums.sum().backward()
        found.append([logits, sums.detach(), *(p.grad for p in params.values())])
    assert len(found[0]) > 20 and all(map(torch.equal, *found))
    assert all(float(g.abs().max()) > 0 for g in found[1])
    with frozen_in_bf16(model := of_family(family, tied)[0].requires_grad_(False), "bf16"):
        held = model.lm_head, model.model.layers[0].mlp.up_proj, model.model.norm
        assert [m.weight.dtype.itemsize for m in held] == [2, 2, 4]


@pytest.mark.parametrize(
    "method", [LoRA(rank=4), FullFT(), FullFT(scope="matrices", layers="mlp")], ids=lambda m: m.name
)
def test_whole_runs_have_the_same_bits(world, method):
    """Full fine-tuning has fp32 masters of the trained matrices only, and restores the base."""
    spec, wide, narrow, rows = world
    spec = dataclasses.replace(spec, method=method, lr=1e-3)
    (a, records_a), (b, records_b) = (run([spec], base, rows) for base in (wide, narrow))
    for name, tensor in a[spec.id]["tensors"].items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, b[spec.id]["tensors"][name]), name
    for one, other in zip(records_a[spec.id], records_b[spec.id]):
        assert all(one[k] == other[k] for k in ("train_nll", "grad_norm"))
    last = [r[spec.id][-1]["test_nll"] for r in (records_a, records_b)]
    assert last[0] == last[1] != records_a[spec.id][0]["test_nll"]
    assert {b.sha256 for b in (wide, narrow)} == {weights_sha256(b.model) for b in (wide, narrow)}
    trainables = pack_of([method], narrow.model, spec.model)
    types = {n: p.dtype for n, p in narrow.model.named_parameters() if "norm" not in n}
    trained = trainables.parameters().keys()
    trainables.detach()
    wanted = {n: torch.float32 if n in trained else torch.bfloat16 for n in types}
    assert types == wanted or method.name == "lora"  # its adapters are no part of the base


def test_weights_that_are_finer_than_described_are_refused(world):
    spec = world[0]
    model = models.load(spec.model, [], "fp32").model
    described = dataclasses.replace(spec.model, weights_dtype="bf16")
    models.check_shape(model, described)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1 + 1e-4
    models.check_shape(model, spec.model)
    with pytest.raises(ModelError, match=r"weights_dtype is fp32 \(lm_head\.weight\)"):
        models.check_shape(model, described)


def test_a_module_that_does_more_with_its_weight_keeps_it():
    class Scaled(torch.nn.Embedding):
        def forward(self, x):
            return super().forward(x) * torch.tensor(3.3).to(self.weight.dtype)

    head, own = torch.nn.Linear(2, 4), torch.nn.Linear(2, 2)
    model = torch.nn.ModuleDict({"e": Scaled(4, 2), "head": head, "own": own})
    head.weight = model["e"].weight
    hold_in_bf16(model)
    assert head.weight.dtype == torch.float32
    assert (own.weight.dtype, own.bias.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("tokens", [48, 1 + SHORT_BYTES // 8])
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_and_gradients_are_torchs(tokens, masked):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, tokens, 16).double().requires_grad_() for n in (6, 2, 2))
    some = torch.rand(2, 1, tokens, tokens).lt(0.5) | torch.eye(tokens).bool()
    mask, module = some if masked else None, Mock(num_key_value_groups=3, is_causal=True)
    want = sdpa(q, k, v, mask, is_causal=mask is None, scale=0.3, enable_gqa=True).transpose(1, 2)
    outputs = attention(module, q, k, v, mask, scaling=0.3)[0], want
    found = [[out, *torch.autograd.grad(out.square().sum(), (q, k, v))] for out in outputs]
    torch.testing.assert_close(*found)
    with patch("transformers.integrations.sdpa_attention.sdpa_attention_forward") as left:
        attention(module, q, k, v, mask, scaling=0.3, softcap=20.0)
    assert left.call_args.kwargs == {"scaling": 0.3, "softcap": 20.0}  # it cannot compute these


def test_a_softcap_of_scores_is_not_dropped():
    """On transformers 5.8 Gemma 2 takes torch's attention, which has none."""
    spec = tiny_spec().model
    for softcap, kinds in ((20.0, {"eager"}), (None, {"eager", "short_rows"})):
        config = Gemma2Config(**TEXT, head_dim=8, attn_logit_softcapping=softcap)
        assert models.without_weights(config, spec, "fp32").config._attn_implementation in kinds


class Three(Mesh):
    size = 3

    def gather(self, value):
        return [value, value, self.other(value)]


def test_every_batch_is_taken_once_and_all_take_as_many_turns():
    mine = [list(Three(rank).turns(7)) for rank in range(3)]
    assert mine == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]  # 7 and 8 are repetitions
    assert [Three(rank).share("abcdef") for rank in range(3)] == [[*"ad"], [*"be"], [*"cf"]]
    assert list(Mesh().turns(3)) == [0, 1, 2] and Mesh().share("abc") == [*"abc"]


def test_the_guard_refuses_a_trained_tensor_that_is_not_split_and_processes_that_differ():
    """The first is what happens to adapters that are attached to a model already split: its loss is
    right, and the gradients are those of one process."""
    model, mesh = torch.nn.Linear(2, 2), Three(devices=object())
    none, trained = (Made(parameters=lambda p=p: p) for p in ({}, {"adapter": torch.zeros(2)}))
    with pytest.raises(TrainingError, match="adapter is trained, but each"):
        guard(model, trained, mesh, [])
    mesh.__class__.other = staticmethod(lambda value: (value[0], [1.5]))
    with pytest.raises(TrainingError, match="differ in losses or gradients"):
        guard(model, none, mesh, [1.0])
    mesh.__class__.other = staticmethod(lambda value: ({**value[0], "bias": (0.0, 1.0)}, value[1]))
    with pytest.raises(TrainingError, match="differ in bias"):
        guard(model, none, mesh, [1.0])
    mesh.__class__.other = staticmethod(lambda value: value)
    guard(model, none, mesh, [1.0, float("nan")])


METHODS = {"full": FullFT(), "adapters": LoRA(rank=2, layers="attention+mlp")}
OUTER = dataclasses.replace(SMALL, hidden_size=64, mlp_size=128, vocab_size=4096)


def measure(rank, port, folder):
    """In one of two processes: write the bytes of whole weights and gradients, by method and part."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    joined, found = Mesh.join(), {}
    for name, method in METHODS.items():
        bytes_of = found[name] = {k: [] for k in ("outer", "outer grads", "layer", "layer grads")}
        model = models.empty_model(OUTER).eval()
        hold_in_bf16(model)
        targets = find_targets(model, OUTER, method.target_layers())
        mesh = shard(model, method.attach(model, targets, [method], [0]), joined, "bf16")

        def note(part, weights, bytes_of=bytes_of):
            for w in weights:
                bytes_of[part].append(w.nbytes)
                if w.requires_grad:
                    count = bytes_of[f"{part} grads"].append
                    w.register_hook(lambda g, count=count: count(g.nbytes))

        def loss(model, tokens, note=note):
            inside = {id(p) for p in model.model.layers.parameters()}
            note("outer", [p for p in model.parameters() if id(p) not in inside])
            first = model.model.layers[0]
            hook = first.register_forward_pre_hook(lambda b, _: note("layer", b.parameters()))
            with autocast("bf16", tokens.device):
                total = model(input_ids=tokens, use_cache=False).logits.float().sum()
            hook.remove()
            return total

        mesh.run(loss, model, torch.zeros(1, 8, dtype=torch.int64)).backward()
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.mark.full
@pytest.mark.slow
def test_the_plan_counts_what_a_process_of_several_holds_whole(tmp_path):
    """A layer arrives in bf16, a trained embedding or unembedding in fp32, as its gradient."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(measure, (str(port), tmp_path), nprocs=2)
    found = json.loads((tmp_path / "found.json").read_text())
    found = {m: {part: sum(counts) for part, counts in of.items()} for m, of in found.items()}
    n_outer = 2 * 4096 * 64
    for name, per_weight in (("full", [4, 4]), ("adapters", [2, 0])):
        outer = [found[name][part] / n_outer for part in ("outer", "outer grads")]
        assert outer == pytest.approx(per_weight, rel=0.01)
    for name, method in METHODS.items():
        held = found[name]
        # of no tokens, so that gradients have no room where activations were
        planned = memory_parts(load_of(OUTER, method), Layout(2, 1, False), 0)
        # two layers at a time, and of one of them gradients in bf16 that are reduced in fp32
        reduced = 2 * held["layer grads"]
        whole = held["outer"] + held["outer grads"] + 2 * held["layer"] + held["layer grads"]
        assert planned["copies and buffers"] == pytest.approx(whole + reduced, rel=0.01)

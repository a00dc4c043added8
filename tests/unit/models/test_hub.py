"""Weights of the hub, from a cache as `huggingface_hub` lays it out, and what can be wrong with them."""

import dataclasses
import json

import pytest

from lorasweep.cli.actions import act
from lorasweep.config.preflight import check_available
from lorasweep.errors import ModelError, SpecError
from lorasweep.models import find
from lorasweep.models.find import weight_files
from lorasweep.models.load import load
from tests import small_hub
from tests.bpe import qwen_like
from tests.world import compose_request, write_splits

COMMIT = "0123456789abcdef" * 2 + "01234567"
SHAPE = {
    **{"n_layers": 1, "hidden_size": 16, "n_heads": 2, "n_kv_heads": 1, "head_size": 8},
    **{"mlp_size": 32, "vocab_size": len(qwen_like())},
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The repository org/tiny as it was downloaded, in several files; returns its model, pinned."""
    from huggingface_hub import constants

    model = compose_request(["model=smollm2-135m"]).points[0].spec.model
    named = {"name": "tiny", "location": "org/tiny", "revision": COMMIT}
    model = dataclasses.replace(model, tied=False, **named, **SHAPE)
    cache = small_hub.make(tmp_path, [model], [], shard="10KB")["HF_HUB_CACHE"]
    refs = tmp_path / "hub/models--org--tiny/refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    return model


@pytest.fixture
def snapshot(hub, tmp_path):
    return tmp_path / "hub/models--org--tiny/snapshots" / COMMIT


def test_the_commit_that_a_name_stood_for_is_known(hub):
    unpinned = load(dataclasses.replace(hub, revision=""), [])
    pinned = load(hub, [])
    assert unpinned.commit == pinned.commit == COMMIT
    assert unpinned.sha256 == pinned.sha256 and unpinned.tokenizer is not None
    assert find.check_available(hub, [])


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (-1, r"incomplete file of weights: .*00002-of-\d+.safetensors has .* its header says"),
        (20, "has 20 bytes, and no readable header"),
        (0, r"has \d of \d files of weights: no model-00002-of"),
    ],
    ids=["cut short", "cut in its header", "removed"],
)
@pytest.mark.parametrize("source", ["hub", "folder"])
def test_weights_that_were_half_downloaded_are_named(hub, snapshot, source, kept, words):
    index = json.loads((snapshot / "model.safetensors.index.json").read_text())["weight_map"]
    path = snapshot / sorted(set(index.values()))[1]
    path.write_bytes(path.read_bytes()[:kept]) if kept else path.unlink()
    model = dataclasses.replace(hub, source=source, revision="")
    if source == "folder":
        model = dataclasses.replace(model, location=f"models--org--tiny/snapshots/{COMMIT}")
    remedy = {"folder": "Copy the files again", "hub": "hf download org/tiny|action=fetch"}
    with pytest.raises(ModelError, match=rf"(?s)model 'tiny': .*{words}.*({remedy[source]})"):
        find.check_available(model, [str(snapshot.parents[2])])


def test_a_node_that_downloads_needs_no_weights_yet_but_a_job_does(hub, snapshot, monkeypatch):
    from huggingface_hub import constants

    for path in snapshot.glob("*.safetensors"):
        path.unlink()
    missing = r"files of weights: no model-00001-of.*action=fetch"
    with pytest.raises(ModelError, match=missing):
        find.check_available(hub, [])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert find.check_available(hub, [])
    with pytest.raises(ModelError, match=missing):
        find.check_available(hub, [], fetched=True)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("GatedRepoError", "is gated: accept the terms at .*co/org/tiny,.*hf auth login"),
        ("RepositoryNotFoundError", "does not exist, or is private"),
        ("RevisionNotFoundError", "Set revision"),
        ("RemoteEntryNotFoundError", "no config.json"),
        ("network", "not in the cache.*action=fetch"),
    ],
)
def test_an_inaccessible_model_is_refused_with_what_to_do(hub, monkeypatch, kind, words):
    import httpx
    import huggingface_hub

    response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))

    def refused(*_, **__):
        if kind == "network":
            raise ConnectionError("cannot reach the hub")
        raise getattr(huggingface_hub.errors, kind)("no", response=response)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refused)
    with pytest.raises(ModelError, match=f"model 'tiny'.*{words}"):
        find.check_available(dataclasses.replace(hub, revision=""), [])


def with_model(request, model):
    specs = [dataclasses.replace(p.spec, model=model) for p in request.points]
    points = [dataclasses.replace(p, spec=s) for p, s in zip(request.points, specs)]
    return dataclasses.replace(request, points=points)


def test_a_base_without_a_tokenizer_is_refused_for_text_only(hub, snapshot, tmp_path):
    write_splits(tmp_path / "gsm8k", [{"question": "So?", "answer": "Yes"}])
    rows = ("dataset=gsm8k", "dataset.revision=''", f"exec.data_dir=[{tmp_path}]")
    text = with_model(compose_request(rows), hub)
    check_available(text)
    for path in snapshot.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(SpecError, match="'gsm8k' is text, and model 'tiny' has no tokenizer"):
        check_available(text)
    check_available(with_model(compose_request(["dataset=dialect"]), hub))
    with pytest.raises(SpecError, match="model 'tiny64' has no tokenizer"):
        check_available(compose_request([*rows, "model=tiny64"]))


def test_fetching_what_is_there_says_where_it_is(hub, snapshot, capsys):
    request = with_model(compose_request(["action=fetch"]), hub)
    assert act(request) == 0
    assert f"model tiny: 0.0 GB in {snapshot}" in capsys.readouterr().out
    assert act(compose_request(["action=fetch"])) == 0
    assert "nothing of these runs comes from the hub" in capsys.readouterr().out


def test_a_single_file_beside_an_index_is_the_one_that_is_loaded_and_pinned(tmp_path):
    """As transformers reads it; the files that a stale index names may be gone."""
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "one", "b": "two"}}'
    )
    assert weight_files(tmp_path) == ["one", "two"]
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert weight_files(tmp_path) == ["model.safetensors"]

"""Data sets of the hub, from a cache as `datasets` lays it out: the commit that was found is known."""

import dataclasses
import json
import shutil

import pytest

from lorasweep.data import load as data
from lorasweep.errors import DataError
from lorasweep.spec.dataset import DatasetSpec
from tests import small_hub
from tests.bpe import qwen_like
from tests.world import compose_request

OLD, NEW = "0123456789abcdef" * 2 + "01234567", "fedcba9876543210" * 2 + "fedcba98"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`hub(commit, answer)` leaves a download of openai/gsm8k; nothing reaches the network."""
    import datasets
    from huggingface_hub import constants

    cache = tmp_path / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()

    def download(commit, answer):
        folder = cache / "openai___gsm8k" / "main"
        shutil.rmtree(folder, ignore_errors=True)
        rows = [json.dumps({"question": f"So? {i}", "answer": answer}) + "\n" for i in range(9)]
        files = {}
        for split in ("train", "test"):
            path = tmp_path / f"{split}-{commit}.jsonl"
            path.write_text("".join(rows))
            files[split] = str(path)
        made = datasets.load_dataset_builder("json", data_files=files, cache_dir=str(tmp_path))
        made.download_and_prepare()
        shutil.copytree(made.cache_dir, folder / "0.0.0" / commit)
        for path in (folder / "0.0.0" / commit).glob("json-*"):
            path.rename(path.with_name(path.name.replace("json-", "gsm8k-")))
        info = folder / "0.0.0" / commit / "dataset_info.json"
        info.write_text(json.dumps({**json.loads(info.read_text()), "config_name": "main"}))

    return download


def load(cache, **changes):
    spec = compose_request(["dataset=gsm8k_hub"]).points[0].spec.dataset
    given = dataclasses.replace(spec, **{"n_test": 4, "n_test_curve": 4, **changes})
    return data.load(given, [], qwen_like(), str(cache))


def test_an_unpinned_name_is_what_its_commit_is(hub, tmp_path):
    """A newer commit brings other rows: kept tokens of the older one are not taken for them."""
    hub(OLD, "Yes")
    old = load(tmp_path / "kept", revision="")
    hub(NEW, "No")
    new, pinned = load(tmp_path / "kept", revision=""), load(tmp_path / "kept", revision=NEW)
    assert (old.commit, new.commit, pinned.commit) == (OLD, NEW, NEW)
    assert old.sha256 != new.sha256 == pinned.sha256
    assert len(list((tmp_path / "kept").glob("*.rows"))) == 4


def test_a_pinned_commit_that_is_not_there_is_never_replaced_by_another(hub, tmp_path):
    hub(NEW, "No")
    with pytest.raises(DataError, match=f"is pinned to {OLD}.*holds {NEW}"):
        load(tmp_path / "kept", revision=OLD)


def test_kept_tokens_of_training_rows_are_never_served_as_held_out_rows(tmp_path, monkeypatch):
    """A holdout of one split, of which as many rows are trained on as are held out: each row says a
    number of its own, so a shared row would be seen."""
    import datasets

    spec = DatasetSpec(
        name="any",
        source="hub",
        location="allenai/tulu-3-sft-mixture",
        revision=OLD,
        train_split="train",
        test_split="train",
        format="messages",
        n_train=10,
        n_validation=4,
        n_test=6,
        n_test_curve=0,
        holdout=10,
    )
    small_hub.make(tmp_path, [], [spec])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def rows(cache):
        loaded = data.load(spec, [], qwen_like(), cache)
        parts = (loaded.train(0, 0, 10), [*loaded.validation, *loaded.test])
        return [[tuple(e.tokens) for e in part] for part in parts]

    train, held_out = rows("")
    assert len(set(train)) == len(set(held_out)) == 10 and not set(train) & set(held_out)
    assert rows(str(tmp_path / "kept")) == [train, held_out]  # made
    assert rows(str(tmp_path / "kept")) == [train, held_out]  # and mapped

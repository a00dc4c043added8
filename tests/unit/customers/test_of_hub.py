"""Customers whose rows are data sets of the hub, from a cache as machines without a network have."""

import pytest

from lorasweep.customers.rows import Rules, rows_of, with_lengths
from lorasweep.data import load
from lorasweep.errors import DataError
from lorasweep.spec.dataset import DatasetSpec
from tests import small_hub
from tests.bpe import llama_like

COMMIT = "0123456789abcdef" * 2 + "01234567"
SCHOOL, TULU = "openai/gsm8k", "allenai/tulu-3-sft-mixture"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    given = {"source": "hub", "revision": COMMIT}
    named = [
        DatasetSpec(name="a", location=SCHOOL, config="main", **given),
        DatasetSpec(name="b", location=TULU, **given),
    ]
    small_hub.make(folder, [], named)
    return folder / "datasets"


@pytest.fixture(autouse=True)
def offline(cache, monkeypatch, tmp_path):
    import datasets
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def read(data):
    return rows_of("any", data, Rules(), llama_like())


def test_rows_of_the_hub_are_pinned_divided_and_loaded_as_those_of_sweeps():
    found, _ = with_lengths(read(f"{SCHOOL}:main"), llama_like(), None, [])
    spec = found.dataset
    where = (spec.source, spec.location, spec.config, spec.revision)
    assert where == ("hub", SCHOOL, "main", COMMIT)
    assert (spec.prompt_field, spec.completion_field) == ("question", "answer")
    assert (found.n_train, spec.n_validation, spec.n_test) == (4, 10, 10)  # 20 of 24 are in both
    data = load.load(spec, [], llama_like())
    assert (data.n_train, len(data.validation), len(data.test)) == (4, 10, 10)
    assert data.commit == COMMIT
    found = read(f"{TULU}@{COMMIT}")
    spec = found.dataset
    assert (spec.format, spec.mask, spec.test_split) == ("messages", "last_assistant", "train")
    assert (found.n_train, spec.n_validation, spec.holdout) == (880, 110, 220)


@pytest.mark.parametrize(
    "data, says",
    [
        ("openai/gsm9k", "no file or folder .*openai/gsm9k, and as a data set of the hub"),
        (f"{SCHOOL}:socratic", "cannot load 'openai/gsm8k'"),
        (f"{TULU}@{COMMIT[::-1]}", "is pinned to .* but the hub cannot be reached"),
    ],
)
def test_data_missing_on_the_hub_are_named(data, says):
    with pytest.raises(DataError, match=says):
        read(data)

"""Data sets of the hub, from a cache as `datasets` lays it out: the commit that was found is known."""

import shutil

import pytest

from lorasweep.data import load as data
from lorasweep.errors import DataError
from tests import small_hub
from tests.bpe import qwen_like
from tests.unit.data.shipped import shipped

OLD, NEW = "0123456789abcdef" * 2 + "01234567", "fedcba9876543210" * 2 + "fedcba98"


@pytest.fixture
def gsm8k(tmp_path, offline):
    """`gsm8k(commit, answer)` leaves a download of openai/gsm8k."""

    def download(commit, answer):
        shutil.rmtree(offline / "openai___gsm8k", ignore_errors=True)
        rows = [{"question": f"So? {i}", "answer": answer} for i in range(9)]
        splits = {"train": rows, "test": rows}
        small_hub.download(tmp_path, "openai/gsm8k", "main", commit, splits)

    return download


def load(cache, **changes):
    given = shipped("gsm8k_hub", n_test=4, n_test_curve=4, **changes)
    return data.load(given, [], qwen_like(), str(cache))


def test_an_unpinned_name_is_what_its_commit_is(gsm8k, tmp_path):
    """A newer commit brings other rows: kept tokens of the older one are not taken for them."""
    gsm8k(OLD, "Yes")
    old = load(tmp_path / "kept", revision="")
    gsm8k(NEW, "No")
    new, pinned = load(tmp_path / "kept", revision=""), load(tmp_path / "kept", revision=NEW)
    assert (old.commit, new.commit, pinned.commit) == (OLD, NEW, NEW)
    assert old.sha256 != new.sha256 == pinned.sha256
    assert len(list((tmp_path / "kept").glob("*.rows"))) == 4


def test_a_pinned_commit_that_is_not_there_is_never_replaced_by_another(gsm8k, tmp_path):
    gsm8k(NEW, "No")
    with pytest.raises(DataError, match=f"is pinned to {OLD}.*holds {NEW}"):
        load(tmp_path / "kept", revision=OLD)


def test_kept_tokens_of_training_rows_are_never_served_as_held_out_rows(tmp_path, offline):
    """A holdout of one split, of which as many rows are trained on as are held out: each row says a
    number of its own, so a shared row would be seen."""
    counts = {"n_train": 10, "n_validation": 4, "n_test": 6, "n_test_curve": 0, "holdout": 10}
    spec = shipped("tulu3", revision=OLD, **counts)
    small_hub.make(tmp_path, [], [spec])

    def rows(cache):
        loaded = data.load(spec, [], qwen_like(), cache)
        parts = (loaded.train(0, 0, 10), [*loaded.validation, *loaded.test])
        return [[tuple(e.tokens) for e in part] for part in parts]

    train, held_out = rows("")
    assert len(set(train)) == len(set(held_out)) == 10 and not set(train) & set(held_out)
    assert rows(str(tmp_path / "kept")) == [train, held_out]  # made
    assert rows(str(tmp_path / "kept")) == [train, held_out]  # and mapped

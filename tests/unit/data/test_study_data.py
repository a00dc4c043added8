"""Data sets of the hub, on folders with a few rows that `datasets` reads as repositories."""

import dataclasses
import shutil
from collections import Counter
from unittest.mock import Mock

import pytest

from lorasweep.data import load as data
from lorasweep.errors import DataError
from tests import small_hub
from tests.bpe import llama_like, qwen_like
from tests.small_hub import problem, thought, tulu
from tests.unit.data.conftest import shipped


def spec_of(name, location, **changes):
    """A shipped data set, but with the rows of a folder."""
    return shipped(name, location=location, **{"n_test_curve": 1, "revision": "", **changes})


def load(spec, tokenizer=None):
    data.check_available(spec, [])
    return data.load(spec, [], tokenizer or qwen_like())


def shown(example, tokenizer=None):
    decode = (tokenizer or qwen_like()).decode
    return decode(example.tokens), decode(example.tokens[example.loss])


def list_of(loaded, count=None):
    """Training rows in the order of the split, as the loader hands them to the shuffle."""
    rows = loaded.train.__closure__
    kept = next(c.cell_contents for c in rows if hasattr(c.cell_contents, "ends"))
    return list(kept)[:count]


def test_tulu_3_is_shuffled_the_first_rows_are_held_out_and_the_last_answer_is_trained(hub):
    import datasets

    rows = [tulu(k) for k in range(20)]
    spec = spec_of("tulu3", hub("tulu", {"default": {"train": rows}}), n_test=4, holdout=4)
    loaded = load(spec)
    order = datasets.Dataset.from_list(rows).shuffle(seed=0)["id"]
    parts = loaded.test, loaded.train(0, 0, 16)
    seen = [[shown(e)[1].split()[1] for e in part] for part in parts]
    assert seen[0] == order[:4] and sorted(seen[1]) == sorted(order[4:])
    text, trained = shown(loaded.test[0])
    assert trained == f" Yes {order[0]}\n\nUser:" and text.startswith(f"User: So? {order[0]}\n\n")
    llama = load(spec, llama_like()).test[0]
    assert shown(llama, llama_like())[0].startswith("<|begin_of_text|>User: So?")


def test_openthoughts_3_trains_no_question_that_is_held_out(hub):
    rows = [thought(question, k) for question in range(6) for k in range(16)]
    path = hub("thoughts", {"default": {"train": rows}})
    spec = spec_of("openthoughts3", path, n_test=3, holdout=3, n_train=None)
    loaded = load(spec)
    asked = [Counter(shown(e)[0].split("?")[0] for e in p) for p in (loaded.test, list_of(loaded))]
    assert asked[0].total() == 3 and not set(asked[0]) & set(asked[1])
    assert set(asked[1].values()) == {16} and len(asked[0]) + len(asked[1]) == 6
    assert shown(loaded.test[0])[1].startswith(" <think>So ")
    with_them = load(dataclasses.replace(spec, unseen_prompts=False))
    assert with_them.n_train == 93 > loaded.n_train
    first = load(dataclasses.replace(spec, n_train=10))
    assert [shown(e) for e in list_of(first)] == [shown(e) for e in list_of(loaded, 10)]


def test_math_trains_both_splits_of_all_subjects_without_the_held_out_problems(hub):
    content = {
        kind: {s: [problem(f"{k}{i}{s[1]}") for i in range(4)] for s in ("train", "test")}
        for k, kind in enumerate(shipped("math").config.split("+"))
    }
    held_out = [content["algebra"]["test"][1], content["geometry"]["train"][2]]
    where = hub("math500", {"default": {"test": held_out}})
    here = {"test_location": where, "test_revision": "", "n_test": 2}
    loaded = load(spec_of("math", hub("math", content), **here))
    asked = [{shown(e)[0].split("How many")[2] for e in p} for p in (loaded.test, list_of(loaded))]
    assert loaded.n_train == len(asked[1]) == 7 * 2 * 4 - 2 and not asked[0] & asked[1]
    text, trained = shown(loaded.test[0])
    ask = "How many 01e? Write the final answer in \\boxed{}."
    assert text.endswith(f"User: {ask}\n\nAssistant:{trained}")
    assert trained.endswith("\\boxed{\\frac{01e}{7}}$\n\nUser:")


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer_field": "gold"}, r"\[train\] has no column gold. Found: question, answer"),
        ({"train_split": "train+more"}, "no split more. Found: train, test"),
        ({"holdout": 3, "n_test": 3}, r"has 3 rows, expected more than 3 \(holdout\)"),
        ({"config": "socratic"}, "'socratic' not found. Available: .*main"),
        ({"test_split": "empty"}, r"gsm8k\[empty\] has no rows"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(hub, described, change, words):
    """A data set with a card is refused before anything starts, one without it before training."""
    rows = [{"question": "So?", "answer": f"Yes {k}"} for k in range(3)]
    path = hub("gsm8k", {"main": {"train": rows, "test": rows, "empty": []}}, described)
    spec = spec_of("gsm8k_boxed", path, **{"n_test": 1, **change})
    with pytest.raises(DataError, match=words):
        data.check_available(spec, []) if described else load(spec)


def test_a_column_that_changes_what_is_learned_is_refused_beside_two_columns(hub):
    """In the form role_eos, which needs no messages."""
    for column, value in (("system", "Be brief."), ("label", False)):
        rows = [{"question": "So?", "answer": "Yes", column: v} for v in (value, None)]
        spec = spec_of("gsm8k_hub", hub(column, {"main": {"train": rows, "test": rows}}), n_test=1)
        assert (spec.format, spec.render) == ("prompt_completion", "role_eos")
        with pytest.raises(DataError, match=rf"\[train\] row 0: column '{column}' is {value!r}"):
            load(spec)


def test_a_data_set_that_cannot_be_had_is_refused_with_what_to_do(monkeypatch):
    import datasets

    gated = datasets.exceptions.DatasetNotFoundError("Dataset 'x' is a gated dataset on the Hub.")
    for error, words in (
        (gated, "accept the terms at https.*datasets/x/y.*hf auth"),
        (ConnectionError("Couldn't reach 'x' on the Hub"), "Couldn't reach.*action=fetch"),
    ):
        monkeypatch.setattr(datasets, "load_dataset_builder", Mock(side_effect=error))
        with pytest.raises(DataError, match=words):
            data.check_available(spec_of("tulu3", "x/y"), [])


def test_long_rows_are_cut_or_left_out(hub):
    def row(n_asked, n_said):
        said = [("user", "So? " * n_asked), ("assistant", "Yes " * n_said)]
        return {"messages": [{"role": role, "content": text} for role, text in said]}

    rows = [row(1, 1), row(30, 1), row(1, 30), row(1, 2)]
    path = hub("tulu", {"default": {"train": rows, "test": rows}})
    spec = spec_of("tulu3", path, max_length=24, holdout=0, n_test=4)
    for changes, lengths in (
        ({"too_long": "cut_or_skip"}, [13, 24, 14]),
        ({"too_long": "skip"}, [13, 14]),
        ({"n_train": 2}, [13, 24]),  # rows left out do not count
    ):
        loaded = load(dataclasses.replace(spec, **changes))
        assert [len(e.tokens) for e in list_of(loaded)] == lengths
    for changes, words in (
        ({"too_long": "cut"}, "row 1: no token counts.*too_long=cut_or_skip"),
        ({"too_long": "skip", "max_length": 4}, "no rows can be used .too_long=skip, max_length=4"),
    ):
        with pytest.raises(DataError, match=words):
            load(dataclasses.replace(spec, **changes))


OLD, NEW = small_hub.COMMIT, small_hub.COMMIT[::-1]


def test_an_unpinned_name_is_its_commit_and_a_pinned_one_is_never_replaced(tmp_path, offline):
    """A newer commit brings other rows: kept tokens of the older one are not taken for them."""

    def made(commit, answer):
        shutil.rmtree(offline / "openai___gsm8k", ignore_errors=True)
        rows = [{"question": f"So? {i}", "answer": answer} for i in range(9)]
        splits = {"train": rows, "test": rows}
        small_hub.download(tmp_path, "openai/gsm8k", "main", commit, splits)

    def read(revision):
        given = shipped("gsm8k_hub", n_test=4, n_test_curve=4, revision=revision)
        return data.load(given, [], qwen_like(), str(tmp_path / "kept"))

    made(OLD, "Yes")
    old = read("")
    made(NEW, "No")
    new, pinned = read(""), read(NEW)
    assert (old.commit, new.commit, pinned.commit) == (OLD, NEW, NEW)
    assert old.sha256 != new.sha256 == pinned.sha256
    assert len(list((tmp_path / "kept").glob("*.rows"))) == 4
    with pytest.raises(DataError, match=f"is pinned to {OLD}.*holds {NEW}"):
        read(OLD)


def test_kept_tokens_of_training_rows_are_never_served_as_held_out_rows(tmp_path, offline):
    """As many rows are held out as trained on, and each says a number of its own."""
    counts = {"n_train": 10, "n_validation": 4, "n_test": 6, "n_test_curve": 0, "holdout": 10}
    spec = shipped("tulu3", revision=OLD, **counts)
    small_hub.make(tmp_path, [], [spec])

    def rows(cache):
        loaded = data.load(spec, [], qwen_like(), cache)
        parts = (loaded.train(0, 0, 10), [*loaded.validation, *loaded.test])
        return [[tuple(e.tokens) for e in part] for part in parts]

    train, held_out = rows("")
    assert len(set(train)) == len(set(held_out)) == 10 and not set(train) & set(held_out)
    for _ in ("made", "mapped"):
        assert rows(str(tmp_path / "kept")) == [train, held_out]

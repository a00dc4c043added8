"""Data: order, masks, padding, rows that must be refused, files of tokens that are kept; the hub's;
messages as text, token by token, on tokenizers that split as Llama 3's and Qwen's do; rows of hosted
fine-tuning services; the chat template in an adapter's folder, read by AutoTokenizer."""

import ast
import copy
import dataclasses
import hashlib
import io
import json
import random
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer

from lorasweep.data import column_names, messages, tokenizing
from lorasweep.data import splits as data
from lorasweep.data.examples import Example, collate, merge, padded, up
from lorasweep.errors import DataError
from lorasweep.spec.dataset import FILES, DatasetSpec
from tests import small_hub
from tests.customers import CHAT_TEMPLATE
from tests.small_hub import llama_like, problem, qwen_like, shipped, thought, tulu, with_chat
from tests.world import write_json, write_splits


class Letters:
    eos_token_id, bos_token = 0, None

    def __call__(self, texts, add_special_tokens=False):
        return type("Ids", (), {"input_ids": [list(t.encode()) for t in texts]})

    def decode(self, ids, skip_special_tokens=False):
        return bytes(i for i in ids if i).decode()


def jsonl(tmp_path, rows, **changes):
    write_splits(tmp_path / "mine", rows)
    mine = {"name": "mine", "location": "mine", "revision": "", "template": "{prompt}|"}
    names = {"prompt_field": "prompt", "completion_field": "completion"}
    spec = shipped("gsm8k", **mine, **names, **changes)
    return data.load(spec, [str(tmp_path)], Letters())


ROWS = [{"prompt": f"p{i}", "completion": f"answer {i}"} for i in range(10)]


def test_order_depends_on_data_set_split_and_seed_only(tmp_path):
    e = jsonl(tmp_path, ROWS).test[0]  # the loss looks at the completion and its end
    assert bytes(e.tokens[e.loss].tolist()) == b"answer 0\0" and e.n_bytes == len("answer 0")
    parts = (jsonl(tmp_path, ROWS).train(0, *p) for p in ((0, 30), (15, 15)))
    a, b = ([bytes(e.tokens.tolist()) for e in part] for part in parts)
    assert a[15:] == b and a[:10] != a[10:20]
    assert sorted(a[:10]) == sorted(a[10:20])  # each epoch has each row once


PAIR = {"prompt": "a", "completion": "b"}
TWICE, NAMED = '{"prompt": "a", "completion": "", "completion": "c"}', "'completion' is named twice"
THREE = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["prompt", "completion", "completion"])
parquet.write_table(THREE, in_parquet := io.BytesIO())
DAYS = pa.array([2**31 - 1], pa.int32()).cast(pa.date32())  # beyond the year 9999
parquet.write_table(pa.table({"day": DAYS}), too_late := io.BytesIO())
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "héllo"}]}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.jsonl", "{", ":1: not a JSON row"),
        ("rows.json", "[" * 99_999, "not json.*recur"),
        ("train.jsonl", '{"text": "a"}\n', "columns text"),
        ("train.jsonl", "3\n", "the columns of no object"),
        ("train.jsonl", b'{"prompt": "a", "completion": "caf\xe9"}\n', "not jsonl in UTF-8"),
        ("rows.csv", "a,b\n", "has no rows"),
        ("rows.csv", "a,b\n1,2,3\n", "row 1: not 2 cells"),
        ("rows.csv", "prompt,completion,completion\na,gold,b\n", NAMED),
        ("rows.jsonl", TWICE, NAMED),
        ("rows.json", f"[{TWICE}]", NAMED),
        ("rows.parquet", in_parquet.getvalue(), NAMED),
        ("rows.json", '{"a": [], "b": []}', "an object with one list"),
        ("rows.parquet", "PAR", "not parquet"),
        ("rows.parquet", too_late.getvalue(), "not parquet"),
        ("rows.txt", "a", "in no known form"),
        ("gone.csv", None, "is no file"),
    ],
    ids=lambda given: str(given)[:40],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=says):
        column_names.dataset_of(str(path))


def test_what_spreadsheets_and_other_rows_do(tmp_path):
    """Empty columns of a CSV file and a byte order mark are read; a later row of another form not.
    There must be rows, the pinned ones, and a tokenizer."""
    (tmp_path / "a.csv").write_text("prompt,completion,,\na,gold,,\n")
    assert column_names.dataset_of(str(tmp_path / "a.csv")).completion_field == "completion"
    path = write_json(tmp_path / "a.jsonl", [CHAT])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert column_names.count(str(path)).rows == 1
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        column_names.count(str(write_json(path, [CHAT, PAIR])))
    with pytest.raises(DataError, match="no rows"):
        jsonl(tmp_path, [])
    for tokenizer, words in ((Letters(), "pins"), (None, "no tokenizer")):
        with pytest.raises(DataError, match=words):
            data.load(shipped("gsm8k", location="mine"), [str(tmp_path)], tokenizer)


@pytest.mark.parametrize("lengths", [((5, 20),), ((5, 20), (40, 3)), ((64, 64), (16,) * 5)])
def test_runs_are_filled_up_and_only_tokens_in_the_loss_are_predicted(lengths):
    rng = np.random.default_rng(0)
    rows = [
        [Example(rng.integers(1, 9, size=n).astype(np.int32), np.arange(n) % 3 > 0) for n in own]
        for own in lengths
    ]
    b = merge([collate(own) for own in rows])
    assert b.tokens_N == tuple(map(sum, lengths))
    wanted = [token for own in rows for e in own for token in e.tokens[e.loss]]
    run, column = np.nonzero(b.weight_NM)
    assert b.targets_NM[run, column].tolist() == wanted and b.n_loss == len(run)
    tokens, positions, targets, weight = padded(b)
    most = max(map(len, lengths))  # a run with fewer rows gets empty ones
    expected = [n for own in lengths for n in (*own, *[0] * (most - len(own)))]
    assert [int((row > 0).sum()) for row in tokens] == expected
    assert tokens.shape[1] == up(max(expected)) and weight.sum() == len(wanted)
    row_of, column = np.nonzero(weight)
    assert targets[row_of, column].tolist() == wanted
    assert (tokens[row_of, positions[row_of, column] + 1] == wanted).all()


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "assistant", "content": "No", "weight": 0}, *CHAT["messages"]]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "héllo"}]},
        {"question": "Hi", "answer": "héllo", "id": 3},
        {"instruction": "Say", "output": "héllo"},
        {"instruction": "Say", "input": "Hi", "response": "héllo"},
    ],
    ids="-".join,
)
def test_the_usual_forms_are_read_and_counted(tmp_path, row):
    given = str(write_json(tmp_path / "train.jsonl", [row, row]))
    spec = column_names.dataset_of(given)
    data.check_available(spec, ["."])
    assert spec.problem is None and column_names.dataset_of(str(tmp_path)) == spec
    counted = column_names.count(given)
    assert (counted.rows, counted.answer_bytes) == (2, 2 * len("héllo".encode()))
    assert spec.revision == f"sha256:train={counted.sha256[: column_names.DIGITS]}"


def test_an_instruction_has_its_input_if_there_is_one_and_columns_can_be_named(tmp_path):
    rows = [{"instruction": "Say.", "input": t, "output": "héllo", **CHAT} for t in ("Hi", "")]
    path = str(write_json(tmp_path / "train.jsonl", rows))
    assert column_names.dataset_of(path).format == "messages"
    asked = {"instruction+input": ["Say.\n\nHi\n", "Say.\n"], "input": ["Hi\n", "\n"]}
    for named, prompts in asked.items():
        spec = column_names.dataset_of(path, named={"prompt_field": named})
        assert [messages.read(spec, row, "").turns[0]["content"] for row in rows] == prompts
    with pytest.raises(DataError, match="two columns: no and completion, no and response"):
        column_names.dataset_of(path, named={"prompt_field": "no"})


ANSWERED = [{"question": f"So? {k}", "answer": f"1,\n{k}", "id": str(k)} for k in range(3)]


def written(folder, form, rows=ANSWERED):
    path, frame = folder / f"rows.{form}", pd.DataFrame(rows)
    if form == "parquet":
        frame.to_parquet(path)
    elif form == "csv":
        frame.to_csv(path, index=False, sep=";")
    else:
        frame.to_json(path, orient="records", lines=form == "jsonl")
    return path


@pytest.mark.parametrize("form", FILES)
def test_files_of_every_form_hold_the_same_rows_and_are_pinned(tmp_path, form):
    path = written(tmp_path, form)
    spec = column_names.dataset_of(str(path))
    assert (spec.source, spec.prompt_field, spec.completion_field) == (form, "question", "answer")
    source, _ = data.sources_of(spec, ["."])
    assert [row for _, row in source.rows()] == ANSWERED
    assert source.identity == hashlib.sha256(path.read_bytes()).hexdigest()
    elsewhere = tmp_path / "b"  # a file of the same name and another content, looked at first
    elsewhere.mkdir()
    written(elsewhere, form, ANSWERED[:2])
    there = dataclasses.replace(spec, location=".")
    assert data.sources_of(there, [str(elsewhere), str(tmp_path)])[0].identity == source.identity
    (unreadable := tmp_path / "c" / path.name).parent.mkdir()
    unreadable.symlink_to("/proc/self/mem")
    assert data.sources_of(there, [str(tmp_path), str(unreadable.parent)])[0] is not None
    with pytest.raises(DataError, match="the revision pins"):
        data.sources_of(there, [str(elsewhere)])


# ---------------------------------------------------------------- tokens that are kept


class Counting:
    texts = 0

    def __getattr__(self, name):
        return getattr(qwen_like(), name)

    def __call__(self, texts, **options):
        self.texts += len(texts)
        return qwen_like()(texts, **options)


@pytest.fixture
def world(tmp_path):
    """A data set of 600 rows; `load(...)` with a fresh tokenizer says how many texts it was given."""
    names = {"prompt_field": "p", "completion_field": "c", "location": "mine", "revision": ""}
    spec = shipped("gsm8k", name="mine", n_test=8, n_test_curve=8, **names)

    def write(answer="Yes"):
        write_splits(tmp_path / "mine", [{"p": f"So? {i}", "c": answer} for i in range(600)])

    def load(cache=True, eos=None, **changes):
        tokenizer, given = Counting(), dataclasses.replace(spec, **changes)
        tokenizer.eos_token_id = eos or qwen_like().eos_token_id
        folder = str(tmp_path / "cache") if cache else ""
        return data.load(given, [str(tmp_path)], tokenizer, folder), tokenizer.texts

    write()
    load.write, load.cache = write, tmp_path / "cache"
    return load


def seen(loaded):
    return [(e.tokens.tolist(), e.loss.tolist(), e.n_bytes) for e in loaded.train(3, 0, 700)]


def test_a_second_worker_tokenizes_nothing_and_other_rows_have_files_of_their_own(world):
    """So have another length and another form."""
    (alone, n), (first, n_first), (again, n_again) = world(cache=False), world(), world()
    assert (n, n_first, n_again) == (2 * 608, 2 * 608, 0)
    assert seen(alone) == seen(first) == seen(again) and alone.sha256 == first.sha256
    assert not again.train(0, 0, 1)[0].tokens.flags.writeable  # it is mapped
    cut, n_cut = world(max_length=23)
    few, n_few = world(n_train=10)
    ended, n_ended = world(eos=7)  # as of a base and its chat model, whose tokens are the same ones
    world.write("No")
    other, n_other = world()
    assert n_cut == n_ended == n_other == 2 * 608 and n_few == 2 * 10
    assert len({d.sha256 for d in (again, cut, few, ended, other)}) == 5
    renamed, n_renamed = world(name="yours")
    assert n_renamed == 0 and renamed.sha256 == other.sha256


@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "head"])
def test_a_damaged_file_is_made_again(world, damage):
    whole, _ = world()
    path = max(world.cache.glob("*.rows"), key=lambda p: p.stat().st_size)
    good = path.read_bytes()
    bad = {
        "cut": good[:-7],
        "empty": b"",
        "changed": good[:-3] + bytes([good[-3] ^ 1]) + good[-2:],
        "head": b"{" + good[1 : tokenizing.HEADER - 1] + b"x" + good[tokenizing.HEADER :],
    }
    path.unlink()  # `whole` maps the old one
    path.write_bytes(bad[damage])
    assert tokenizing.mapped(path) is None
    again, n = world()
    assert n == 2 * 600 and path.read_bytes() == good and seen(again) == seen(whole)


def test_processes_that_need_the_same_file_at_once_make_it_once(tmp_path):
    made, start = [], threading.Barrier(4)

    def make():
        made.append(1)
        example = Example(np.arange(5, dtype=np.int32), np.arange(5) > 2, 3)
        return tokenizing.Rows.of([example] * 100)

    def work(_):
        start.wait()
        return tokenizing.kept(tmp_path / "a/x.rows", make)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(4)))
    assert len(made) == 1 and {r.sha256 for r in found} == {make().sha256}
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"x.rows", "x.lock"}


# ---------------------------------------------------------------- the hub, as folders of a few rows


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


TURNS = [
    {"role": "user", "content": "Is it late?"},
    {"role": "assistant", "content": "Yes, it is."},
    {"role": "user", "content": "So? 345"},
    {"role": "assistant", "content": "No!"},
]
EOS = "<|endoftext|>"


@pytest.fixture
def tokens_of(tmp_path):
    """`tokens_of(tokenizer, ...)`: a row's tokens as text, those in the loss in brackets; the row."""

    def make(tokenizer, messages=TURNS, **changes):
        write_splits(tmp_path / "mine", [{"messages": messages}])
        mine = {"source": "jsonl", "location": "mine", "holdout": 0, "revision": ""}
        e = data.load(shipped("tulu3", **mine, **changes), [str(tmp_path)], tokenizer).test[0]
        words = tokenizer.convert_ids_to_tokens(e.tokens.tolist())
        shown = [w.replace("Ġ", "_").replace("Ċ", "/") for w in words]
        return " ".join(f"[{w}]" if counts else w for w, counts in zip(shown, e.loss)), e

    return make


def test_role_colon_is_the_studys_form_with_bos_where_there_is_one(tokens_of):
    """Contents keep their leading space, so that it joins the first word; the blank line of an
    answer joins its last sign, and is in the loss; so is the 'User:' behind the last answer."""
    first = "User : _Is _it _late ?// Assistant : _Yes , _it _is .// User : _So ? _ "
    begun = (llama_like, "<|begin_of_text|> ", "345"), (qwen_like, "", "3 4 5")
    for tokenizer, start, number in begun:
        shown, row = tokens_of(tokenizer())
        assert shown == f"{start}{first}{number} // Assistant : [_No] [!//] [User] [:]"
    assert row.n_bytes == len(" No!\n\nUser:")

    shown, row = tokens_of(qwen_like(), TURNS[:2], render="role_eos")  # no BOS, and an end
    answer = f"[Yes] [,] [_it] [_is] [.] [{EOS}]"
    assert shown == f"User : _ Is _it _late ? // Assistant : _ {answer}"
    assert row.n_bytes == len("Yes, it is.")
    (tokenizer := copy.deepcopy(qwen_like())).eos_token = None
    with pytest.raises(DataError, match=r"tokenizer has none.*dataset.render=role_colon"):
        tokens_of(tokenizer, render="role_eos")


@pytest.mark.parametrize("render", ["role_eos", "role_colon"])
@pytest.mark.parametrize("tokenizer", [llama_like, qwen_like])
def test_a_whole_prompt_has_the_tokens_that_a_server_sends(tokens_of, tokenizer, render):
    """Of one or two questions; an earlier answer is in the prompt, too."""
    differ, how = 0, {"add_generation_prompt": True, "tokenize": False}
    served = tokenizing.with_template(shipped("tulu3", render=render), tokenizer())
    for n in (2, 4):
        sent = served(served.apply_chat_template(TURNS[: n - 1], **how), add_special_tokens=False)
        given = tokenizer(), TURNS[:n]
        alone, whole = (tokens_of(*given, render=render, whole_prompt=w)[1] for w in (False, True))
        assert whole.tokens[: whole.loss.tolist().index(True)].tolist() == sent.input_ids
        answers = [e.tokens[e.loss].tolist() for e in (alone, whole)]
        assert answers[0] == answers[1] and whole.n_bytes == alone.n_bytes
        differ += not np.array_equal(alone.tokens, whole.tokens)
    assert differ == (2 if render == "role_eos" else 0)


def weighted(*weights):
    """The turns with a weight for each message; none where it is ...."""
    return [m if w is ... else {**m, "weight": w} for m, w in zip(TURNS, weights)]


YES, NO = "[_Yes] [,] [_it] [_is] [.//]", "[_No] [!//] [User] [:]"
ASKED = "User : _So ? _ 3 4 5 // Assistant :"


@pytest.mark.parametrize(
    "weights, changes, text",
    [
        # the last message is no answer: nothing follows it
        ((..., ..., ...), {"mask": "completion"}, f": {YES} {ASKED[: -len(' Assistant :')]}"),
        (
            (..., 0, ..., ...),
            {"mask": "completion", "render": "role_eos"},
            f": _ Yes , _it _is . {EOS} User : _ S o ? _ 3 4 5 // Assistant : _ [No] [!] [{EOS}]",
        ),
        # and each one that is put in
        ((None, 1.0, None, None), {"mask": "last_assistant"}, f": {YES} {ASKED} {NO}"),
        (
            (..., 0, 0, ...),
            {"mask": "all"},
            f"[:] _Yes , _it _is .// [User] [:] {ASKED[7:-12]} [Assistant] [:] {NO}",
        ),
    ],
)
def test_messages_of_weight_1_are_learned_and_those_of_0_not(tokens_of, weights, changes, text):
    assert tokens_of(qwen_like(), weighted(*weights), **changes)[0].endswith(text)
    with pytest.raises(DataError, match=r"jsonl:1: no token counts.*give one weight 1"):
        tokens_of(qwen_like(), weighted(..., 0, ..., 0))


TEMPLATE = CHAT_TEMPLATE.replace("eos_token }}", "eos_token }}\n")
FORGETS = TEMPLATE.replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' }}")


def test_a_template_that_rewrites_what_came_before_trains_the_last_answer_only(tokens_of):
    def chat(template, mask):
        return tokens_of(with_chat(template), render="chat_template", mask=mask)[0]

    shown = chat(FORGETS, "last_assistant")
    assert shown.endswith(f"[No] [!] [{EOS}]") and "Yes" not in shown
    for template, words in (
        (FORGETS, r":1: .*does not take the row with mask=completion"),
        (None, "render=chat_template, but the tokenizer has none"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ):
        with pytest.raises(DataError, match=words):
            chat(template, "completion")


# ---------------------------------------------------------------- rows of hosted services
# Plain messages are written to a file in the forms that services take (parts, JSON text, contents left
# out, the role developer). The reference renders the plain messages.

CHATML = (
    "{% if tools or messages[0].role == 'system' %}<|im_start|>system{{ '\n' }}"
    "{{ messages[0].content ~ '\n' if messages[0].role == 'system' }}"
    "{% if tools %}# Tools{% for tool in tools %}{{ '\n' ~ (tool | tojson) }}{% endfor %}{% endif %}"
    "{{ eos_token }}\n{% endif %}{% for m in messages %}"
    "{% set before, after = messages[loop.index0 - 1].role, (messages[loop.index0 + 1] or m).role %}"
    "{% if m.role == 'tool' %}{{ '<|im_start|>user' if before != 'tool' }}{{ '\n' ~ m.content }}"
    "{{ eos_token ~ '\n' if loop.last or after != 'tool' }}"
    "{% elif m.role != 'system' %}<|im_start|>{{ m.role }}{{ '\n' ~ m.content if m.content }}"
    '{% for call in m.tool_calls or [] %}{{ \'\n<tool_call>\n{"name": "\' ~ call.function.name }}'
    "{{ '\", \"arguments\": ' ~ (call.function.arguments | tojson) ~ '}' }}{% endfor %}"
    "{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
"""As Qwen's: results of tools that follow each other are one message of the user."""
REASONS = CHATML.replace(
    "'\n' ~ m.content if m.content",
    "'\n' ~ ('<think>' ~ m.reasoning_content ~ '</think>' if m.reasoning_content and loop.last "
    "else '') ~ m.content if m.content",
)
"""As in Qwen3's, the reasoning of earlier answers is left out."""
SPEC = DatasetSpec(name="a", source="jsonl", location=".", format="messages")

TOOLS = [
    {"type": "function", "function": {"name": n, "description": "So?", "parameters": {"a": [1]}}}
    for n in ("get_weather", "late")
]


def as_given(rng, messages, tools):
    messages = copy.deepcopy(messages)
    for m in messages:
        if m["role"] == "system":
            m["role"] = rng.choice(["system", "developer"])
        if m["content"] is not None and rng.random() < 0.5:
            cut = rng.randint(0, len(m["content"]))
            parts = (m["content"][:cut], m["content"][cut:])
            m["content"] = [{"type": "text", "text": t} for t in parts]
        if m["content"] is None and rng.random() < 0.5:
            del m["content"]
        for c in m.get("tool_calls", ()):
            if rng.random() < 0.8:
                c["function"]["arguments"] = json.dumps(c["function"]["arguments"])
    row = {"messages": messages, "parallel_tool_calls": True}
    return row if tools is None else {**row, "tools": rng.choice([tools, json.dumps(tools)])}


def reference(tokenizer, messages, tools, mask):
    """Return token ids, loss, and bytes in the loss of a row, by the characters of the whole text.

    Answers stand between <|im_start|>assistant and EOS; each token is looked up by its first character.
    """
    whole = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    eos = tokenizer.eos_token
    found = re.finditer(rf"<\|im_start\|>assistant\n(.*?{re.escape(eos)})", whole, re.S)
    weights = [m.get("weight") for m in messages if m["role"] == "assistant"]
    last = max(k for k, weight in enumerate(weights) if weight != 0)
    by_mask = [mask != "last_assistant" or k == last for k in range(len(weights))]
    learned = [m if w is None else w == 1 for m, w in zip(by_mask, weights)]
    spans = [m.span(1) for m, is_in in zip(found, learned, strict=True) if is_in == (mask != "all")]
    texts = [whole[a:b] for a, b in spans]
    n_bytes = sum(len(text.removesuffix(eos).encode()) for text in texts)
    if mask == "all":
        n_bytes = len(whole.encode()) - sum(len(text.encode()) for text in texts)
    else:
        whole = whole[: spans[-1][1]]  # what follows the last answer in the loss is left out
    given = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    starts = [start for start, _ in given.offset_mapping]
    loss = [any(a <= k < b for a, b in spans) != (mask == "all") for k in starts]
    return given.input_ids, [False, *loss[1:]], n_bytes  # nothing predicts the first token


@pytest.fixture
def read(tmp_path):
    """`read(rows, ...)`: ids, loss and its bytes, of each row of a file given by name."""

    def make(rows, tokenizer=None, **changes):
        path = write_json(tmp_path / "rows.jsonl", rows) if isinstance(rows, list) else rows
        changes = {"render": "chat_template", "max_length": 4096, **changes}
        spec = dataclasses.replace(column_names.dataset_of(str(path)), **changes)
        source, _ = data.sources_of(spec, ["."])
        tokenizer = tokenizer or with_chat(CHATML)
        found = tokenizing.examples(spec, spec.train_split, source, tokenizer, None, "")
        return [(e.tokens.tolist(), e.loss.tolist(), e.n_bytes) for e in found]

    return make


@pytest.mark.parametrize("mask", ["completion", "last_assistant", "all"])
@pytest.mark.parametrize("tokenizer", [qwen_like, llama_like])
def test_the_loss_of_rows_is_that_of_the_formats_description(read, tokenizer, mask):
    tokenizer, rng, plain = with_chat(CHATML, tokenizer), random.Random(0), []
    for k in range(60):
        row = row_of("messages", k, tools=k % 3 > 0)
        answers = [m for m in row["messages"] if m["role"] == "assistant"]
        for m in answers:
            m["weight"] = rng.choice([0, 1, None])
        rng.choice(answers)["weight"] = rng.choice([1, None])
        plain.append((row["messages"], row.get("tools")))
    found = read([as_given(rng, *row) for row in plain], tokenizer, mask=mask)
    assert found == [reference(tokenizer, *row, mask) for row in plain]


def test_rows_that_differ_in_ids_are_duplicates_and_tools_belong_to_the_prompt():
    def readings(tools, **called):
        said = [USER, {"role": "assistant", "tool_calls": [{**CALLED[0], **called}]}]
        found = messages.read(SPEC, {"messages": said, "tools": tools}, "")
        return found.whole, found.prompt, found.opening

    same = readings(TOOLS)
    assert same == readings(TOOLS, id="new")
    assert all(a != b for a, b in zip(same, readings(TOOLS[:1])))
    other = readings(TOOLS, function={"name": "late", "arguments": '{"a": 1}'})
    assert other[0] != same[0] and other[1] == same[1]  # what is called is part of the answer


USER, ANSWER = {"role": "user", "content": "So?"}, {"role": "assistant", "content": "Yes"}
CALLED = [{"id": "1", "function": {"name": "late", "arguments": "{}"}}]
GOOD = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": CALLED}]}
TALK = [{"from": "human", "value": "So?"}, {"from": "gpt", "value": "Yes"}]
SHARED = {"conversations": TALK}


def answer(**changes):
    return {"messages": [USER, {**ANSWER, **changes}]}


def calling(arguments="{}", name="late", **more):
    return answer(tool_calls=[{"function": {"name": name, "arguments": arguments}, **more}])


TEXT_PART, HALF = {"type": "text", "text": "So?"}, "\ud83d"
IMAGE = {"type": "image_url", "image_url": {}}
REFUSED = [
    ("messages[0].content[1] is", {"messages": [{**USER, "content": [TEXT_PART, IMAGE]}, ANSWER]}),
    ("messages[1].content[0] is 'Yes'", answer(content=["Yes"])),
    *(("messages[1].content is", answer(content=c, tool_calls=[])) for c in (None, 3)),
    ("message 2: character 5 is", answer(content=f"Yes {HALF}")),
    ("as rendered: character", calling(json.dumps({"a": HALF}))),
    *((f"messages[1].role is {r!r}", answer(role=r)) for r in ("function", 3)),
    ("the row has train, for which", answer(train=False)),
    ("the row has function_call, for which", answer(function_call="So")),
    *((f"column {k!r} is", {**answer(), k: v}) for k, v in (("system", "Be."), ("label", False))),
    *(
        ("messages[1].tool_calls[0].function.arguments is", calling(a))
        for a in ("[" * 100_000, "late=3", "[1]", None)
    ),
    ("messages[1].tool_calls[0] is", calling(name="")),
    ("messages[1].tool_calls[0] is", calling(type="custom")),
    ("messages[1].tool_calls is", answer(tool_calls={"a": 1})),
    ("messages[1].tool_calls of role 'user'", answer(role="user", tool_calls=CALLED)),
    ("tools is 'late'", {**GOOD, "tools": "late"}),
    ("tools[0] is", {**GOOD, "tools": [{"name": "late"}]}),
    *(("messages[1].weight of", answer(weight=w)) for w in (0.5, True, "1")),
    ("messages[0].weight of", {"messages": [{**USER, "weight": 1}, ANSWER]}),
    ("conversations[1].from is 'tool'", {"conversations": [TALK[0], {**TALK[1], "from": "tool"}]}),
    ("'content' beside from and value", {"conversations": [TALK[0], {**TALK[1], "content": "No"}]}),
    ("column 'tools' is", {**SHARED, "tools": "[{}]"}),
    ("no field 'completion'", {"prompt": "a"}),
    ("field 'completion' is 3", {**PAIR, "completion": 3}),
    *((f"column {k!r} is", {**PAIR, k: v}) for k, v in (("system", "Be."), ("label", False))),
    ("the row is", []),
]


@pytest.mark.parametrize("place, row", REFUSED, ids=lambda given: str(given)[:40])
def test_what_is_not_understood_is_refused_with_file_row_and_place(read, place, row):
    good = next((g for g in (GOOD, SHARED) if g.keys() <= set(row)), PAIR)
    with pytest.raises(DataError, match=rf"(?s)rows.jsonl:2.*{re.escape(place)}.*Refused: 1 of 2"):
        read([good, row])


def test_what_is_empty_is_not_refused(read):
    rows = [GOOD, {**GOOD, "tools": None}, answer(reasoning_content="", refusal=None)]
    assert len(read(rows)) == 3 and read([{**SHARED, "tools": "[]", "system": ""}])


TOOLED = {"messages": [USER, {**GOOD["messages"][1], "content": "So"}, *answer()["messages"]]}


@pytest.mark.parametrize(
    "template, changes, row, says",
    [
        (None, {"render": "role_eos"}, TOOLED, "has tool_calls, for which render=role_eos"),
        (CHAT_TEMPLATE, {}, TOOLED, "has tool_calls, for which render=chat_template"),
        (CHAT_TEMPLATE + "{# tools, tool_calls #}", {"mask": "all"}, TOOLED, "out 'late' of m"),
        (CHATML + "{# name #}", {}, answer(name="so"), "leaves out 'name' of message 2"),
        (CHATML, {"render": "role_colon"}, answer(name="so"), "has name, for which"),
    ],
)
def test_rows_are_refused_where_the_base_has_no_form_for_them(read, template, changes, row, says):
    plain = {"messages": [USER, ANSWER]}
    with pytest.raises(DataError, match=says) as error:
        read([plain, row, plain, row, row, row], with_chat(template), **changes)
    shown = re.findall(r"rows.jsonl:(\d)", str(error.value))
    assert shown == ["2", "4", "5"] and str(error.value).endswith("Refused: 4 of 6 rows.")


@pytest.mark.parametrize("mask", ["completion", "last_assistant", "all"])
def test_reasoning_that_the_chat_template_renders_is_learned(read, mask):
    """Reasoning of an earlier answer is left out, as a server does."""
    tokenizer = with_chat(REASONS)
    row = answer(reasoning_content="So it is.", refusal=None, audio=None)["messages"]
    for said in (row, [*row, *answer()["messages"]])[: 1 + (mask == "last_assistant")]:
        ((ids, loss, n_bytes),) = read([{"messages": said}], tokenizer, mask=mask)
        assert (ids, loss, n_bytes) == reference(tokenizer, said, None, mask)
    thought = "<think>So it is.</think>Yes"
    assert (thought in tokenizer.decode(ids)) == (len(said) == 2)


def test_rows_of_arrow_have_no_keys_of_other_rows(read, tmp_path):
    """Parquet has the keys of all calls and tools in every row, as nulls."""
    rows = []
    for key, arguments in (("a", {"a": 1}), ("b", {"b": "x"}), ("a", {})):
        described = {"name": "late", "parameters": {key: {"type": key}}}
        rows.append({**calling(arguments), "tools": [{**TOOLS[0], "function": described}]})
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet") == read(rows)


# ---------------------------------------------------------------- templates for servers

ODD = 'Q "\\ {{%}} {prompt} 😀é\r\n{prompt}A: '
DATED = "{{ bos_token }}{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
NO_HEAD = CHAT_TEMPLATE.replace("<assistant>{% endif", "{% endif")
"""A prompt ends without the head of the answer."""


def row_of(form, k, tools=False):
    """A row: of one or two exchanges, with a system's turn in every second, odd texts in all."""
    said = [("user", f" How\nmany? {k} {{prompt}}"), ("assistant", f"{k} in all 😀 ")] * (1 + k % 2)
    if form == "prompt_completion":
        return {"prompt": said[0][1], "completion": said[1][1]}
    said = [("system", "Say yes.")] * (k % 4 > 1) + said
    if form == "conversations":
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        return {form: [{"from": names[r], "value": t} for r, t in said]}
    messages = [{"role": r, "content": t} for r, t in said]
    if tools:
        calls, results = [], []
        for name in ("late", "get_weather")[: 1 + k % 2]:
            function = {"name": name, "arguments": {"k": k, "é": [True, None]}}
            calls.append({"id": name, "type": "function", "function": function})
            result = {"role": "tool", "content": f"{k}", "tool_call_id": name, "name": name}
            results.append(result)
        calling = {"role": "assistant", "content": (None, "Yes")[k % 2], "tool_calls": calls}
        messages[-1:] = [calling, *results, dict(ANSWER)]
    return {form: messages, **({"tools": TOOLS} if tools else {})}


def spec_in(render, form="prompt_completion", template="{prompt}\n", **more):
    given = {"render": render, "format": form, "template": template, "max_length": 4096}
    return dataclasses.replace(SPEC, **given, **more)


@pytest.mark.parametrize("mask", ["completion", "last_assistant", "all"])
@pytest.mark.parametrize("form", ["prompt_completion", "messages", "conversations"])
@pytest.mark.parametrize("render", ["role_eos", "role_colon", "chat_template"])
def test_rows_read_back_are_those_trained_on(render, form, mask, tmp_path):
    chat = render == "chat_template"
    chats = [with_chat(t, llama_like) for t in (CHAT_TEMPLATE, DATED + CHATML)]
    in_forms = ("{prompt}", "{prompt}\n", ODD) if form == "prompt_completion" else (ODD,)
    for n, tokenizer in enumerate(chats if chat else (llama_like(), qwen_like())):
        for template in in_forms:
            spec = spec_in(render, form, template, mask=mask)
            tokenizing.save_tokenizer(
                tokenizing.with_template(spec, tokenizer), {}, tmp_path / f"{n}"
            )
            served = AutoTokenizer.from_pretrained(tmp_path / f"{n}")
            for k in range(20):
                row = row_of(form, k, form == "messages" and n == 1 and chat)
                turns, described = tokenizing.request_of(spec, row, "row")
                one = SimpleNamespace(rows=lambda row=row: iter([("row", row)]))
                (example,) = tokenizing.examples(spec, "train", one, tokenizer, None, "")
                how = {"tools": described or None, "tokenize": False}
                whole = served.apply_chat_template(turns, **how)
                trained = tokenizer.decode(example.tokens, clean_up_tokenization_spaces=False)
                if chat and mask != "all":
                    whole = whole.removesuffix("\n")  # what follows the last answer in the loss
                assert trained == whole
                until = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
                how["add_generation_prompt"] = True
                prompt = served.apply_chat_template(turns[:until], **how)
                assert trained.startswith(prompt)
                if mask != "all":
                    learned = "".join(
                        p for p, _ in tokenizing.rendered(spec, row, "row", tokenizer)[:-1]
                    )
                    assert learned == prompt
                tokenizing.check_rows(spec, [("row", row)], tokenizer)


@pytest.mark.parametrize("wrong", ["{{ messages[0].content }}", "{{ 1 / 0 }}", NO_HEAD])
def test_other_conversations_and_another_text_are_refused(wrong, monkeypatch):
    served = tokenizing.with_template(spec_in("role_eos"), llama_like())
    with pytest.raises(Exception, match="send one user message"):
        served.apply_chat_template([{"role": "system", "content": "Yes."}, USER], tokenize=False)
    monkeypatch.setattr(tokenizing, "_plain", lambda spec, bos: wrong)
    rows = [("my.jsonl:1", row_of("messages", 0))]
    with pytest.raises(DataError, match=r"my.jsonl:1: the chat template for servers"):
        tokenizing.check_rows(spec_in("role_eos", "messages"), rows, with_chat(CHAT_TEMPLATE))


@pytest.mark.slow  # parses the whole library three times
def test_functions_of_the_standard_library_are_whole_rows_of_signature_docstring_and_body(tmp_path):
    script = Path(__file__).parents[3] / "examples/stdlib.py"
    subprocess.run([sys.executable, script, tmp_path / "stdlib"], check=True, capture_output=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/train.jsonl").write_bytes(b"\xff mine")
    asked = [sys.executable, script, tmp_path / "mine"]
    refused = subprocess.run(asked, stderr=subprocess.PIPE, text=True)
    assert "has other rows and was not changed" in refused.stderr and refused.returncode == 1
    assert (tmp_path / "mine/train.jsonl").read_bytes() == b"\xff mine"
    rows = [json.loads(line) for line in (tmp_path / "stdlib/train.jsonl").open(encoding="utf-8")]
    assert len(rows) > 4000
    for row in rows:
        (function,) = ast.parse(row["prompt"] + row["completion"]).body
        assert ast.get_docstring(function) == ast.get_docstring(ast.parse(row["prompt"]).body[0])
        assert len(function.body) > 1
    spec = shipped("stdlib")
    train, held_out = data.sources_of(spec, [str(tmp_path)])
    prompts = [{row["prompt"] for _, row in part.rows()} for part in (train, held_out)]
    assert len(prompts[1]) > spec.n_test and not prompts[0] & prompts[1]

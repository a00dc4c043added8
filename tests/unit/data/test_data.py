"""Data: order, masks, padding, rows that must be refused, files of tokens that are kept; the hub's."""

import dataclasses
import hashlib
import io
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet

from lorasweep.data import load as data
from lorasweep.data import messages, sources, text
from lorasweep.data.examples import Example, collate, merge, padded, up
from lorasweep.errors import DataError
from lorasweep.spec.dataset import FILES
from tests import small_hub
from tests.small_hub import llama_like, problem, qwen_like, thought, tulu
from tests.unit.data.conftest import shipped
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
    a, b = (
        [bytes(e.tokens.tolist()) for e in jsonl(tmp_path, ROWS).train(0, *p)]
        for p in ((0, 30), (15, 15))
    )
    assert a[15:] == b and a[:10] != a[10:20]
    assert sorted(a[:10]) == sorted(a[10:20])  # each epoch has each row once


PAIR = {"prompt": "a", "completion": "b"}
TWICE, NAMED = (
    '{"prompt": "a", "completion": "b", "completion": "c"}',
    "'completion' is named twice",
)
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
        sources.dataset_of(str(path))


def test_what_spreadsheets_and_other_rows_do(tmp_path):
    """Empty columns of a CSV file and a byte order mark are read; a later row of another form not.
    There must be rows, the pinned ones, and a tokenizer."""
    (tmp_path / "a.csv").write_text("prompt,completion,,\na,gold,,\n")
    assert sources.dataset_of(str(tmp_path / "a.csv")).completion_field == "completion"
    path = write_json(tmp_path / "a.jsonl", [CHAT])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert sources.count(str(path)).rows == 1
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        sources.count(str(write_json(path, [CHAT, PAIR])))
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
    spec = sources.dataset_of(given)
    data.check_available(spec, ["."])
    assert spec.problem is None and sources.dataset_of(str(tmp_path)) == spec
    counted = sources.count(given)
    assert (counted.rows, counted.answer_bytes) == (2, 2 * len("héllo".encode()))
    assert spec.revision == f"sha256:train={counted.sha256[: sources.DIGITS]}"


def test_an_instruction_has_its_input_if_there_is_one_and_columns_can_be_named(tmp_path):
    rows = [
        {"instruction": "Say.", "input": text, "output": "héllo", **CHAT} for text in ("Hi", "")
    ]
    path = str(write_json(tmp_path / "train.jsonl", rows))
    assert sources.dataset_of(path).format == "messages"
    for named, prompts in (
        ("instruction+input", ["Say.\n\nHi\n", "Say.\n"]),
        ("input", ["Hi\n", "\n"]),
    ):
        spec = sources.dataset_of(path, named={"prompt_field": named})
        assert [messages.read(spec, row, "").turns[0]["content"] for row in rows] == prompts
    with pytest.raises(DataError, match="two columns: no and completion, no and response"):
        sources.dataset_of(path, named={"prompt_field": "no"})


ANSWERED = [{"question": f"So? {k}", "answer": f"1,\n{k}", "id": str(k)} for k in range(3)]


def written(folder, form, rows=ANSWERED):
    """The same rows in a file of each form, written by pandas."""
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
    spec = sources.dataset_of(str(path))
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
        "head": b"{" + good[1 : text.HEADER - 1] + b"x" + good[text.HEADER :],
    }
    path.unlink()  # `whole` maps the old one
    path.write_bytes(bad[damage])
    assert text.mapped(path) is None
    again, n = world()
    assert n == 2 * 600 and path.read_bytes() == good and seen(again) == seen(whole)


def test_processes_that_need_the_same_file_at_once_make_it_once(tmp_path):
    made, start = [], threading.Barrier(4)

    def make():
        made.append(1)
        example = Example(np.arange(5, dtype=np.int32), np.arange(5) > 2, 3)
        return text.Rows.of([example] * 100)

    def work(_):
        start.wait()
        return text.kept(tmp_path / "a/x.rows", make)

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

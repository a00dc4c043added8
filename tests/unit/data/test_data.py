"""Data: order, masks, padding, rows that must be refused, and files of tokens that are kept."""

import dataclasses
import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from lorasweep.data import load as data
from lorasweep.data import messages, own, rows
from lorasweep.data.batches import collate, merge, padded
from lorasweep.data.examples import Example
from lorasweep.data.load import check_available
from lorasweep.data.synthetic import skills
from lorasweep.errors import DataError
from lorasweep.spec.dataset import FILES
from lorasweep.spec.streams import stream
from tests.bpe import qwen_like
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


def test_the_loss_looks_at_the_completion_and_its_end(tmp_path):
    e = jsonl(tmp_path, ROWS).test[0]
    assert bytes(e.tokens[e.loss].tolist()) == b"answer 0\0" and e.n_bytes == len("answer 0")
    said = ("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "no")
    row = {"messages": [{"role": role, "content": text} for role, text in said]}
    for how, learned in (({"mask": "last_assistant"}, b"no\0"), ({}, b"yes\0no\0")):
        e = jsonl(tmp_path, [row], format="messages", **how).test[0]
        assert bytes(e.tokens[e.loss].tolist()) == learned


def test_order_depends_on_data_set_split_and_seed_only(tmp_path):
    a, b = jsonl(tmp_path, ROWS), jsonl(tmp_path, ROWS)

    def seen(loaded, seed, start, count):
        return [bytes(e.tokens.tolist()) for e in loaded.train(seed, start, count)]

    assert seen(a, 0, 0, 30) == seen(b, 0, 0, 15) + seen(b, 0, 15, 15)
    assert sorted(seen(a, 0, 0, 10)) == sorted(seen(a, 0, 10, 10))  # each epoch has each row once
    assert seen(a, 0, 0, 10) != seen(a, 0, 10, 10) and seen(a, 0, 0, 10) != seen(a, 1, 0, 10)


BAD = [
    (['{"prompt": "a", "completion": "b"}', '{"prompt": '], r"train\.jsonl:2: not a JSON row"),
    ([{"prompt": "a"}], r"train\.jsonl:1: no field 'completion', only prompt"),
    ([{"prompt": "a", "completion": 3}], r":1: field 'completion' is 3. Allowed: a text"),
    ([{"prompt": "p" * 600, "completion": "b"}], r":1: no token counts in the loss"),
    (["[]"], r":1: the row is \[\]. Allowed: an object"),
    ([], "no rows"),
]


@pytest.mark.parametrize(("rows", "words"), BAD)
def test_bad_rows_are_named_by_file_and_line(tmp_path, rows, words):
    with pytest.raises(DataError, match=words):
        jsonl(tmp_path, rows)


TWICE, WIDE = '{"prompt": "a", "completion": "b", "completion": "c"}', ",,\na,gold,rejected,,\n"
UNREADABLE = [
    *(
        (f"rows.{end}", row if end == "jsonl" else f"[{row}]", f"rows.{end}(:1)?: not .*{words}")
        for end in ("jsonl", "json")
        for row, words in (
            (TWICE, "'completion' is named"),
            ('{"prompt": "a", "completion": "b", "id": %s}' % ("9" * 5000), "4300 digits"),
            ('{"prompt": "a", "completion": "b", "id": %s}' % ("[" * 100_000), "recursion"),
        )
    ),
    ("train.jsonl", '{"text": "a"}\n', "columns text. A text alone .* Expected messages"),
    ("train.jsonl", "3\n", "the columns of no object"),
    ("train.jsonl", "\n", "has no rows"),
    ("train.jsonl", b'{"prompt": "a", "completion": "caf\xe9"}\n', "not jsonl in UTF-8"),
    ("rows.csv", "a,b\n", "has no rows"),
    ("rows.csv", "a,b\n1,2,3\n", "row 1: not 2 cells"),
    ("rows.csv", f"prompt,completion,completion{WIDE}", "'completion' is named twice"),
    ("rows.json", '{"a": [], "b": []}', "an object with one list"),
    ("rows.json", '{"a": 1}\n{"a": 1}\n', "not json in UTF-8"),
    ("rows.parquet", "PAR", "not parquet"),
    ("rows.txt", "a", "in no known form. Expected a file that ends on .jsonl, .json, .csv or"),
]


@pytest.mark.parametrize(("name", "content", "says"), UNREADABLE, ids=str)
def test_what_cannot_be_read_is_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=says):
        own.dataset_of(str(tmp_path / name))


def test_other_things_that_cannot_be_read(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,,\na,gold,,\n")  # as spreadsheets write empty columns
    assert own.dataset_of(str(path))
    columns, names = [pa.array(["a"])] * 3, ["prompt", "completion", "completion"]
    pq.write_table(pa.Table.from_arrays(columns, names=names), tmp_path / "rows.parquet")
    given = write_json(tmp_path / "train.jsonl", [CHAT, {"prompt": "a", "completion": "b"}])
    for read, path, says in (
        (own.dataset_of, tmp_path / "rows.parquet", "'completion' is named twice"),
        (own.dataset_of, tmp_path / "gone", "is no file"),
        (own.count, given, r"train\.jsonl:2"),
    ):
        with pytest.raises(DataError, match=says):
            read(str(path))


def test_a_file_other_than_the_pinned_one_is_refused(tmp_path):
    jsonl(tmp_path, ROWS)
    with pytest.raises(DataError, match="pins"):
        data.load(shipped("gsm8k", location="mine"), [str(tmp_path)], Letters())
    with pytest.raises(DataError, match="no tokenizer"):
        data.load(shipped("gsm8k"), [])


def test_padding_never_bears_loss_and_loss_positions_predict_the_next_token():
    examples = [
        Example(np.arange(1, 6, dtype=np.int32), np.array([0, 1, 1, 0, 1], bool)),
        Example(np.arange(1, 21, dtype=np.int32), np.arange(20) == 19),
    ]
    b = collate(examples)
    assert b.tokens_NX.shape == (1, 48) and b.loss_positions_NM.shape == (1, 16)
    assert b.lengths == ((16, 32),) and b.n_loss == 4 and b.tokens_N == (25,)
    following = b.tokens_NX[0, b.loss_positions_NM[0, :4] + 1]
    assert list(following) == list(b.targets_NM[0, :4]) == [2, 3, 5, 20]
    assert not b.weight_NM[0, 4:].any()


@pytest.mark.parametrize(
    ("lengths", "filled"),
    [
        (((5, 20), (40, 3)), ((16, 32, 16), (48, 16))),
        (((64, 64), (16,) * 5), ((64, 64), (16,) * 5 + (48,))),
    ],
)
def test_runs_are_filled_up_and_the_padded_form_says_the_same(lengths, filled):
    rng = np.random.default_rng(0)
    rows = [
        [Example(rng.integers(1, 9, size=n).astype(np.int32), np.arange(n) > 1) for n in own]
        for own in lengths
    ]
    parts = [collate(own) for own in rows]
    b = merge(parts)
    assert b.lengths == filled and b.n_loss == sum(p.n_loss for p in parts)
    assert b.tokens_N == tuple(map(sum, lengths))
    tokens, positions, targets, weight = padded(b)
    most = max(map(len, lengths))  # filler is left out; a run with fewer rows gets empty ones
    expected = [n for own in lengths for n in (*own, *[0] * (most - len(own)))]
    assert [int((row > 0).sum()) for row in tokens] == expected and weight.sum() == b.n_loss
    row_of, column = np.nonzero(weight)
    assert list(tokens[row_of, positions[row_of, column] + 1]) == list(targets[row_of, column])


def test_skills_have_right_answers():
    right = {"reverse": lambda s: s[::-1], "sort": lambda s: "".join(sorted(s))}
    rng = stream("test")
    for _ in range(300):
        prompt, answer = skills.instance(rng, 2)
        name, _, rest = prompt[:-1].partition(" ")
        if name in right:
            assert answer == right[name](rest)
        elif "+" in prompt:
            assert int(answer) == sum(map(int, prompt[:-1].split("+")))
        assert set(prompt + answer) <= set(skills.ALPHABET)


CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "héllo"}]}
FORMS = (
    CHAT,
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "héllo"}]},
    {"question": "Hi", "answer": "héllo", "id": 3},
    {"instruction": "Hi", "output": "héllo"},
    {"instruction": "Say", "input": "Hi", "output": "héllo"},
    {"instruction": "Say", "input": "Hi", "response": "héllo"},
    {"prompt": "Hi", "completion": "héllo"},
)


@pytest.mark.parametrize("row", FORMS, ids=lambda row: "-".join(row))
def test_the_usual_forms_are_read_and_counted(tmp_path, row):
    given = str(write_json(tmp_path / "train.jsonl", [row, row]))
    spec = own.dataset_of(given)
    check_available(spec, ["."])
    assert spec.problem is None and own.dataset_of(str(tmp_path)) == spec
    counted = own.count(given)
    assert (counted.rows, counted.answer_bytes) == (2, 2 * len("héllo".encode()))
    assert spec.revision == f"sha256:train={counted.sha256[: own.DIGITS]}"


def test_an_instruction_has_its_input_if_there_is_one(tmp_path):
    rows = [{"instruction": "Say.", "input": text, "output": "héllo"} for text in ("Hi", "")]
    spec = own.dataset_of(str(write_json(tmp_path / "train.jsonl", rows)))

    def prompt(spec, row):
        return messages.read(spec, row, "").turns[0]["content"]

    assert [prompt(spec, row) for row in rows] == ["Say.\n\nHi\n", "Say.\n"]
    spec = own.dataset_of(str(tmp_path), named={"prompt_field": "instruction"})
    assert prompt(spec, rows[0]) == "Say.\n"
    both = dataclasses.replace(spec, prompt_field="instruction+input")
    with pytest.raises(DataError, match="no field 'input', only instruction, output"):
        prompt(both, {"instruction": "Say.", "output": "héllo"})


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    path = write_json(tmp_path / "train.jsonl", [CHAT])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert own.count(str(path)).rows == 1


def test_held_out_rows_are_those_beside_it(tmp_path):
    given = str(write_json(tmp_path / "support.jsonl", [CHAT]))
    alone = own.dataset_of(given)
    assert (alone.train_split, alone.test_split) == ("support", "support")
    assert alone.name.startswith("support-")
    write_json(tmp_path / "test.jsonl", [CHAT])
    assert own.dataset_of(given).test_split == "test"
    write_json(tmp_path / "support.jsonl", [CHAT, CHAT])
    assert own.dataset_of(given).name != alone.name


ANSWERED = [{"question": f"So? {k}", "answer": f"1,\n{k}", "id": str(k)} for k in range(3)]


def written(folder, form, rows=ANSWERED):
    """The same rows in a file of each form, written by pandas."""
    path = folder / f"rows.{form}"
    frame = pd.DataFrame(rows)
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
    spec = own.dataset_of(str(path))
    assert (spec.source, spec.prompt_field, spec.completion_field) == (form, "question", "answer")
    source, _ = data.sources_of(spec, ["."])
    assert [row for _, row in source.rows()] == ANSWERED
    assert source.identity == hashlib.sha256(path.read_bytes()).hexdigest()
    assert own.count(str(path)).answer_bytes == 12
    check_available(spec, ["."])
    elsewhere = tmp_path / "b"  # a file of the same name and another content, looked at first
    elsewhere.mkdir()
    written(elsewhere, form, ANSWERED[:2])
    there = dataclasses.replace(spec, location=".")
    assert data.sources_of(there, [str(elsewhere), str(tmp_path)])[0].identity == source.identity
    with pytest.raises(DataError, match="the revision pins"):
        data.sources_of(there, [str(elsewhere)])


def test_columns_can_be_named(tmp_path):
    given = str(write_json(tmp_path / "a.jsonl", [{"q": "a", "a": "b", "output": "c", **CHAT}]))
    for named in ({"prompt_field": "q"}, {"prompt_field": "q", "completion_field": "a"}):
        spec = own.dataset_of(given, named=named)
        assert (spec.prompt_field, spec.completion_field) == (
            "q",
            named.get("completion_field", "output"),
        )
    assert own.dataset_of(given).format == "messages"
    with pytest.raises(DataError, match="two columns: no and completion, no and response"):
        own.dataset_of(given, named={"prompt_field": "no"})


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
        tokenizer = Counting()
        if eos is not None:
            tokenizer.eos_token_id = eos
        given = dataclasses.replace(spec, **changes)
        folder = str(tmp_path / "cache") if cache else ""
        return data.load(given, [str(tmp_path)], tokenizer, folder), tokenizer.texts

    write()
    load.write, load.cache = write, tmp_path / "cache"
    return load


def seen(loaded):
    return [(e.tokens.tolist(), e.loss.tolist(), e.n_bytes) for e in loaded.train(3, 0, 700)]


def test_a_second_worker_tokenizes_nothing_and_sees_the_same_rows(world):
    alone, n = world(cache=False)
    first, n_first = world()
    again, n_again = world()
    assert (n, n_first, n_again) == (2 * 608, 2 * 608, 0)
    assert seen(alone) == seen(first) == seen(again)
    assert alone.sha256 == first.sha256 == again.sha256
    assert not again.train(0, 0, 1)[0].tokens.flags.writeable  # it is mapped


@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "head"])
def test_a_damaged_file_is_made_again(world, damage):
    whole, _ = world()
    path = max(world.cache.glob("*.rows"), key=lambda p: p.stat().st_size)
    good = path.read_bytes()
    bad = {
        "cut": good[:-7],
        "empty": b"",
        "changed": good[:-3] + bytes([good[-3] ^ 1]) + good[-2:],
        "head": b"{" + good[1 : rows.HEADER - 1] + b"x" + good[rows.HEADER :],
    }
    path.unlink()  # `whole` maps the old one
    path.write_bytes(bad[damage])
    assert rows.read(path) is None
    again, n = world()
    assert n == 2 * 600 and path.read_bytes() == good and seen(again) == seen(whole)


def test_other_rows_another_length_and_another_form_have_files_of_their_own(world):
    first, _ = world()
    cut, n_cut = world(max_length=23)
    few, n_few = world(n_train=10)
    ended, n_ended = world(eos=7)  # as of a base and its chat model, whose tokens are the same ones
    world.write("No")
    other, n_other = world()
    assert n_cut == n_ended == n_other == 2 * 608 and n_few == 2 * 10
    assert len({d.sha256 for d in (first, cut, few, ended, other)}) == 5
    renamed, n_renamed = world(name="yours")
    assert n_renamed == 0 and renamed.sha256 == other.sha256


def test_processes_that_need_the_same_file_at_once_make_it_once(tmp_path):
    made, start = [], threading.Barrier(4)

    def make():
        made.append(1)
        example = Example(np.arange(5, dtype=np.int32), np.arange(5) > 2, 3)
        return rows.Rows.of([example] * 100)

    def work(_):
        start.wait()
        return rows.kept(tmp_path / "a" / "x.rows", make)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(4)))
    assert len(made) == 1 and {r.sha256 for r in found} == {make().sha256}
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"x.rows", "x.lock"}

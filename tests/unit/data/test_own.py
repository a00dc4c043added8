"""Rows without a data set file: the usual forms are recognised and counted, others refused."""

import json

import pytest

from lorasweep.data import own
from lorasweep.data.load import check_available
from lorasweep.errors import DataError

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "héllo"}]}
FORMS = (
    CHAT,
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "héllo"}]},
    {"question": "Hi", "answer": "héllo", "id": 3},
    {"instruction": "Hi", "output": "héllo"},
    {"prompt": "Hi", "completion": "héllo"},
)


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("row", FORMS, ids=lambda row: next(iter(row)))
def test_the_usual_forms_are_read_and_counted(tmp_path, row):
    given = written(tmp_path / "train.jsonl", row, row)
    spec = own.dataset_of(given)
    check_available(spec, ["."])
    assert spec.problem is None and own.dataset_of(str(tmp_path)) == spec
    counted = own.count(given)
    assert (counted.rows, counted.answer_bytes) == (2, 2 * len("héllo".encode()))
    assert spec.revision == f"sha256:train={counted.sha256[: own.DIGITS]}"


def test_held_out_rows_are_those_beside_it(tmp_path):
    given = written(tmp_path / "support.jsonl", CHAT)
    alone = own.dataset_of(given)
    assert (alone.train_split, alone.test_split) == ("support", "support")
    assert alone.name.startswith("support-")
    written(tmp_path / "test.jsonl", CHAT)
    assert own.dataset_of(given).test_split == "test"
    written(tmp_path / "support.jsonl", CHAT, CHAT)
    assert own.dataset_of(given).name != alone.name


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("train.jsonl", '{"text": "a"}\n', "has the columns text. Expected messages"),
        ("train.jsonl", "3\n", "the columns of no object"),
        ("train.jsonl", "no json\n", "train.jsonl:1: not a JSON row"),
        ("train.jsonl", "\n", "has no rows"),
        ("rows.csv", "a,b\n", "does not end on .jsonl"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=says):
        own.dataset_of(str(tmp_path / name))
    with pytest.raises(DataError, match="no file"):
        own.dataset_of(str(tmp_path / "gone"))
    given = written(tmp_path / "train.jsonl", CHAT, {"prompt": "a", "completion": "b"})
    with pytest.raises(DataError, match=r"train\.jsonl:2"):
        own.count(given)

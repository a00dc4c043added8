"""Data: order, masks, padding, generators with known entropy, and rows that must be refused."""

import json

import numpy as np
import pytest

from lorasweep.data import load as data
from lorasweep.data.batches import collate, merge, padded
from lorasweep.data.examples import Example
from lorasweep.data.synthetic import skills
from lorasweep.errors import DataError
from lorasweep.spec.streams import stream
from tests.unit.data.shipped import shipped


class Letters:
    """A tokenizer of one token a byte."""

    eos_token_id, bos_token = 0, None

    def __call__(self, texts, add_special_tokens=False):
        return type("Ids", (), {"input_ids": [list(t.encode()) for t in texts]})

    def decode(self, ids, skip_special_tokens=False):
        return bytes(i for i in ids if i).decode()


def jsonl(tmp_path, rows, **changes):
    folder = tmp_path / "mine"
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        text = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows)
        (folder / f"{split}.jsonl").write_text(text + "\n")
    mine = {"name": "mine", "location": "mine", "revision": "", "template": "{prompt}|"}
    names = {"prompt_field": "prompt", "completion_field": "completion"}
    spec = shipped("gsm8k", **mine, **names, **changes)
    return data.load(spec, [str(tmp_path)], Letters())


ROWS = [{"prompt": f"p{i}", "completion": f"answer {i}"} for i in range(10)]


def test_the_loss_looks_at_the_completion_and_its_end(tmp_path):
    loaded = jsonl(tmp_path, ROWS)
    e = loaded.test[0]
    assert bytes(e.tokens[e.loss][:-1].tolist()).decode() == "answer 0" and e.tokens[-1] == 0
    assert e.n_bytes == len("answer 0")


def test_messages_train_the_assistant_only(tmp_path):
    said = ("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "no")
    row = {"messages": [{"role": role, "content": text} for role, text in said]}
    last = jsonl(tmp_path, [row], format="messages", mask="last_assistant").test[0]
    every = jsonl(tmp_path, [row], format="messages").test[0]
    assert bytes(last.tokens[last.loss].tolist()) == b"no\0"
    assert bytes(every.tokens[every.loss].tolist()) == b"yes\0no\0"


def test_order_depends_on_data_set_split_and_seed_only(tmp_path):
    a, b = jsonl(tmp_path, ROWS), jsonl(tmp_path, ROWS)

    def seen(loaded, seed, start, count):
        return [bytes(e.tokens.tolist()) for e in loaded.train(seed, start, count)]

    assert seen(a, 0, 0, 30) == seen(b, 0, 0, 15) + seen(b, 0, 15, 15)
    assert sorted(seen(a, 0, 0, 10)) == sorted(seen(a, 0, 10, 10))  # each epoch has each row once
    assert seen(a, 0, 0, 10) != seen(a, 0, 10, 10) and seen(a, 0, 0, 10) != seen(a, 1, 0, 10)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (['{"prompt": "a", "completion": "b"}', '{"prompt": '], r"train\.jsonl:2: not a JSON row"),
        ([{"prompt": "a"}], r"train\.jsonl:1: no text field 'completion'"),
        ([{"prompt": "a", "completion": 3}], r":1: no text field"),
        ([{"prompt": "p" * 600, "completion": "b"}], r":1: no token counts in the loss"),
        (["[]"], r":1: no text field"),
        ([], "no rows"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, rows, words):
    with pytest.raises(DataError, match=words):
        jsonl(tmp_path, rows)


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
    rng = stream("test")
    for _ in range(300):
        prompt, answer = skills.instance(rng, 2)
        name, _, rest = prompt.partition(" ")
        if name == "reverse":
            assert answer == rest[:-1][::-1]
        elif name == "sort":
            assert answer == "".join(sorted(rest[:-1]))
        elif "+" in prompt:
            a, b = prompt[:-1].split("+")
            assert int(answer) == int(a) + int(b)
        assert set(prompt + answer) <= set(skills.ALPHABET)


def test_streams_are_named():
    first, again, other = (stream("a", n).integers(1 << 30) for n in (1, 1, 2))
    assert first == again != other

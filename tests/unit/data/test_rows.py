"""Text is tokenized once, then mapped from a file; a damaged file is written again."""

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lorasweep.data import load as data
from lorasweep.data import rows
from lorasweep.data.examples import Example
from tests.bpe import qwen_like
from tests.unit.data.shipped import shipped


class Counting:
    """A tokenizer that counts the texts it is given."""

    texts = 0

    def __getattr__(self, name):
        return getattr(qwen_like(), name)

    def __call__(self, texts, **options):
        self.texts += len(texts)
        return qwen_like()(texts, **options)


@pytest.fixture
def world(tmp_path):
    """A data set of 600 rows; `load(...)` with a fresh tokenizer says how many texts it was given."""
    (tmp_path / "mine").mkdir()
    names = {"prompt_field": "p", "completion_field": "c", "location": "mine", "revision": ""}
    spec = shipped("gsm8k", name="mine", n_test=8, n_test_curve=8, **names)

    def write(answer="Yes"):
        lines = [json.dumps({"p": f"So? {i}", "c": answer}) for i in range(600)]
        for split in ("train", "test"):
            (tmp_path / "mine" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")

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

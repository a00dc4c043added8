"""A table of customers becomes runs: which rows are held out, which rates are tried, and what is
wrong with whom."""

import dataclasses
import json

import pytest

from lorasweep.advise.advice import Failed, Known
from lorasweep.advise.table import Row
from lorasweep.config import catalogue
from lorasweep.config.folders import conf_dir
from lorasweep.data import fields, load
from lorasweep.errors import DataError, SpecError
from lorasweep.fleet.members import (
    Setup,
    check,
    fleet_plain,
    folder_of,
    members_of,
    planned,
    rates_of,
)
from lorasweep.fleet.rows import rows_of, with_lengths
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from tests.bpe import llama_like
from tests.customers import make_base, write_rows
from tests.world import compose_request, tiny_spec


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def form():
    return compose_request(["scale=smoke"]).points[0].spec.dataset


def plan(rows, rates=3, instead="", **fields):
    spec = tiny_spec(method=LoRA(rank=16), **fields)
    setup = Setup(spec, rates, instead, lambda model: llama_like(), ["."])
    check(setup)
    known = Known(catalogue.models([conf_dir()]), catalogue.machines([conf_dir()]))
    return members_of([Row(f"row {k}", r) for k, r in enumerate(rows, 2)], known, setup)


@pytest.mark.parametrize(
    "rows, held_out, train", [(19, 0, 19), (20, 4, 12), (200, 20, 160), (3000, 128, 2744)]
)
def test_a_tenth_chooses_and_a_tenth_reports_and_of_few_rows_none(
    form, tmp_path, rows, held_out, train
):
    found = rows_of("any", str(write_rows(tmp_path / "my.jsonl", rows, "Yes {k}")), form)
    spec = found.dataset
    assert (spec.n_validation, found.n_train, found.held_out) == (held_out, train, held_out > 0)
    assert spec.holdout == 2 * held_out and spec.n_test == (held_out or rows)
    assert (spec.train_split, spec.format, spec.mask) == ("my", "prompt_completion", "completion")
    assert spec.problem is None


def test_rows_of_a_test_file_are_held_out_instead(form, tmp_path):
    write_rows(tmp_path / "train.jsonl", 7, "Yes")
    write_rows(tmp_path / "test.jsonl", 5, "No")
    found = rows_of("any", str(tmp_path), form)
    assert (found.n_train, found.dataset.n_validation, found.dataset.n_test) == (7, 2, 3)
    assert found.dataset.holdout == 0 and found.dataset.revision.count("=") == 2
    write_rows(tmp_path / "test.jsonl", 1, "No")
    with pytest.raises(DataError, match="Expected at least 2"):
        rows_of("any", str(tmp_path), form)


def split(spec):
    """What the rows say that are trained on, and the held-out ones."""
    return [
        [tuple(fields.messages_of(spec, row, where)) for where, row in source.rows()]
        for source in load.sources_of(spec, ["."])
    ]


def test_rows_that_say_the_same_are_on_one_side(form, tmp_path):
    """Some stand there up to forty times, with other columns that differ."""
    path = tmp_path / "my.jsonl"
    says = [k for k in range(40) for _ in range(40 if k == 3 else 1 + k % 3)]
    rows = [{"id": n, "prompt": f"How many? {k}", "completion": "Yes"} for n, k in enumerate(says)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = rows_of("any", str(path), form)
    train, held = split(found.dataset)
    assert found.repeated == len(rows) - 40 and found.dataset.unseen_rows
    assert len(held) == len(set(held)) == 8 == found.dataset.n_validation + found.dataset.n_test
    assert not set(train) & set(held) and len(set(train)) == 32
    assert (
        found.n_train
        == len(train)
        == sum(says.count(k) for k in range(40))
        - sum(says.count(int(said[0][1].split()[-1])) for said in held)
    )
    data = load.load(dataclasses.replace(found.dataset, max_length=64), ["."], llama_like())
    assert (data.n_train, len(data.validation), len(data.test)) == (len(train), 4, 4)
    # without repetitions nothing is different from before there was a rule for them
    plain = rows_of("any", str(write_rows(tmp_path / "plain.jsonl", 40, "Yes {k}")), form)
    assert not plain.dataset.unseen_rows and plain.repeated == 0
    # of few that differ none is held out, however often they stand there
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:6]) * 9)
    few = rows_of("any", str(path), form)
    assert not few.held_out and few.n_train == 54 and not few.dataset.unseen_rows


def test_rows_of_a_test_file_are_not_trained_on(form, tmp_path):
    write_rows(tmp_path / "train.jsonl", 9, "Yes {k}")
    write_rows(tmp_path / "test.jsonl", 8, "Yes {k}", start=5)
    with (tmp_path / "test.jsonl").open("a") as more:
        more.write((tmp_path / "test.jsonl").read_text())
    found = rows_of("any", str(tmp_path), form)
    train, held = split(found.dataset)
    assert (found.n_train, found.repeated, len(train), len(held)) == (5, 12, 5, 8)
    assert (found.dataset.n_validation, found.dataset.n_test) == (4, 4)
    (tmp_path / "train.jsonl").write_text((tmp_path / "test.jsonl").read_text())
    with pytest.raises(DataError, match="Add rows to train on"):
        rows_of("any", str(tmp_path), form)


def test_changed_rows_are_another_data_set_and_messages_are_recognised(form, tmp_path):
    path = write_rows(tmp_path / "my.jsonl", 30, "Yes")
    before = rows_of("any", str(path), form).dataset
    assert rows_of("any", str(path), form).dataset == before
    write_rows(path, 30, "No")
    assert rows_of("any", str(path), form).dataset.canonical != before.canonical
    said = [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "No"}]
    path.write_text(json.dumps({"messages": said}) + "\n")
    found = rows_of("any", str(path), form).dataset
    assert (found.format, found.mask) == ("messages", "last_assistant")


def test_the_longest_row_is_the_length_and_none_is_cut(form, tmp_path):
    path = write_rows(tmp_path / "my.jsonl", 30, "Yes " * 70)
    rows, tokens = with_lengths(rows_of("any", str(path), form), llama_like(), None, ["."])
    longest = max(len(llama_like()(f"How many? {k}\n" + "Yes " * 70).input_ids) for k in range(30))
    assert longest - 1 <= rows.dataset.max_length <= 4 * longest
    assert 0.4 * rows.dataset.max_length >= 0.5 * tokens
    stated, _ = with_lengths(rows_of("any", str(path), form), llama_like(), 48, ["."])
    assert stated.dataset.max_length == 48


def test_one_name_one_folder_whatever_the_name(tmp_path):
    names = [
        "acme",
        "Acme",
        "ACME",
        "../../etc",
        "a/b",
        "a b",
        "<script>",
        "",
        "é",
        "x" * 300,
        "..",
        "\ud800",
    ]
    folders = [folder_of(n) for n in names]
    assert len(set(folders)) == len(names) and folders[0] == "acme"
    for folder in folders:
        (tmp_path / folder).mkdir()
        assert (tmp_path / folder).parent == tmp_path and len(folder) <= 64 and folder.islower()


def test_rates_are_advised_or_a_number():
    assert [rates_of(v) for v in ("advised", 1, 3, 9)] == [1, 1, 3, 9]
    with pytest.raises(SpecError, match="advised"):
        rates_of("many")
    for rates in (0, 2, 10, -3):
        with pytest.raises(SpecError, match="3 to 9"):
            plan([], rates=rates)


def test_customers_become_runs_and_wrong_ones_stop_no_other(base, tmp_path):
    good = write_rows(tmp_path / "good.jsonl", 40, "Yes {k}")
    few = write_rows(tmp_path / "few.jsonl", 4, "Yes {k}")
    no_loss = write_rows(tmp_path / "silent.jsonl", 40, "Yes {k}", question="How many? " * 40)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "a"}) + "\n")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    row = {"model": str(base / "config.json"), "task": "sft"}
    found = plan(
        [
            {"name": "good", **row, "data": str(good), "epochs": 4},
            {"name": "few", **row, "data": str(few)},
            {"name": "good", **row, "data": str(good)},
            {"name": "silent", **row, "data": str(no_loss), "max_length": 16},
            {"name": "other", **row, "data": str(other)},
            {"name": "empty", **row, "data": str(empty)},
            {"name": "gone", **row, "data": str(tmp_path / "gone")},
            {"name": "rewarded", **row, "task": "rl", "data": str(good)},
            {"name": "dataless", **row},
            {"name": "baseless", "model": "gpt-9", "task": "sft", "data": str(good)},
        ]
    )
    member, small = found[:2]
    assert [p.spec.lr for p in member.points] == pytest.approx(
        [member.points[1].spec.lr / 3, member.points[1].spec.lr, 3 * member.points[1].spec.lr],
        rel=0.01,
    )
    spec = member.points[0].spec
    assert (spec.batch_size, spec.steps) == (8, 16) and spec.dataset.n_validation == 4
    assert spec.method.rank == member.advised.rank and spec.method.alpha == 32
    assert len(small.points) == 1 and not small.rows.held_out
    wrong = [f.error for f in found[2:]]
    assert all(isinstance(f, Failed) for f in found[2:])
    for text, says in zip(
        wrong,
        [
            "stands in the table before",
            "no rows",
            "has the columns text",
            "has no rows",
            "no file",
            "not by rl",
            "data: missing",
            "'gpt-9' not found",
        ],
        strict=True,
    ):
        assert says in text, text
    (one,) = plan([{"name": "good", **row, "data": str(good)}], rates=1)
    assert len(one.points) == 1


def test_early_stopping_is_left_out_where_it_could_do_nothing_and_survives_json(base, tmp_path):
    row = {"model": str(base / "config.json"), "task": "sft"}
    table = [
        {"name": name, **row, "data": str(write_rows(tmp_path / f"{name}.jsonl", n, "Yes {k}"))}
        | more
        for name, n, more in (
            ("good", 40, {"epochs": 4}),
            ("few", 4, {}),
            ("short", 40, {"steps": 3}),
            ("wrong", 40, {"task": "rl"}),
        )
    ]
    found = plan(table, early_stopping=2)
    good, few, short, _ = found
    assert {p.spec.early_stopping for p in good.points} == {2} and not good.not_early
    assert {p.spec.early_stopping for m in (few, short) for p in m.points} == {0}
    assert "4 are the fewest" in few.not_early and "3 updates" in short.not_early
    values = json.loads(json.dumps(fleet_plain(found)))
    runs = [p for m in found[:3] for p in m.points]
    assert planned(values, runs) == found
    with pytest.raises(SpecError, match="early_stopping=-1"):
        plan(table, early_stopping=-1)


def test_full_is_an_error_unless_lora_is_asked_for(base, tmp_path):
    data = write_rows(tmp_path / "my.jsonl", 300, "Yes {k}")
    row = {"name": "big", "model": str(base / "config.json"), "task": "sft", "data": str(data)}
    row["bits_per_token"] = 20
    (refused,) = plan([row])
    assert "the adviser says full" in refused.error and "instead_of_full=lora" in refused.error
    (asked,) = plan([row], instead="lora")
    assert asked.advised.method == "full" and asked.points[0].spec.method.name == "lora"
    with pytest.raises(SpecError, match="Allowed: lora"):
        plan([row], instead="yes")


def test_other_methods_and_objectives_are_refused():
    spec = tiny_spec(method=FullFT())
    with pytest.raises(SpecError, match="method=lora"):
        check(Setup(spec, 3, "", lambda model: None, []))

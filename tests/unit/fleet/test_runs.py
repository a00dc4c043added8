"""Customers become runs: which learning rates are tried, and what is wrong with whom."""

import dataclasses
import json
from pathlib import Path

import pytest

from lorasweep.advise.read import check_rows
from lorasweep.errors import SpecError
from lorasweep.fleet.rows import Rules
from lorasweep.fleet.runs import RULES, build_runs, folder_of, planned, read_rules, write_rules
from lorasweep.methods.lora import LoRA
from lorasweep.sweep.grid import Point
from tests.customers import make_base, write_json, write_rows
from tests.small_hub import llama_like
from tests.unit.advise.world import known
from tests.world import ROOT, compose_request, tiny_spec


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    """The columns that all customers share: a small base, and the task."""
    base = make_base(tmp_path_factory.mktemp("base"))
    return {"model": str(base / "config.json"), "task": "sft"}


@pytest.fixture
def data(tmp_path):
    """Write so many rows with a name; returns the columns name and data."""

    def write(name, count):
        path = write_rows(tmp_path / f"{name}.jsonl", count, "Yes {k}")
        return {"name": name, "data": str(path)}

    return write


def runs_of(customers, request, rules, world=None):
    return build_runs(customers, world or known(None), request, rules, lambda model: llama_like())


def plan(rows, rates=3, instead_of_full="", world=None, **fields):
    point = Point("lora", tiny_spec(**{"method": LoRA(rank=16), **fields}))
    asked = {"points": [point], "rates": rates, "instead_of_full": instead_of_full}
    customers = check_rows([(f"row {k}", r) for k, r in enumerate(rows, 2)])
    return runs_of(customers, dataclasses.replace(compose_request([]), **asked), Rules(), world)


def test_one_name_one_folder_whatever_the_name(tmp_path):
    names = ["acme", "Acme", "ACME", "../../etc", "a/b", "a b", "<script>", "", "é", "x" * 300]
    names += ["..", "\ud800"]
    folders = [folder_of(n) for n in names]
    assert len(set(folders)) == len(names) and folders[0] == "acme"
    for folder in folders:
        (tmp_path / folder).mkdir()
        assert (tmp_path / folder).parent == tmp_path and len(folder) <= 64 and folder.islower()


def test_a_customer_becomes_a_run_for_each_learning_rate(row, data):
    good, few = {**row, **data("good", 40)}, {**row, **data("few", 4)}
    member, small = plan([{**good, "epochs": 4}, few])
    low, middle, high = (p.spec.lr for p in member.points)
    assert [low, high] == pytest.approx([middle / 3, 3 * middle], rel=0.01)
    spec = member.points[0].spec
    assert (spec.batch_size, spec.steps) == (8, 16) and spec.dataset.n_validation == 4
    assert spec.method.rank == member.advised["rank"] and spec.method.alpha == 32
    assert len(small.points) == 1 and not small.rows.held_out
    assert [len(m.points) for m in plan([good], rates=1)] == [1]


WRONG = {  # columns beside those of a good customer -> the problem
    "no rows": {"data": "silent.jsonl", "max_length": 16},
    "has the columns text": {"data": "other.jsonl"},
    "no token counts in the loss": {"data": "unlearned.jsonl"},
    "brackets.jsonl:41: not a JSON row": {"data": "brackets.jsonl"},
    "digits.jsonl:41: not a JSON row": {"data": "digits.jsonl"},
    "training rows. Set the column max_length to": {"data": "long.jsonl", "max_length": 64},
    "has no rows": {"data": "empty.jsonl"},
    "is no file": {"data": "gone"},
    "not by rl": {"task": "rl"},
    "data: missing": {"data": ""},
    "column validation: only with data": {"data": "", "validation": "a.jsonl"},
    "column validation: gone.jsonl is no other file beside good": {"validation": "gone.jsonl"},
    "column model: model 'gone' not found": {"model": "gone"},
    "the adviser says full": {"data": "big.jsonl", "bits_per_token": 20},
}


def test_a_wrong_customer_affects_no_other(row, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "silent.jsonl", 40, "Yes {k}", question="How many? " * 40)
    write_rows(tmp_path / "long.jsonl", 40, "Yes " * 99)
    write_rows(tmp_path / "big.jsonl", 300, "Yes {k}")
    write_json(tmp_path / "other.jsonl", [{"text": "a"}])
    write_json(tmp_path / "empty.jsonl", [])
    answer = {"role": "assistant", "content": "Yes", "weight": 0}
    said = [[{"role": "user", "content": f"So? {k}"}, answer] for k in range(40)]
    write_json(tmp_path / "unlearned.jsonl", [{"messages": messages} for messages in said])
    for name, odd in (("brackets", "[" * 100_000), ("digits", "9" * 5000)):
        path = write_rows(tmp_path / f"{name}.jsonl", 40, "Yes {k}")
        path.write_text(path.read_text() + odd + "\n")
    good = {**row, **data("good", 40)}
    first, *found = plan([good, *({**good, "name": k, **WRONG[k]} for k in WRONG)])
    assert len(first.points) == 3 and not first.problem
    for k, (says, wrong) in enumerate(zip(WRONG, found, strict=True)):
        assert says in wrong.problem and wrong.problem.startswith(f"row {k + 3}: ")
        assert not wrong.points
    (asked,) = plan([{**good, **WRONG["the adviser says full"]}], instead_of_full="lora")
    assert asked.advised["method"] == "full" and asked.points[0].spec.method.name == "lora"


def test_early_stopping_is_left_out_where_it_could_do_nothing_and_survives_json(row, data):
    table = [data("good", 40) | {"epochs": 4}, data("few", 4), data("short", 40) | {"steps": 3}]
    table.append(data("wrong", 40) | {"task": "rl"})
    found = plan([{**row, **columns} for columns in table], early_stopping=2)
    good, few, short, _ = found
    assert {p.spec.early_stopping for p in good.points} == {2} and not good.not_early
    assert {p.spec.early_stopping for m in (few, short) for p in m.points} == {0}
    assert "4 are the fewest" in few.not_early and "3 updates" in short.not_early
    values = json.loads(json.dumps([m.plain() for m in found]))
    assert planned(values, [p for m in found for p in m.points]) == found


def test_a_base_of_more_than_one_gpu_is_its_customers_error(row, data):
    small = {**row, **data("small", 40)}
    on_h100 = dataclasses.replace(known(None), hardware=known(None).machines["h100"]())
    large = {**small, "name": "large", "model": "llama-3.1-70b"}
    fits, refused = plan([small, large], world=on_h100, precision="bf16")
    assert fits.points and "llama-3.1-70b takes" in refused.problem


GOLDEN = json.loads((ROOT / "tests/golden/fleet_ids.json").read_text())


@pytest.fixture
def customers(tmp_path, monkeypatch):
    """The table whose runs GOLDEN names."""
    monkeypatch.chdir(tmp_path)
    write_rows(Path("ann.jsonl"), 40, "357 in all {k}")
    prompts = [f"Is it late? {k % 40}" for k in range(200)]
    shared = [{"prompt": p, "completion": f"No! {k}"} for k, p in enumerate(prompts)]
    write_json(Path("bob.jsonl"), shared)
    write_rows(Path("own/train.jsonl"), 30, "Yes {k}")
    write_rows(Path("own/test.jsonl"), 9, "Yes {k}", start=100)
    turns = [(("user", f"So? {k}"), ("assistant", f"No {k}")) for k in range(25)]
    chats = [[{"role": role, "content": text} for role, text in t] for t in turns]
    write_json(Path("chat.jsonl"), [{"messages": chat} for chat in chats])
    write_rows(Path("few.jsonl"), 5, "Yes {k}")
    row = {"model": "smollm2-135m", "task": "sft", "epochs": 2}
    data = {n: f"{n}.jsonl" for n in ("ann", "bob", "chat", "few")} | {"own": "own"}
    return check_rows([(n, {"name": n, "data": d, **row}) for n, d in data.items()])


@pytest.mark.parametrize("scale", ["tiny", "small", "paper"])
@pytest.mark.parametrize("kind", GOLDEN)
def test_runs_keep_their_ids(customers, scale, kind):
    """By the rules of new fleets, and of those whose folder says less; at every scale the same."""
    rules = Rules(answers="all", whole_prompt=True) if kind == "new" else Rules()
    options = ["action=fleet", "customers=c.csv", f"scale={scale}", "precision=fp32"]
    found = runs_of(customers, compose_request(options), rules)
    assert {m.name: [p.id for p in m.points] for m in found} == GOLDEN[kind]


def test_the_rules_are_kept_in_the_folder_and_earlier_ones_said_less(tmp_path):
    earlier = {"template": None, "render": None, "mask": None, "split": "prompt", "layers": "all"}
    for rules in (Rules(answers="all"), Rules(serve="vllm")):
        write_rules(tmp_path, rules)
        assert read_rules(tmp_path) == rules
    (tmp_path / RULES).write_text(json.dumps(earlier))
    assert read_rules(tmp_path) == Rules() and (Rules().answers, Rules().serve) == ("last", "peft")
    for odd in ({"answers": "some"}, {"split": "row"}, {"split": "coin"}, {"render": "role_eos"}):
        (tmp_path / RULES).write_text(json.dumps(earlier | odd))
        with pytest.raises(SpecError, match="is not known"):
            read_rules(tmp_path)

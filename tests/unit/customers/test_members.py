"""A table of customers becomes runs: which rows are held out, which rates are tried, and what is
wrong with whom."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest

from lorasweep.config import catalogue
from lorasweep.config.folders import conf_dir
from lorasweep.customers.evidence import Known
from lorasweep.customers.read import Row, check_rows
from lorasweep.customers.rows import BY_ROW, Rules, rows_of, with_lengths
from lorasweep.customers.runs import Setup, build_runs, folder_of, planned
from lorasweep.data import fields, load
from lorasweep.errors import DataError, SpecError
from lorasweep.methods.fullft import FullFT
from lorasweep.methods.lora import LoRA
from lorasweep.plan.gpu.forecast import Forecaster
from tests.bpe import llama_like
from tests.customers import make_base, write_rows
from tests.world import compose_request, tiny_spec


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def read(path, rules=None, tokenizer=None):
    """A customer's rows, by today's rules unless others are named."""
    return rows_of("any", str(path), rules or Rules(), tokenizer or llama_like())


def plan(rows, rates=3, instead="", rules=None, planner=None, **fields):
    spec = tiny_spec(method=LoRA(rank=16), **fields)
    setup = Setup(
        spec, rates, instead, lambda model: llama_like(), ["."], planner, rules or Rules()
    )
    known = Known(catalogue.models([conf_dir()]), catalogue.machines([conf_dir()]))
    customers = check_rows([Row(f"row {k}", r) for k, r in enumerate(rows, 2)])
    return build_runs(customers, known, setup)


@pytest.mark.parametrize(
    "rows, held_out, train", [(19, 0, 19), (20, 4, 12), (200, 20, 160), (3000, 128, 2744)]
)
def test_a_tenth_chooses_and_a_tenth_reports_and_of_few_rows_none(tmp_path, rows, held_out, train):
    found = read(write_rows(tmp_path / "my.jsonl", rows, "Yes {k}"))
    spec = found.dataset
    assert (spec.n_validation, found.n_train, found.held_out) == (held_out, train, held_out > 0)
    assert spec.holdout == 2 * held_out and spec.n_test == (held_out or rows)
    assert (spec.train_split, spec.format, spec.mask) == ("my", "prompt_completion", "completion")
    assert spec.problem is None


def test_rows_of_a_test_file_are_held_out_instead(tmp_path):
    write_rows(tmp_path / "train.jsonl", 7, "Yes")
    write_rows(tmp_path / "test.jsonl", 5, "No")
    found = read(tmp_path)
    assert (found.n_train, found.dataset.n_validation, found.dataset.n_test) == (7, 2, 3)
    assert found.dataset.holdout == 0 and found.dataset.revision.count("=") == 2
    write_rows(tmp_path / "test.jsonl", 1, "No")
    with pytest.raises(DataError, match="Expected at least 2"):
        read(tmp_path)


def split(spec):
    """What the rows say that are trained on, and the held-out ones."""
    return [
        [tuple(fields.messages_of(spec, row, where)) for where, row in source.rows()]
        for source in load.sources_of(spec, ["."])
    ]


def test_rows_that_say_the_same_are_on_one_side(tmp_path):
    """Some stand there up to forty times, with other columns that differ."""
    path = tmp_path / "my.jsonl"
    says = [k for k in range(40) for _ in range(40 if k == 3 else 1 + k % 3)]
    rows = [{"id": n, "prompt": f"How many? {k}", "completion": "Yes"} for n, k in enumerate(says)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read(path)
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
    plain = read(write_rows(tmp_path / "plain.jsonl", 40, "Yes {k}"))
    assert not plain.dataset.unseen_rows and plain.repeated == 0
    # of few that differ none is held out, however often they stand there
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:6]) * 9)
    few = read(path)
    assert not few.held_out and few.n_train == 54 and not few.dataset.unseen_rows


def test_rows_of_a_test_file_are_not_trained_on(tmp_path):
    write_rows(tmp_path / "train.jsonl", 9, "Yes {k}")
    write_rows(tmp_path / "test.jsonl", 8, "Yes {k}", start=5)
    with (tmp_path / "test.jsonl").open("a") as more:
        more.write((tmp_path / "test.jsonl").read_text())
    found = read(tmp_path)
    train, held = split(found.dataset)
    assert (found.n_train, found.repeated, len(train), len(held)) == (5, 12, 5, 8)
    assert (found.dataset.n_validation, found.dataset.n_test) == (4, 4)
    (tmp_path / "train.jsonl").write_text((tmp_path / "test.jsonl").read_text())
    with pytest.raises(DataError, match="Add rows to train on"):
        read(tmp_path)


def test_changed_rows_are_another_data_set_and_messages_are_recognised(tmp_path):
    path = write_rows(tmp_path / "my.jsonl", 30, "Yes")
    before = read(path).dataset
    assert read(path).dataset == before
    write_rows(path, 30, "No")
    assert read(path).dataset.canonical != before.canonical
    said = [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "No"}]
    path.write_text(json.dumps({"messages": said}) + "\n")
    found = read(path).dataset
    assert (found.format, found.mask) == ("messages", "last_assistant")


def test_the_longest_row_is_the_length_and_none_is_cut(tmp_path):
    path = write_rows(tmp_path / "my.jsonl", 30, "Yes " * 70)
    rows, tokens = with_lengths(read(path), llama_like(), None, ["."])
    longest = max(len(llama_like()(f"How many? {k}\n" + "Yes " * 70).input_ids) for k in range(30))
    assert longest - 1 <= rows.dataset.max_length <= 4 * longest
    assert 0.4 * rows.dataset.max_length >= 0.5 * tokens
    stated, _ = with_lengths(read(path), llama_like(), 48, ["."])
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


def test_one_learning_rate_is_tried_or_three_to_nine():
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
    wrong = [f.problem for f in found[2:]]
    for text, says in zip(
        wrong,
        [
            "used by an earlier row",
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
    values = json.loads(json.dumps([m.plain() for m in found]))
    runs = [p for m in found[:3] for p in m.points]
    assert planned(values, runs) == found
    with pytest.raises(SpecError, match="early_stopping=-1"):
        plan(table, early_stopping=-1)


def test_full_is_an_error_unless_lora_is_asked_for(base, tmp_path):
    data = write_rows(tmp_path / "my.jsonl", 300, "Yes {k}")
    row = {"name": "big", "model": str(base / "config.json"), "task": "sft", "data": str(data)}
    row["bits_per_token"] = 20
    (refused,) = plan([row])
    assert "the adviser says full" in refused.problem and "instead_of_full=lora" in refused.problem
    (asked,) = plan([row], instead="lora")
    assert asked.advised.method == "full" and asked.points[0].spec.method.name == "lora"
    with pytest.raises(SpecError, match="Allowed: lora"):
        plan([row], instead="yes")


def test_other_methods_and_objectives_are_refused():
    spec = tiny_spec(method=FullFT())
    with pytest.raises(SpecError, match="method=lora"):
        Setup(spec, 3, "", lambda model: None, [])


GOLDEN = json.loads((Path(__file__).parents[2] / "golden/fleet_ids.json").read_text())


def customers_of_then():
    """The table whose runs GOLDEN names: it was written by the code from before folders kept rules.

    Forty rows, two hundred that share forty prompts, a test file, conversations, and few rows.
    """
    write_rows(Path("ann.jsonl"), 40, "357 in all {k}")
    rows = [{"prompt": f"Is it late? {k % 40}", "completion": f"No! {k}"} for k in range(200)]
    Path("bob.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    write_rows(Path("own/train.jsonl"), 30, "Yes {k}")
    write_rows(Path("own/test.jsonl"), 9, "Yes {k}", start=100)
    turns = [
        [{"role": "user", "content": f"So? {k}"}, {"role": "assistant", "content": f"No {k}"}]
        for k in range(25)
    ]
    Path("chat.jsonl").write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    write_rows(Path("few.jsonl"), 5, "Yes {k}")
    row = {"model": "smollm2-135m", "task": "sft", "epochs": 2}
    data = {n: f"{n}.jsonl" for n in ("ann", "bob", "chat", "few")} | {"own": "own"}
    return [Row(n, {"name": n, "data": d, **row}) for n, d in data.items()]


def ids(scale, rules):
    options = ["action=fleet", "customers=c.csv", f"scale={scale}", "precision=fp32"]
    spec = compose_request(options).points[0].spec
    setup = Setup(spec, 3, "", lambda model: llama_like(), ["."], rules=rules)
    known = Known(catalogue.models([conf_dir()]), catalogue.machines([conf_dir()]))
    found = build_runs(check_rows(customers_of_then()), known, setup)
    return {f"{scale}/{m.name}": [p.id for p in m.points] for m in found}


THEN = {
    "tiny": ("{prompt}\n", "role_eos"),
    "small": ("Question: {prompt}\nAnswer: ", "role_eos"),
    "paper": ("{prompt}\n", "role_colon"),
}
"""The form of a prompt by scale, before it was the same at all of them."""


def test_runs_by_the_rules_of_then_have_the_ids_of_then(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {}
    for scale, (template, render) in THEN.items():
        found |= ids(scale, Rules(template, render, split=BY_ROW))
    assert found == GOLDEN


def test_by_todays_rules_only_what_they_concern_has_another_id(tmp_path, monkeypatch):
    """At scale tiny the plain form was that of then; rows that share prompts, and those of a test
    file, are divided in another way."""
    monkeypatch.chdir(tmp_path)
    found = ids("tiny", Rules())
    changed = {name for name in found if found[name] != GOLDEN[name]}
    assert changed == {"tiny/bob", "tiny/own"}
    for scale in ("small", "paper"):  # batch, updates and rate are the customer's
        assert list(ids(scale, Rules()).values()) == list(found.values())


def sides(spec):
    """The prompts of the training, validation and test rows, as they are loaded."""
    data = load.load(dataclasses.replace(spec, max_length=64), ["."], llama_like())
    parts = (data.train(0, 0, data.n_train), data.validation, data.test)
    return [[llama_like().decode(e.tokens[~e.loss]) for e in part] for part in parts]


def test_no_prompt_is_on_two_sides(tmp_path):
    """Two hundred rows of forty questions, each with five answers: by rows, all of the held-out
    questions were trained on."""
    rows = [{"prompt": f"How many? {k % 40}", "completion": f"Yes {k}"} for k in range(200)]
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read(path)
    train, validation, test = sides(found.dataset)
    assert (len(train), len(validation), len(test)) == (160, 20, 20)
    assert [len(set(part)) for part in (train, validation, test)] == [32, 4, 4]
    assert len({*train, *validation, *test}) == 40
    assert (found.n_train, found.same_prompt, found.shared) == (160, 160, False)
    by_row = read(path, Rules(split=BY_ROW))
    assert by_row.shared and not {*sides(by_row.dataset)[2]} - {*sides(by_row.dataset)[0]}


def test_a_prompt_with_many_answers_is_held_out_as_a_whole_and_counts_with_a_few(tmp_path):
    counts = [100 if k % 7 == 0 else 1 + k % 3 for k in range(60)]
    rows = [
        {"prompt": f"How many? {k}", "completion": f"Yes {n}"}
        for k, count in enumerate(counts)
        for n in range(count)
    ]
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read(path)
    train, validation, test = sides(found.dataset)
    held = {*validation, *test}
    assert not set(train) & held and not set(validation) & set(test)
    assert len(train) == len(rows) - sum(counts[int(p.split()[-1])] for p in held)
    assert max(map([*validation, *test].count, held)) == load.OF_A_PROMPT
    assert len(set(validation)) == len(set(test)) == 6


def test_where_prompts_are_too_few_rows_are_divided_and_that_is_said(tmp_path):
    rows = [{"prompt": "Write a note.", "completion": f"Yes {k}"} for k in range(100)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read(path)
    assert (found.n_train, found.dataset.n_test, found.dataset.held_out_by) == (80, 10, "row")
    assert found.shared and found.same_prompt == 99
    write_rows(tmp_path / "test.jsonl", 30, "No {k}", question="Write a note.")
    found = read(tmp_path)
    assert (found.n_train, found.dataset.n_validation, found.dataset.n_test) == (100, 15, 15)
    assert found.shared and found.left_out == 0


def test_a_test_file_sorted_by_topic_chooses_and_reports_on_the_same_topics_and_is_capped(tmp_path):
    write_rows(tmp_path / "train.jsonl", 50, "Yes", question="How many? {k}")
    both = [
        {"prompt": f"{topic} {k}", "completion": "No"}
        for topic in ("Is it late?", "So?")
        for k in range(400)
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in both))
    found = read(tmp_path)
    train, validation, test = sides(found.dataset)
    assert (len(train), len(validation), len(test)) == (50, 128, 128)
    for part in (validation, test):
        assert 40 < sum(prompt.startswith("So?") for prompt in part) < 90
    assert not set(validation) & set(test)


def test_training_rows_with_the_prompt_of_a_test_row_are_left_out(tmp_path):
    write_rows(tmp_path / "train.jsonl", 50, "Yes")
    write_rows(tmp_path / "test.jsonl", 30, "No", start=40)
    found = read(tmp_path)
    train, validation, test = sides(found.dataset)
    assert not set(train) & {*validation, *test} and len(train) == 40 == found.n_train
    assert (found.left_out, found.same_prompt, found.shared) == (10, 10, False)


def turns(*said, weights=()):
    roles = ("user", "assistant")
    found = [{"role": roles[k % 2], "content": text} for k, text in enumerate(said)]
    return {
        "messages": [
            {**m, **({"weight": w} if w is not None else {})}
            for m, w in zip(found, weights or [None] * len(found))
        ]
    }


def test_the_prompt_of_a_conversation_is_what_stands_before_the_first_learned_answer(tmp_path):
    """With the last answer in the loss that is all before it: rows with one first question and
    another last one share nothing that is learned. With all answers it is the first question."""
    rows = [turns("So?", "Yes", f"How many? {k % 40}", f"No {k}") for k in range(200)]
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    by_last = read(path)
    assert (by_last.same_prompt, by_last.n_train, by_last.shared) == (160, 160, False)
    assert read(path, Rules(mask="completion")).same_prompt == 199
    rows = [
        turns("So?", "Yes", f"Is it late? {k}", "No", weights=(None, k % 2, None, None))
        for k in range(100)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(path).same_prompt == 49  # of those whose first answer is learned


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


def test_the_form_is_the_bases_chat_template_else_plain_unless_it_is_named(tmp_path):
    path = write_rows(tmp_path / "my.jsonl", 30, "Yes {k}")
    plain, chat = llama_like(), copy.deepcopy(llama_like())
    chat.chat_template = CHAT
    eos = plain.eos_token

    def shown(tokenizer, rules=None, data=path):
        found, _ = with_lengths(read(data, rules, tokenizer), tokenizer, None, ["."])
        return "".join(
            f"[{text}]" if learned else text for text, learned in found.example
        ), found.end

    assert shown(plain) == (f"{{prompt}}\n[{{completion}}{eos}]", eos)
    assert shown(chat) == (f"<user>{{prompt}}{eos}<assistant>[{{completion}}{eos}]", eos)
    named = Rules("Question: {prompt}\nAnswer: ", "role_eos")
    assert shown(chat, named) == (f"Question: {{prompt}}\nAnswer: [{{completion}}{eos}]", eos)
    colon = Rules("{prompt}", "role_colon")
    bos = plain.bos_token
    assert shown(chat, colon) == (
        f"{bos}User: {{prompt}}\n\nAssistant:[ {{completion}}\n\nUser:]",
        "\n\nUser:",
    )
    said = turns("So?", "secret", "How many?", "No", weights=(None, 0, None, None))
    other = tmp_path / "chat.jsonl"
    other.write_text(f"{json.dumps(said)}\n" * 30)
    assert shown(chat, Rules(mask="completion"), other)[0] == (
        f"<user>{{user 1}}{eos}<assistant>{{assistant 1}}{eos}<user>{{user 2}}{eos}<assistant>"
        f"[{{assistant 2}}{eos}]"
    )


def test_rows_that_are_too_long_move_no_prompt_to_two_sides(tmp_path, monkeypatch):
    """Of each prompt some answers are longer than max_length, and left out."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"How many? {k // 4}", "completion": "Yes " * (40 if k % 3 == 0 else 2) + f"{k}"}
        for k in range(120)
    ]
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = dataclasses.replace(read(path).dataset, too_long="skip", max_length=32)
    data = load.load(spec, ["."], llama_like())
    parts = (data.train(0, 0, data.n_train), data.validation, data.test)
    train, validation, test = ({tuple(e.tokens[~e.loss]) for e in part} for part in parts)
    assert not (validation & test or train & (validation | test)) and validation and test
    assert len(data.validation) + len(data.test) < spec.holdout


def test_a_base_of_more_than_one_gpu_is_its_customers_error(base, tmp_path):
    data = str(write_rows(tmp_path / "my.jsonl", 40, "Yes {k}"))
    row = {"task": "sft", "data": data}
    small = {"name": "small", "model": str(base / "config.json"), **row}
    large = {"name": "large", "model": "llama-3.1-70b", **row}
    hardware = catalogue.machines([conf_dir()])["h100"]()
    planner = Forecaster(hardware, compose_request([]).exec)
    fits, refused = plan([small, large], planner=planner, precision="bf16")
    assert fits.points and "llama-3.1-70b takes" in refused.problem
    assert refused.problem.startswith("row 3: ")

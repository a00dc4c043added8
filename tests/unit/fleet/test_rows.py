"""A customer's rows: their form, which are training, validation and test rows, and rows of the hub."""

import dataclasses
import re

import pytest
from transformers import GenerationConfig

from lorasweep.advise.read import RowError
from lorasweep.data import load, messages, text
from lorasweep.errors import DataError
from lorasweep.fleet.rows import Rules, named_rows, rows_of
from lorasweep.spec.dataset import DatasetSpec
from tests import small_hub
from tests.customers import CHAT_TEMPLATE, write_json, write_rows
from tests.small_hub import llama_like, qwen_like, with_chat


def read(path, rules=None, tokenizer=None, validation=None):
    """A customer's rows, by rules of version 0.2 unless others are given."""
    return fitted(path, rules, tokenizer, validation=validation)[0]


def fitted(path, rules=None, tokenizer=None, length=None, validation=None):
    tokenizer = tokenizer or llama_like()
    return rows_of("any", str(path), rules or Rules(), tokenizer, validation, length)


def pairs(count, prompt, completion):
    """Rows with two columns; both are templates of the row's number."""
    said = ((prompt.format(k), completion.format(k)) for k in range(count))
    return [{"prompt": p, "completion": c} for p, c in said]


def turns(*said, weights=()):
    found = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(said)]
    for message, weight in zip(found, weights):
        message |= {} if weight is None else {"weight": weight}
    return {"messages": found}


def texts(spec):
    return [
        [tuple(messages.read(spec, row, where).messages) for where, row in source.rows()]
        for source in load.sources_of(spec, ["."])
    ]


def prompts(spec, folder=".", **changes):
    """The prompts of the training, validation and test rows, as they are loaded."""
    spec = dataclasses.replace(spec, **{"max_length": 64, **changes})
    data = load.load(spec, [folder], llama_like())
    parts = (data.train(0, 0, data.n_train), data.validation, data.test)
    return [[llama_like().decode(e.tokens[~e.loss]) for e in part] for part in parts]


def counts(found):
    return found.n_train, found.dataset.n_validation, found.dataset.n_test


@pytest.mark.parametrize(
    "rows, held_out, named",
    [(19, 0, 0), (20, 4, 0), (40, 4, 10), (60, 6, 15), (200, 20, 20), (3000, 128, 128)],
)
def test_a_tenth_is_validation_a_tenth_test_and_of_few_rows_none(tmp_path, rows, held_out, named):
    """Of a customer's rows; of rows given by name at least 20 are held out, or they are refused."""
    path = write_rows(tmp_path / "my.jsonl", rows, "Yes {k}")
    found = read(path)
    spec = found.dataset
    assert counts(found) == (rows - 2 * held_out, held_out, held_out or rows)
    assert found.held_out == (held_out > 0) and spec.holdout == 2 * held_out
    assert spec.problem is None and read(path).dataset == spec
    if named:
        spec, folder, _ = named_rows(str(path), {})
        assert (spec.location, folder, spec.held_out_by) == (".", str(tmp_path), "prompt")
        assert spec.problem is None and spec.revision.startswith("sha256:my=")
        assert spec.holdout == 2 * named
        assert [*map(len, prompts(spec, folder))] == [rows - 2 * named, named, named]
    changed = read(write_rows(path, rows, "No")).dataset
    assert changed.canonical != found.dataset.canonical


def test_duplicates_stay_in_one_split(tmp_path):
    """Some rows repeat up to forty times, with different values in other columns."""
    asked = [k for k in range(40) for _ in range(40 if k == 3 else 1 + k % 3)]
    rows = [pairs(40, "How many? {}", "Yes")[k] | {"id": n} for n, k in enumerate(asked)]
    path = write_json(tmp_path / "my.jsonl", rows)
    found = read(path)
    train, held = texts(found.dataset)
    assert found.repeated == len(rows) - 40 and found.dataset.unseen_rows
    assert len(held) == len(set(held)) == 8 and not set(train) & set(held)
    assert len(set(train)) == 32 and found.n_train == len(train)
    assert [len(p) for p in prompts(found.dataset)] == [len(train), 4, 4]
    # of few unique rows none is held out, however often they repeat
    few = read(write_json(path, rows[:6] * 9))
    assert not few.held_out and few.n_train == 54 and not few.dataset.unseen_rows


MANY = [row for n in range(5) for row in pairs(40, "How many? {}", f"Yes {n}")]
NOTES = pairs(100, "Write a note.", "Yes {}")
ASKED = pairs(70, "How many? {}", "No")
TIMES = [(k, 12 if k % 7 == 0 else 1) for k in range(120)]
UNEVEN = [row for k, n in TIMES for row in pairs(n, f"How many? {k}", "Yes {}")]
DIVIDED = {  # training file, test file, sizes of the parts, (same_prompt, left_out, repeated), by
    "forty prompts": (MANY, [], (160, 20, 20), (160, 0, 0), "prompt"),
    "one prompt": (NOTES, [], (80, 10, 10), (99, 0, 0), "row"),
    "one prompt in both files": (NOTES, pairs(30, "Write a note.", "No {}"), (100, 15, 15), (129, 0, 0), "row"),
    "prompts of a test file": (pairs(50, "How many? {}", "Yes"), ASKED[40:], (40, 15, 15), (10, 10, 0), "prompt"),
    "many answers to a prompt": (UNEVEN, [], (250, 33, 19), (198, 0, 0), "prompt"),
    "a test file sorted by topic": (pairs(50, "How many? {}", "Yes"), pairs(400, "Is it? {}", "No") + pairs(400, "So? {}", "No"), (50, 128, 128), (0, 0, 0), "prompt"),
    "rows of a test file": (ASKED[:9], 2 * ASKED[5:13], (5, 4, 4), (0, 4, 12), "prompt"),
}  # fmt: skip


@pytest.mark.parametrize("case", DIVIDED)
def test_no_prompt_is_in_two_splits_unless_there_are_too_few(tmp_path, case):
    train, test, sizes, count, by = DIVIDED[case]
    write_json(tmp_path / "train.jsonl", train)
    if test:
        write_json(tmp_path / "test.jsonl", test)
    found = read(tmp_path)
    parts, divided_by = prompts(found.dataset), found.dataset.held_out_by
    assert (counts(found), divided_by) == (sizes, by) and tuple(map(len, parts)) == sizes
    assert (found.same_prompt, found.left_out, found.repeated) == count
    assert (found.dataset.holdout == 0) == bool(test)
    each = [parts] if by == "prompt" else []
    if len(train) + len(test) > 40 and each:  # rows by name, too
        spec, folder, _ = named_rows(str(tmp_path if test else tmp_path / "train.jsonl"), {})
        each.append(prompts(spec, folder))
        assert spec.revision.count("=") == 1 + bool(test)
        assert train is UNEVEN or len(each[1][1]) == len(each[1][2])
    for parts in each:
        assert len(set().union(*parts)) == sum(len(set(part)) for part in parts)


REFUSED = {  # rows by name or training file of a customer, test file
    "39 unique rows. Expected at least 40": (pairs(39, "So? {}", "Yes"), None),
    ": 1 unique rows": (pairs(50, "So?", "Yes"), None),
    "15 of 60 rows have no answer, the first is row 46": (pairs(45, "So? {}", "Yes") + pairs(15, "No? {}", ""), None),
    "Add rows to train on": (ASKED[:8], ASKED[:8]),
    "Expected at least 2": (ASKED[:8], ASKED[9:10]),
}  # fmt: skip


@pytest.mark.parametrize("says", REFUSED)
def test_rows_that_are_too_few_or_have_no_answer_are_refused(tmp_path, says):
    train, test = REFUSED[says]
    path = write_json(tmp_path / ("my.jsonl" if test is None else "train.jsonl"), train)
    if test:
        write_json(tmp_path / "test.jsonl", test)
    with pytest.raises(DataError, match=re.escape(says)):
        named_rows(str(path), {}) if test is None else read(tmp_path)


def test_rows_that_are_left_out_or_cut_are_counted_and_most_of_them_an_error(tmp_path):
    """By a stated max_length, in a fleet as for rows given by name; the counts are those trained."""
    late = " late" * 99
    rows = [row for n in range(40) for row in pairs(5, f"So? {n} {{}}", "Yes")]
    rows = [{**r, "prompt": r["prompt"] + late * (k % 5 == 0)} for k, r in enumerate(rows)]
    path = write_json(tmp_path / "my.jsonl", rows)
    found, _ = fitted(path, length=64)
    data = load.load(found.dataset, ["."], llama_like())
    n_read, cut, left_out, _ = data.fits["training"]
    enough = max(fit[-1] for fit in data.fits.values())
    assert (found.n_train, data.n_train, n_read, cut) == (n_read - left_out, found.n_train, 160, 0)
    assert f"leaves out {left_out} and cuts 0 of 160 training rows" in found.warning
    assert f"Set the column max_length to {enough}, with which 99% are whole" in found.warning
    whole, _ = fitted(path, length=enough)
    assert not whole.warning and whole.n_train == 160
    write_json(path, pairs(40, "So? {}" + late, "Yes " * 9))
    with pytest.raises(DataError, match=r"cuts 3. of 3. training rows. Set the column max_length"):
        fitted(path, length=enough)


def test_many_short_rows_of_one_part_do_not_hide_what_the_other_loses():
    def said(training, held_out):
        fits = {"training": training, "held-out": held_out}
        return text.check_fit(DatasetSpec("rows"), fits, "max_length=")

    assert "leaves out 48 and cuts 0 of 100 held" in said((120, 0, 0, 60), (100, 0, 48, 99))
    assert "leaves out 10 and cuts 0 of 100 train" in said((100, 0, 10, 99), (1024, 0, 0, 60))
    assert said((1000, 5, 5, 99), (100, 0, 0, 60)) == ""
    with pytest.raises(DataError, match=r"cuts 90 of 100 training rows. Set max_length=99"):
        said((100, 90, 0, 99), (256, 0, 0, 60))


@pytest.mark.parametrize("tokenizer", [llama_like, qwen_like])
def test_rows_begin_with_bos_where_a_server_sends_it(tmp_path, tokenizer):
    """As a server makes tokens of a text, and as it renders messages by the folder's template."""
    tokenizer, path = tokenizer(), write_rows(tmp_path / "my.jsonl", 60, "Yes {k}")
    fleet = read(path, Rules(whole_prompt=True), tokenizer).dataset
    for spec, folder in ((fleet, "."), named_rows(str(path), {})[:2]):
        row = next(iter(load.load(spec, [folder], tokenizer).test))
        prompt = tokenizer.decode(row.tokens[~row.loss], skip_special_tokens=True)
        assert row.tokens[~row.loss].tolist() == tokenizer(prompt).input_ids
        served = text.with_template(spec, tokenizer)
        said = [{"role": "user", "content": prompt.removesuffix("\n")}]
        sent = served.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        assert served(sent, add_special_tokens=False).input_ids == row.tokens[~row.loss].tolist()


def test_rows_that_are_too_long_move_no_prompt_to_two_splits(tmp_path):
    said = [("Yes " * (40 if k % 3 == 0 else 2) + f"{k}") for k in range(120)]
    rows = [pairs(1, f"How many? {k // 4}", text)[0] for k, text in enumerate(said)]
    spec = read(write_json(tmp_path / "my.jsonl", rows)).dataset
    train, *held = prompts(spec, too_long="skip", max_length=32)
    validation, test = map(set, held)
    assert not (validation & test or set(train) & (validation | test)) and validation and test
    assert sum(map(len, held)) < spec.holdout


def test_the_prompt_of_a_conversation_ends_before_the_first_learned_answer(tmp_path):
    """With the last answer in the loss that is all before it: rows with one first question and
    another last one share nothing that is learned. With all answers it is the first question."""
    path = tmp_path / "my.jsonl"
    write_json(path, [turns("So?", "Yes", f"How many? {k % 40}", f"No {k}") for k in range(200)])
    by_last = read(path)
    assert (by_last.same_prompt, by_last.n_train) == (160, 160)
    assert by_last.dataset.held_out_by == "prompt"
    assert read(path, Rules(mask="completion")).same_prompt == 199
    said = [("So?", "Yes", f"Is it late? {k}", "No") for k in range(100)]
    weighted = [turns(*text, weights=(None, k % 2, None, None)) for k, text in enumerate(said)]
    assert read(write_json(path, weighted)).same_prompt == 49  # whose first answer is learned


def test_all_answers_of_messages_are_learned_in_new_fleets_and_of_conversations_the_last(tmp_path):
    rows, new = [turns("So?", "Yes", "How many?", "No")] * 30, Rules(answers="all")
    said = [{"from": m["role"], "value": m["content"]} for m in rows[0]["messages"]]
    for form, mask in ((rows, "completion"), ([{"conversations": said}] * 30, "last_assistant")):
        assert read(write_json(tmp_path / "my.jsonl", form), new).dataset.mask == mask


def test_a_validation_file_beside_the_training_file_is_divided_as_a_test_file(tmp_path):
    path = write_rows(tmp_path / "a/my.jsonl", 50, "Yes {k}")
    held = write_rows(tmp_path / "a/held.jsonl", 30, "No {k}", start=40)
    for name, given in (("train", path), ("test", held)):
        write_json(tmp_path / f"b/{name}.jsonl", given.read_text().splitlines())
    found, tested = read(path, validation=str(held)), read(tmp_path / "b")
    assert texts(found.dataset) == texts(tested.dataset) and counts(found) == counts(tested)
    assert (found.left_out, found.dataset.test_split) == (10, "held")
    in_folder = path.rename(tmp_path / "a/train.jsonl").parent
    assert texts(read(in_folder, validation=str(held)).dataset) == texts(tested.dataset)
    other = write_rows(tmp_path / "a/held.json", 3, "No")
    for wrong in (tmp_path / "b/test.jsonl", path, in_folder / "train.jsonl", other):
        with pytest.raises(RowError, match=r"is no other file beside train.jsonl.*NAME.jsonl"):
            read(in_folder, validation=str(wrong))


def test_the_example_has_nothing_of_the_rows_nor_of_their_tools(tmp_path):
    more = "{{ m.note }}{{ m.content }}{{ m.tool_calls }}"
    chat = with_chat("{{ tools }}" + CHAT_TEMPLATE.replace("{{ m.content }}", more), llama_like)
    called = [{"function": {"name": "secret", "arguments": '{"secret": "secret"}'}}]
    tools = [{"type": "function", "function": {"name": "secret", "parameters": {}}}]
    asked = {"role": "assistant", "content": None, "tool_calls": called, "note": "secret"}
    said = {"role": "tool", "content": "secret", "name": "secret"}
    rows = [{**turns(f"secret {k}", "secret"), "tools": tools} for k in range(30)]
    for row in rows:
        row["messages"][1:1] = [asked, said]
    path = write_json(tmp_path / "my.jsonl", rows)
    found, _ = fitted(path, Rules(answers="all"), chat)
    shown = "".join(text for text, _ in found.example) + str(found.messages)
    assert "secret" not in shown and "{user 1}" in shown and "{assistant 1}" in shown
    assert found.end.endswith(chat.eos_token)


SCHOOL, TULU = "openai/gsm8k", "allenai/tulu-3-sft-mixture"


def test_rows_of_the_hub_are_pinned_and_divided(tmp_path, monkeypatch, offline):
    monkeypatch.chdir(tmp_path)
    given = {"source": "hub", "revision": small_hub.COMMIT}
    named = DatasetSpec(name="a", location=SCHOOL, config="main", **given)
    small_hub.make(tmp_path, [], [named, DatasetSpec(name="b", location=TULU, **given)])
    found, tulu = read(f"{SCHOOL}:main"), read(f"{TULU}@{small_hub.COMMIT}")
    spec = found.dataset
    where = (spec.source, spec.location, spec.config, spec.revision, spec.prompt_field)
    assert where == ("hub", SCHOOL, "main", small_hub.COMMIT, "question")
    data = load.load(spec, [], llama_like())
    sizes = (data.n_train, len(data.validation), len(data.test))
    assert sizes == counts(found) == (4, 10, 10)  # 20 of 24 are in both
    assert counts(tulu) == (880, 110, 110) and tulu.dataset.mask == "last_assistant"
    with pytest.raises(DataError, match=r"no file or folder .*openai/gsm9k, and as a data set of"):
        read("openai/gsm9k")
    with pytest.raises(RowError, match=r"on the hub.*Leave the column empty"):
        read(f"{SCHOOL}:main", validation="held.jsonl")


def test_a_template_that_breaks_on_a_row_and_one_that_servers_could_not_use(tmp_path, monkeypatch):
    rows = [turns("How many?", f"Yes {k}") for k in range(30)]
    rows[27] = {"messages": [{"role": "system", "content": "Say yes."}, *rows[27]["messages"]]}
    path = write_json(tmp_path / "my.jsonl", rows)
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    breaking = with_chat(no_system + CHAT_TEMPLATE, llama_like)
    with pytest.raises(DataError, match=r"my.jsonl:28: the tokenizer's chat template .*no system"):
        fitted(path, tokenizer=breaking)
    monkeypatch.setattr(text, "_extended", lambda spec, given: f"!{given}")
    with pytest.raises(DataError, match=r"my.jsonl:1: the chat template for servers gives '!<user"):
        fitted(path, tokenizer=with_chat(CHAT_TEMPLATE, llama_like))


EOS, ENDS = llama_like().eos_token, CHAT_TEMPLATE.replace("{{ eos_token }}", "<|end|>\n")
FORMS = [  # rules, chat template of the base, prompt, [what is in the loss], what a request needs
    (Rules(), None, "{prompt}\n", f"{{completion}}{EOS}", {}),
    (Rules(), CHAT_TEMPLATE, f"<user>{{prompt}}{EOS}<assistant>", f"{{completion}}{EOS}", {}),
    (Rules("Q: {prompt} A: ", "role_eos"), CHAT_TEMPLATE, "Q: {prompt} A: ", f"{{completion}}{EOS}", {}),
    (Rules("{prompt}", "role_colon"), CHAT_TEMPLATE, "<|begin_of_text|>User: {prompt}\n\nAssistant:", " {completion}\n\nUser:", {"stop": ["\n\nUser:"]}),
    (Rules(), ENDS, None, None, {"stop_token_ids": [len(llama_like())]}),
    (Rules(), ENDS.replace("<|end|>", "##"), None, None, {"stop": ["##\n"]}),
]  # fmt: skip


@pytest.mark.parametrize("rules, template, prompt, learned, stop", FORMS)
def test_the_form_is_the_bases_chat_template_else_plain_unless_it_is_named(
    tmp_path, rules, template, prompt, learned, stop
):
    """And a request names the end of an answer if the end token does not end it."""
    tokenizer = with_chat(template, llama_like)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    found, _ = fitted(write_rows(tmp_path / "my.jsonl", 30, "Yes {k}"), rules, tokenizer)
    texts = ["".join(t for t, in_loss in found.example if in_loss == k) for k in (False, True)]
    assert found.stop == stop and texts == [prompt or texts[0], learned or texts[1]]
    assert [m["content"] for m in found.messages] == ["{prompt}", "{completion}"]
    text.save_tokenizer(text.with_template(found.dataset, tokenizer), found.stop, tmp_path)
    ends = GenerationConfig.from_pretrained(tmp_path)
    assert ends.eos_token_id == [1, *stop.get("stop_token_ids", [])]
    assert ends.stop_strings == stop.get("stop")

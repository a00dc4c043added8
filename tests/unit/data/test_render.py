"""Messages as text, token by token, on tokenizers that split as Llama 3's and Qwen's do; rows of
hosted fine-tuning services; and the chat template in an adapter's folder, read by AutoTokenizer."""

import copy
import dataclasses
import json
import random
import re
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq
from transformers import AutoTokenizer

from lorasweep.data import load as data
from lorasweep.data import messages, sources, text
from lorasweep.errors import DataError
from lorasweep.spec.dataset import DatasetSpec
from tests.customers import CHAT_TEMPLATE
from tests.small_hub import llama_like, qwen_like, with_chat
from tests.unit.data.conftest import shipped
from tests.world import write_json, write_splits

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
    for tokenizer, start, number in (
        (llama_like, "<|begin_of_text|> ", "345"),
        (qwen_like, "", "3 4 5"),
    ):
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
    served = text.with_template(shipped("tulu3", render=render), tokenizer())
    for n in (2, 4):
        sent = served(served.apply_chat_template(TURNS[: n - 1], **how), add_special_tokens=False)
        alone, whole = (
            tokens_of(tokenizer(), TURNS[:n], render=render, whole_prompt=w)[1]
            for w in (False, True)
        )
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
def test_messages_of_weight_1_are_learned_and_of_weight_0_are_not(
    tokens_of, weights, changes, text
):
    assert tokens_of(qwen_like(), weighted(*weights), **changes)[0].endswith(text)
    with pytest.raises(DataError, match=r"jsonl:1: no token counts.*give one weight 1"):
        tokens_of(qwen_like(), weighted(..., 0, ..., 0))


CHAT = CHAT_TEMPLATE.replace("eos_token }}", "eos_token }}\n")
FORGETS = CHAT.replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' }}")


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
    """Write plain messages in the forms that services take."""
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
        spec = dataclasses.replace(sources.dataset_of(str(path)), **changes)
        source, _ = data.sources_of(spec, ["."])
        tokenizer = tokenizer or with_chat(CHATML)
        found = text.examples(spec, spec.train_split, source, tokenizer, None, "")
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


# ---------------------------------------------------------------- refusals

USER, ANSWER = {"role": "user", "content": "So?"}, {"role": "assistant", "content": "Yes"}
CALLED = [{"id": "1", "function": {"name": "late", "arguments": "{}"}}]
GOOD = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": CALLED}]}
TALK = [{"from": "human", "value": "So?"}, {"from": "gpt", "value": "Yes"}]
SHARED, PAIR = {"conversations": TALK}, {"prompt": "a", "completion": "b"}


def asked(**changes):
    return {"messages": [{**USER, **changes}, ANSWER]}


def answer(**changes):
    return {"messages": [USER, {**ANSWER, **changes}]}


def shared(**changes):
    return {"conversations": [TALK[0], {**TALK[1], **changes}]}


def calling(arguments="{}", name="late", **more):
    return answer(tool_calls=[{"function": {"name": name, "arguments": arguments}, **more}])


TEXT_PART, HALF = {"type": "text", "text": "So?"}, "\ud83d"
IMAGE = {"type": "image_url", "image_url": {}}
REFUSED = [
    ("messages[0].content[1] is", asked(content=[TEXT_PART, IMAGE])),
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
    ("messages[0].weight of", asked(weight=1)),
    ("conversations[1].from is 'tool'", shared(**{"from": "tool"})),
    ("'content' beside from and value", shared(content="No")),
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
    assert len(read(rows)) == 3
    assert read([{**SHARED, "tools": "[]", "system": ""}])


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
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
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


def spec_of(render, form="prompt_completion", template="{prompt}\n", **more):
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
            spec = spec_of(render, form, template, mask=mask)
            text.save_tokenizer(text.with_template(spec, tokenizer), {}, tmp_path / f"{n}")
            served = AutoTokenizer.from_pretrained(tmp_path / f"{n}")
            for k in range(20):
                row = row_of(form, k, form == "messages" and n == 1 and chat)
                turns, described = text.request_of(spec, row, "row")
                one = SimpleNamespace(rows=lambda row=row: iter([("row", row)]))
                (example,) = text.examples(spec, "train", one, tokenizer, None, "")
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
                    learned = "".join(p for p, _ in text.rendered(spec, row, "row", tokenizer)[:-1])
                    assert learned == prompt
                text.check_rows(spec, [("row", row)], tokenizer)


@pytest.mark.parametrize("wrong", ["{{ messages[0].content }}", "{{ 1 / 0 }}", NO_HEAD])
def test_other_conversations_and_another_text_are_refused(wrong, monkeypatch):
    served = text.with_template(spec_of("role_eos"), llama_like())
    with pytest.raises(Exception, match="send one user message"):
        served.apply_chat_template([{"role": "system", "content": "Yes."}, USER], tokenize=False)
    monkeypatch.setattr(text, "_plain", lambda spec, bos: wrong)
    rows = [("my.jsonl:1", row_of("messages", 0))]
    with pytest.raises(DataError, match=r"my.jsonl:1: the chat template for servers"):
        text.check_rows(spec_of("role_eos", "messages"), rows, with_chat(CHAT_TEMPLATE))

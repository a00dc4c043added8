"""Rows of hosted fine-tuning services: what is in the loss, token by token, and what is refused.

Rows are drawn as plain messages. They are written to a file in the forms that services take (parts,
JSON text, null contents, the role developer). The reference renders the plain messages.
"""

import copy
import dataclasses
import json
import random
import re
from collections import Counter

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from lorasweep.data import load, messages, own, text
from lorasweep.errors import DataError
from lorasweep.spec.dataset import DatasetSpec
from tests.bpe import llama_like, qwen_like
from tests.world import write_json

CHATML = """
{%- if tools %}
  {{- '<|im_start|>system\n' }}
  {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
  {{- '# Tools\n<tools>' }}
  {%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
  {{- '\n</tools>' + eos_token + '\n' }}
{%- elif messages[0].role == 'system' %}
  {{- '<|im_start|>system\n' + messages[0].content + eos_token + '\n' }}
{%- endif %}
{%- for message in messages %}
  {%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + eos_token + '\n' }}
  {%- elif message.role == 'assistant' %}
    {{- '<|im_start|>assistant' }}
    {%- if message.content %}{{- '\n' + message.content }}{%- endif %}
    {%- for call in message.tool_calls %}
      {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
      {{- call.function.arguments | tojson }}
      {{- '}\n</tool_call>' }}
    {%- endfor %}
    {{- eos_token + '\n' }}
  {%- elif message.role == 'tool' %}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
      {{- '<|im_start|>user' }}
    {%- endif %}
    {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
      {{- eos_token + '\n' }}
    {%- endif %}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
NO_TOOLS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DROPS_CALLS = NO_TOOLS + "{# tools, tool_calls #}"
SPEC = DatasetSpec(name="a", source="jsonl", location=".", format="messages")
WORDS = ["yes", "no", "late", "12", "345", "it", "is,", "how", "many?", "in", "all", "so"]
N = 200


def with_template(template, tokenizer=qwen_like):
    found = copy.deepcopy(tokenizer())
    found.chat_template = template
    return found


# ---------------------------------------------------------------- rows


def said(rng):
    return rng.choice(["Yes", "No", "So"]) + " " + " ".join(rng.choices(WORDS, k=rng.randint(1, 8)))


def call(rng):
    values = {"city": said(rng), "days": rng.randint(1, 9), "more": [True, None, {"é": said(rng)}]}
    arguments = dict(rng.sample(sorted(values.items()), rng.randint(0, 3)))
    function = {"name": rng.choice(["get_weather", "late"]), "arguments": arguments}
    return {"id": f"call_{rng.random()}", "type": "function", "function": function}


TOOLS = [
    {"type": "function", "function": {"name": n, "description": "So?", "parameters": {"a": [1]}}}
    for n in ("get_weather", "late")
]


def plain_row(rng, tools=True):
    """Draw plain messages, and tools or None; answers have the key `learned`."""
    messages = [{"role": "system", "content": said(rng)}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": said(rng)})
        for _ in range(rng.randint(0, 2) if tools else 0):
            calls = [call(rng) for _ in range(rng.randint(1, 3))]
            content = rng.choice([None, said(rng)])
            messages.append({"role": "assistant", "content": content, "tool_calls": calls})
            for c in calls:
                answer = {"role": "tool", "content": said(rng), "tool_call_id": c["id"]}
                messages.append({**answer, "name": c["function"]["name"]})
        messages.append({"role": "assistant", "content": said(rng)})
    answers = [m for m in messages if m["role"] == "assistant"]
    for m in answers if rng.random() < 0.8 else ():
        m["weight"] = rng.choice([0, 1, None])
    for m in answers:
        m["learned"] = m.get("weight") != 0
    if not any(m["learned"] for m in answers):
        answers[-1] |= {"weight": 1, "learned": True}
    return messages, TOOLS if tools and rng.random() < 0.8 else None


def as_given(rng, messages, tools):
    """Write plain messages in the forms that services take."""
    found = []
    for m in copy.deepcopy(messages):
        m.pop("learned", None)
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
        found.append(m)
    row = {"messages": found, "parallel_tool_calls": True}
    return row if tools is None else {**row, "tools": rng.choice([tools, json.dumps(tools)])}


def drawn(**how):
    """Return N plain rows, and the same rows as they are given."""
    rng = random.Random(0)
    plain = [plain_row(rng, **how) for _ in range(N)]
    return plain, [as_given(rng, *row) for row in plain]


def reference(tokenizer, messages, tools):
    """Return token ids and loss of a row: answers stand between <|im_start|>assistant and EOS."""
    whole = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    eos = re.escape(tokenizer.eos_token)
    spans = [m.span(1) for m in re.finditer(rf"<\|im_start\|>assistant\n(.*?{eos})", whole, re.S)]
    learned = [m["learned"] for m in messages if m["role"] == "assistant"]
    inside = [span for span, learned in zip(spans, learned, strict=True) if learned]
    whole = whole[: inside[-1][1]]  # what follows the last answer is left out
    given = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    loss = [any(a <= start < b for a, b in inside) for start, _ in given.offset_mapping]
    return given.input_ids, loss


def tokens_of(path, tokenizer, **changes):
    """Return token ids and loss of each row of a file given by name."""
    changes = {"render": "chat_template", "max_length": 4096, **changes}
    spec = dataclasses.replace(own.dataset_of(str(path)), **changes)
    source, _ = load.sources_of(spec, ["."])
    found = text.examples(spec, spec.train_split, source, tokenizer, None, "")
    return [(e.tokens.tolist(), e.loss.tolist()) for e in found]


@pytest.mark.parametrize("tokenizer", [qwen_like, llama_like])
def test_the_loss_of_rows_is_that_of_the_formats_description(tmp_path, tokenizer):
    tokenizer, (plain, given) = with_template(CHATML, tokenizer), drawn()
    found = tokens_of(write_json(tmp_path / "rows.jsonl", given), tokenizer)
    assert found == [reference(tokenizer, *row) for row in plain]


@pytest.mark.parametrize("render", ["role_eos", "role_colon"])
def test_parts_and_developers_are_read_without_a_template_as_plain_rows(tmp_path, render):
    plain, given = drawn(tools=False)
    bare = [[{k: v for k, v in m.items() if k != "learned"} for m in row] for row, _ in plain]
    rows = [given, [{"messages": row} for row in bare]]
    one, other = (
        tokens_of(write_json(tmp_path / f"{k}.jsonl", r), qwen_like(), render=render)
        for k, r in enumerate(rows)
    )
    assert one == other and len(one) == N


def test_kinds_of_rows_are_counted():
    plain, given = drawn()
    counts = Counter(kind for row in given for kind in messages.read(SPEC, row, "").kinds)
    n = [
        sum(bool(tools) or any("tool_calls" in m for m in said) for said, tools in plain),
        sum(any(m.get("weight") is not None for m in said) for said, _ in plain),
        sum(any(isinstance(m.get("content"), list) for m in row["messages"]) for row in given),
    ]
    assert messages.rows_line(counts + Counter(prompt_completion=12)) == (
        f"rows: {N + 12} understood: {N} messages, 12 prompt_completion, {n[0]} with tools, "
        f"{n[1]} with weights, {n[2]} with text parts"
    )


def readings(said, tools=()):
    found = messages.read(SPEC, {"messages": said, "tools": tools}, "")
    return found.whole, found.prompt, found.opening


def test_rows_that_differ_in_ids_are_duplicates_and_tools_belong_to_the_prompt():
    rng = random.Random(0)
    for _ in range(N):
        said, _ = plain_row(rng)
        other = copy.deepcopy(said)
        for c in (c for m in other for c in m.get("tool_calls", ())):
            c["id"] = "new"
        same, new_ids = readings(said, TOOLS), readings(other, TOOLS)
        assert same == new_ids
        assert all(a != b for a, b in zip(same, readings(said, TOOLS[:1])))
    # what is called is part of the answer
    answers = [{"role": "assistant", "tool_calls": [call(random.Random(k))]} for k in range(9)]
    wholes, prompts, _ = zip(*(readings([USER, answer]) for answer in answers))
    assert len(set(wholes)) > 5 and len(set(prompts)) == 1


# ---------------------------------------------------------------- refusals

USER, YES = {"role": "user", "content": "So?"}, {"role": "assistant", "content": "Yes"}
CALLED = [{"id": "1", "function": {"name": "late", "arguments": "{}"}}]
GOOD = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": CALLED}]}


def part(kind):
    return [{"type": "text", "text": "So?"}, {"type": kind, kind: {"url": "a"}}]


def answer(**changes):
    return {"messages": [USER, {**YES, **changes}]}


def calling(arguments="{}", name="late", **more):
    return answer(tool_calls=[{"function": {"name": name, "arguments": arguments}, **more}])


OTHERS = {"function_call": {"name": "a"}, "refusal": "No", "audio": {"id": "a"}, "prefix": True}
OTHERS |= {"thinking": "so", "reasoning_content": "so"}
COLUMNS = {
    "functions": [{}],
    "system": "Be brief.",
    "images": ["a.png"],
    "label": False,
    "weight": 0,
}
REFUSED = [
    *(
        ({"messages": [{"role": "user", "content": part(kind)}, YES]}, r"messages\[0\].content\[1\] is")
        for kind in ("image_url", "input_audio", "file", "refusal")
    ),
    (answer(content=["Yes"]), r"messages\[1\].content\[0\] is 'Yes'"),
    (answer(content=None), r"messages\[1\].content is null. Allowed: a text, a list of text parts"),
    (answer(content=None, tool_calls=[]), r"messages\[1\].content is null"),
    ({"messages": [{"role": "user"}, YES]}, r"messages\[0\].content is null"),
    (answer(content="Yes \ud83d"), r"messages\[1\].content: character 5 is '\\ud83d'"),
    (answer(content=[{"type": "text", "text": "\ud83d"}]), r"messages\[1\].content: character 1 is"),
    (answer(content=3), r"messages\[1\].content is 3. Allowed"),
    (answer(content="Yes", train=False), "the row has train, for which"),
    (answer(content="Yes", loss=0), "the row has loss, for which"),
    (answer(content="Yes", mask=True, edited=False), "the row has mask, for which"),
    (answer(role="function"), r"messages\[1\].role is 'function'. Allowed: .*tool"),
    (answer(role=None), r"messages\[1\].role is null"),
    *((answer(**{key: value}), f"has {key}, for which the tokenizer's chat template has no form")
      for key, value in OTHERS.items()),
    *(({**answer(), column: value}, f"column '{column}' is .*, as it is not read")
      for column, value in COLUMNS.items()),
    (calling("[" * 100_000), r"arguments is '\[\[\["),
    (calling('{"a": 1, "a": 2}'), "arguments is '{\"a\": 1, \"a\": 2}'"),
    (calling('{"a": "\\ud83d"}'), "as rendered: character [0-9]+ is"),
    (calling("late=3"), r"\[1\].tool_calls\[0\].function.arguments is 'late=3'. Allowed: an obj"),
    (calling(""), "arguments is ''"),
    (calling("[1]"), r"arguments is '\[1\]'"),
    (calling(None), "arguments is null"),
    (calling(name=""), r"messages\[1\].tool_calls\[0\] is .*Allowed: {\"type\": \"function\""),
    (calling(type="custom"), r"tool_calls\[0\] is .*custom"),
    (answer(tool_calls={"a": 1}), r"messages\[1\].tool_calls is {'a': 1}. Allowed: a list"),
    (answer(role="user", tool_calls=CALLED), "calls of the assistant"),
    ({**GOOD, "tools": "late"}, "tools is 'late'. Allowed: a list of"),
    ({**GOOD, "tools": [{"name": "late"}]}, r"tools\[0\] is {'name': 'late'}. Allowed"),
]  # fmt: skip


@pytest.mark.parametrize("row, says", REFUSED)
def test_what_is_not_understood_is_refused_with_file_row_and_reason(tmp_path, row, says):
    path = write_json(tmp_path / "rows.jsonl", [GOOD, row])
    with pytest.raises(DataError, match=rf"(?s)rows.jsonl:2.*{says}.*Refused: 1 of 2 rows"):
        tokens_of(path, with_template(CHATML))
    assert len(tokens_of(write_json(path, [GOOD, {**GOOD, "tools": None}]), with_template(CHATML)))


def test_preference_pairs_are_refused_by_their_columns(tmp_path):
    path = write_json(tmp_path / "rows.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(DataError, match=r"jsonl:1: .* columns chosen, prompt, rejected. Expected"):
        own.dataset_of(str(path))
    columns = {"prompt_field": "prompt", "completion_field": "chosen"}
    assert own.dataset_of(str(path), named=columns).completion_field == "chosen"


@pytest.mark.parametrize(
    "template, changes, says",
    [
        (None, {"render": "role_eos"}, "has tool_calls, for which render=role_eos has no form"),
        (CHATML, {"render": "role_colon"}, "render=role_colon has no form"),
        (NO_TOOLS, {}, "has tool_calls, for which the tokenizer's chat template has no form"),
        (DROPS_CALLS, {}, r"leaves out a call of 'late' by message 2\)\. Remove the row"),
        (DROPS_CALLS, {"mask": "all"}, "leaves out a call of 'late' by message 2"),
    ],
)
def test_rows_with_tools_are_refused_where_the_base_has_no_form_for_them(
    tmp_path, template, changes, says
):
    row = {"messages": [USER, {**GOOD["messages"][1], "content": "So"}, *answer()["messages"]]}
    plain = {"messages": [USER, YES]}
    path = write_json(tmp_path / "rows.jsonl", [plain, row, plain, row, row, row])
    with pytest.raises(DataError, match=says) as error:
        tokens_of(path, with_template(template), **changes)
    shown = re.findall(r"rows.jsonl:(\d)", str(error.value))
    assert shown == ["2", "4", "5"] and str(error.value).endswith("Refused: 4 of 6 rows.")
    with pytest.raises(DataError, match="has tools, for which"):
        tokens_of(write_json(path, [{**plain, "tools": TOOLS}]), with_template(NO_TOOLS))


# ---------------------------------------------------------------- other keys of a message

REASONS = CHATML.replace(
    "+ message.content + eos_token",
    "+ ('<think>' ~ message.reasoning_content ~ '</think>' if message.reasoning_content and "
    "loop.last else '') + message.content + eos_token",
)
"""As in Qwen3's, the reasoning of earlier answers is left out."""


@pytest.mark.parametrize("mask", ["completion", "last_assistant", "all"])
def test_reasoning_that_the_chat_template_renders_is_learned(tmp_path, mask):
    tokenizer = with_template(REASONS)
    said = answer(reasoning_content="So it is.", refusal=None, audio=None)["messages"]
    (row,) = [{"messages": said}]
    ((ids, loss),) = tokens_of(write_json(tmp_path / "a.jsonl", [row]), tokenizer, mask=mask)
    whole = tokenizer.apply_chat_template(said, tokenize=False)
    assert tokenizer.decode(ids) == (whole if mask == "all" else whole.removesuffix("\n"))
    learned = tokenizer.decode([token for token, is_in in zip(ids, loss) if is_in])
    assert learned.endswith("<think>So it is.</think>Yes<|endoftext|>" + "\n" * (mask == "all"))
    found, other = (messages.read(SPEC, r, "") for r in (row, answer(reasoning_content="No.")))
    assert found.whole != other.whole and found.kinds == ["messages", "with reasoning_content"]


def test_reasoning_of_an_earlier_answer_is_left_out_as_a_server_does(tmp_path):
    said = [*answer(reasoning_content="So.")["messages"], *answer()["messages"]]
    path, tokenizer = write_json(tmp_path / "a.jsonl", [{"messages": said}]), with_template(REASONS)
    ((ids, _),) = tokens_of(path, tokenizer, mask="last_assistant")
    assert tokenizer.decode(ids) + "\n" == tokenizer.apply_chat_template(said, tokenize=False)


@pytest.mark.parametrize("key", ["reasoning_content", "name"])
def test_a_key_that_changes_no_text_is_refused_and_an_empty_one_is_not(tmp_path, key):
    template = CHATML + f"{{# {key} #}}"
    path = write_json(tmp_path / "a.jsonl", [answer(**{key: "so"})])
    with pytest.raises(DataError, match=f"a.jsonl:1: .* leaves out '{key}' of message 2"):
        tokens_of(path, with_template(template))
    for render in ("role_eos", "role_colon"):
        with pytest.raises(DataError, match=f"has {key}, for which render={render} has no form"):
            tokens_of(path, with_template(template), render=render)
    assert tokens_of(write_json(path, [answer(**{key: ""})]), with_template(template))


def test_what_other_formats_say_elsewhere_is_refused(tmp_path):
    said = [{"from": "human", "value": "So?"}, {"from": "gpt", "value": "Yes"}]
    for more in ({"tools": "[{}]"}, {"system": "Be brief."}):
        path = write_json(tmp_path / "a.jsonl", [{"conversations": said, **more}])
        with pytest.raises(DataError, match=f"column '{next(iter(more))}' is"):
            tokens_of(path, with_template(CHATML))
    twice = write_json(path, [{"conversations": [said[0], {**said[1], "content": "No"}]}])
    with pytest.raises(DataError, match="'content' beside from and value"):
        tokens_of(twice, with_template(CHATML))
    path = write_json(path, [{"conversations": said, "tools": "[]", "system": ""}])
    assert tokens_of(path, with_template(CHATML))


def test_rows_of_arrow_have_no_keys_of_other_rows(tmp_path):
    """Parquet has the keys of all calls and tools in every row, as nulls."""
    tools = [
        {**TOOLS[0], "function": {"name": "late", "parameters": {k: {"type": k}}}} for k in "ab"
    ]
    called = [{"function": {"name": "late", "arguments": a}} for a in ({"a": 1}, {"b": "x"}, {})]
    rows = [
        {**answer(content=None, tool_calls=[called[k % 3]]), "tools": [tools[k % 2]]}
        for k in range(6)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    lines = tokens_of(write_json(tmp_path / "a.jsonl", rows), with_template(CHATML))
    assert tokens_of(tmp_path / "b.parquet", with_template(CHATML)) == lines


def test_rows_without_a_learned_answer_are_an_error_of_their_file(tmp_path):
    path = write_json(tmp_path / "a.jsonl", [answer(weight=0)] * 3)
    with pytest.raises(DataError, match=r"a\.jsonl:1: no token counts in the loss"):
        tokens_of(path, with_template(CHATML))

"""The chat template in an adapter's folder renders what was trained on, read back by AutoTokenizer."""

import copy
import json
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from lorasweep.data import templates, text
from lorasweep.errors import DataError
from lorasweep.spec.dataset import DatasetSpec
from tests.bpe import llama_like, qwen_like
from tests.customers import CHAT_TEMPLATE

ODD = 'Q "\\ {{%}} {prompt} 😀é\r\n{prompt}A: '
WITH_TOOLS = (
    "{{ bos_token }}{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}\n"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}[{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}]{% endfor %}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_HEAD = CHAT_TEMPLATE.replace("<assistant>{% endif", "{% endif")
"""A prompt ends without the head of the answer."""
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def with_chat(template):
    found = copy.copy(llama_like())
    found.chat_template = template
    return found


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
    if not tools:
        return {form: messages}
    call = {"type": "function", "function": {"name": "add", "arguments": json.dumps({"k": k})}}
    messages[-1] = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "content": f"{k}"}
    return {form: [*messages, result, {"role": "assistant", "content": "Yes"}], "tools": [TOOL]}


def spec_of(render, form="prompt_completion", template="{prompt}\n", **more):
    given = {"name": "my", "source": "jsonl", "location": ".", "max_length": 4096}
    return DatasetSpec(**given, render=render, format=form, template=template, **more)


def served_from(folder, spec, tokenizer):
    templates.save(templates.with_template(spec, tokenizer), {}, folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("mask", ["completion", "last_assistant", "all"])
@pytest.mark.parametrize("form", ["prompt_completion", "messages", "conversations"])
@pytest.mark.parametrize("render", ["role_eos", "role_colon", "chat_template"])
def test_rows_read_back_are_those_trained_on(render, form, mask, tmp_path):
    chats = with_chat(CHAT_TEMPLATE), with_chat(WITH_TOOLS)
    for n, tokenizer in enumerate(
        chats if render == "chat_template" else (llama_like(), qwen_like())
    ):
        for template in ("{prompt}", "{prompt}\n", ODD) if form == "prompt_completion" else (ODD,):
            spec = spec_of(render, form, template, mask=mask)
            served = served_from(tmp_path / f"{n}", spec, tokenizer)
            tools = form == "messages" and bool(n) and render == "chat_template"
            for k in range(20):
                row = row_of(form, k, tools)
                turns, described = templates.request_of(spec, row, "row")
                one = SimpleNamespace(rows=lambda row=row: iter([("row", row)]))
                (example,) = text.examples(spec, "train", one, tokenizer, None, "")
                whole = served.apply_chat_template(turns, tools=described or None, tokenize=False)
                trained = tokenizer.decode(example.tokens, clean_up_tokenization_spaces=False)
                if render == "chat_template" and mask != "all":
                    whole = whole.removesuffix("\n")  # what follows the last answer in the loss
                assert trained == whole
                until = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
                how = {"tools": described or None, "add_generation_prompt": True}
                prompt = served.apply_chat_template(turns[:until], tokenize=False, **how)
                assert trained.startswith(prompt)
                if mask != "all":
                    learned = "".join(p for p, _ in text.rendered(spec, row, "row", tokenizer)[:-1])
                    assert learned == prompt
                templates.check_rows(spec, [("row", row)], tokenizer)


def test_the_date_is_that_of_training(tmp_path):
    spec = spec_of("chat_template", "messages")
    served = served_from(tmp_path, spec, with_chat("\n" + WITH_TOOLS))
    found = served.apply_chat_template([{"role": "user", "content": "So?"}], tokenize=False)
    assert text.DATE in found and found.startswith("\n")


def test_of_several_templates_each_is_extended():
    tokenizer = with_chat({"default": CHAT_TEMPLATE, "tool_use": WITH_TOOLS})
    served = templates.with_template(spec_of("chat_template", template="Q: {prompt}"), tokenizer)
    asked = [{"role": "user", "content": "So?"}]
    assert "<user>Q: So?" in served.apply_chat_template(asked, tokenize=False)
    assert "<user>Q: So?" in served.apply_chat_template(asked, tools=[TOOL], tokenize=False)
    assert tokenizer.chat_template["default"] == CHAT_TEMPLATE


def test_a_form_of_one_prompt_refuses_other_conversations():
    served = templates.with_template(spec_of("role_eos"), llama_like())
    asked = [{"role": "system", "content": "Say yes."}, {"role": "user", "content": "So?"}]
    with pytest.raises(Exception, match="send one user message"):
        served.apply_chat_template(asked, tokenize=False)


@pytest.mark.parametrize("wrong", ["{{ messages[0].content }}", "{{ 1 / 0 }}", NO_HEAD])
@pytest.mark.parametrize("render", ["role_eos", "role_colon", "chat_template"])
def test_another_text_is_an_error_with_the_row(render, wrong, monkeypatch):
    monkeypatch.setattr(templates, "_plain", lambda spec, bos: wrong)
    monkeypatch.setattr(templates, "_extended", lambda spec, given: wrong)
    rows = [("my.jsonl:1", row_of("messages", 0))]
    with pytest.raises(
        DataError, match=r"my.jsonl:1: the chat template for servers (gives|raises)"
    ):
        templates.check_rows(spec_of(render, "messages"), rows, with_chat(CHAT_TEMPLATE))

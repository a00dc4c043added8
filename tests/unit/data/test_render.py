"""Messages as text, token by token, on tokenizers that split as Llama 3's and Qwen's do."""

import copy
import dataclasses
import json

import pytest

from lorasweep.data import load as data
from lorasweep.errors import DataError, SpecError
from lorasweep.spec.run import validate
from tests.bpe import llama_like, qwen_like
from tests.world import compose_request, tiny_spec

TURNS = [
    {"role": "user", "content": "Is it late?"},
    {"role": "assistant", "content": "Yes, it is."},
    {"role": "user", "content": "So? 345"},
    {"role": "assistant", "content": "No!"},
]


def tokens_of(tmp_path, tokenizer, messages=TURNS, **changes):
    """Return the row's tokens as text, those in the loss in brackets."""
    (tmp_path / "mine").mkdir(exist_ok=True)
    for split in ("train", "test"):
        row = json.dumps({"messages": messages})
        (tmp_path / "mine" / f"{split}.jsonl").write_text(row + "\n")
    spec = dataclasses.replace(
        compose_request(["dataset=tulu3"]).points[0].spec.dataset,
        **{"source": "jsonl", "location": "mine", "holdout": 0, "revision": "", **changes},
    )
    e = data.load(spec, [str(tmp_path)], tokenizer).test[0]
    words = tokenizer.convert_ids_to_tokens(e.tokens.tolist())
    shown = [w.replace("Ġ", "_").replace("Ċ", "/") for w in words]
    return " ".join(f"[{w}]" if counts else w for w, counts in zip(shown, e.loss)), e


def test_role_colon_is_the_studys_form_with_bos_where_there_is_one(tmp_path):
    """Contents keep their leading space, so that it joins the first word; the blank line of an
    answer joins its last sign, and is in the loss; so is the 'User:' behind the last answer."""
    first = "User : _Is _it _late ?// Assistant : _Yes , _it _is .// User : _So ? _ "
    llama, row = tokens_of(tmp_path, llama_like())
    assert llama == f"<|begin_of_text|> {first}345 // Assistant : [_No] [!//] [User] [:]"
    qwen, _ = tokens_of(tmp_path, qwen_like())
    assert qwen == f"{first}3 4 5 // Assistant : [_No] [!//] [User] [:]"
    assert row.n_bytes == len(" No!\n\nUser:")


def test_role_colon_with_every_answer_in_the_loss(tmp_path):
    text, _ = tokens_of(tmp_path, qwen_like(), TURNS[:3], mask="completion")
    assert text == (
        "User : _Is _it _late ?// Assistant : [_Yes] [,] [_it] [_is] [.//] User : _So ? _ 3 4 5 //"
    )  # the last message is no answer: nothing follows it


@pytest.mark.parametrize("tokenizer", [llama_like, qwen_like])
def test_role_eos_ends_answers_with_eos_and_has_no_bos(tmp_path, tokenizer):
    eos = tokenizer().eos_token
    text, row = tokens_of(tmp_path, tokenizer(), TURNS[:2], render="role_eos")
    assert text == f"User : _ Is _it _late ? // Assistant : _ [Yes] [,] [_it] [_is] [.] [{eos}]"
    assert row.n_bytes == len("Yes, it is.")


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETS = CHAT.replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' }}")


def chatting(template):
    """A tokenizer with a chat template, as instruct models have one."""
    tokenizer = copy.deepcopy(qwen_like())
    tokenizer.chat_template = template
    return tokenizer


def chat(tmp_path, template, mask, **changes):
    """Return a row's text, and the text in its loss."""
    tokenizer = chatting(template)
    _, row = tokens_of(tmp_path, tokenizer, render="chat_template", mask=mask, **changes)
    return tokenizer.decode(row.tokens), tokenizer.decode(row.tokens[row.loss]), row.n_bytes


def test_chat_template_is_the_tokenizers_text_with_answers_and_their_end_in_the_loss(tmp_path):
    whole = chatting(CHAT).apply_chat_template(TURNS, tokenize=False)
    eos = qwen_like().eos_token
    text, trained, n_bytes = chat(tmp_path, CHAT, "last_assistant")
    assert text == whole.rstrip("\n") and (trained, n_bytes) == (f"No!{eos}", len("No!"))
    text, trained, _ = chat(tmp_path, CHAT, "completion")
    assert text == whole.rstrip("\n") and trained == f"Yes, it is.{eos}No!{eos}"
    text, trained, _ = chat(tmp_path, CHAT, "all")
    assert text == whole and trained == text[1:]  # nothing predicts the first token
    text, _, _ = chat(tmp_path, CHAT, "last_assistant", messages=TURNS[:3])
    assert text.endswith(f"Yes, it is.{eos}")  # what follows the last answer is left out


def test_a_template_that_rewrites_what_came_before_trains_the_last_answer_only(tmp_path):
    text, trained, _ = chat(tmp_path, FORGETS, "last_assistant")
    assert trained.startswith("No!") and "Yes, it is." not in text
    with pytest.raises(DataError, match=r":1: .*does not take the row with mask=completion"):
        chat(tmp_path, FORGETS, "completion")
    with pytest.raises(DataError, match="render=chat_template, but the tokenizer has none"):
        chat(tmp_path, None, "completion")
    refuses = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        chat(tmp_path, refuses, "completion")


def test_a_template_with_a_date_writes_the_same_one_every_day(tmp_path):
    assert chat(tmp_path, "{{ date_string }}" + CHAT, "all")[0].startswith("26 Jul 2024")


def test_the_form_of_messages_is_part_of_a_run_and_checked_before_it_starts():
    def with_data(**changes):
        return dataclasses.replace(spec, dataset=dataclasses.replace(spec.dataset, **changes))

    spec = dataclasses.replace(
        tiny_spec(), dataset=compose_request(["dataset=tulu3"]).points[0].spec.dataset
    )
    before = with_data(render="role_eos")
    assert "render" not in before.plain()["dataset"] and before.id != spec.id
    with pytest.raises(SpecError, match=r"render='chatml'. Allowed: role_colon, role_eos, chat"):
        validate(with_data(render="chatml"))
    synthetic = dataclasses.replace(tiny_spec().dataset, render="role_colon")
    with pytest.raises(SpecError, match="render='role_colon' has no effect with source=synthetic"):
        validate(dataclasses.replace(spec, dataset=synthetic))

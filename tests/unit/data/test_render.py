"""Messages as text, token by token, on tokenizers that split as Llama 3's and Qwen's do."""

import copy

import numpy as np
import pytest

from lorasweep.data import load as data
from lorasweep.data import own, templates
from lorasweep.data.messages import LISTS
from lorasweep.errors import DataError
from tests.bpe import llama_like, qwen_like
from tests.unit.data.conftest import shipped
from tests.world import write_json, write_splits

TURNS = [
    {"role": "user", "content": "Is it late?"},
    {"role": "assistant", "content": "Yes, it is."},
    {"role": "user", "content": "So? 345"},
    {"role": "assistant", "content": "No!"},
]


def tokens_of(tmp_path, tokenizer, messages=TURNS, **changes):
    """Return the row's tokens as text, those in the loss in brackets."""
    write_splits(tmp_path / "mine", [{"messages": messages}])
    mine = {"source": "jsonl", "location": "mine", "holdout": 0, "revision": ""}
    spec = shipped("tulu3", **mine, **changes)
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


@pytest.mark.parametrize("tokenizer", [llama_like, qwen_like])
def test_role_eos_ends_answers_with_eos_and_has_no_bos(tmp_path, tokenizer):
    eos = tokenizer().eos_token
    text, row = tokens_of(tmp_path, tokenizer(), TURNS[:2], render="role_eos")
    assert text == f"User : _ Is _it _late ? // Assistant : _ [Yes] [,] [_it] [_is] [.] [{eos}]"
    assert row.n_bytes == len("Yes, it is.")


@pytest.mark.parametrize("render", ["role_eos", "role_colon"])
@pytest.mark.parametrize("tokenizer", [llama_like, qwen_like])
def test_a_whole_prompt_has_the_tokens_that_a_server_sends(tmp_path, tokenizer, render):
    """Of one or two questions; an earlier answer is in the prompt, too."""
    differ = 0
    for n in (2, 4):
        served = templates.with_template(shipped("tulu3", render=render), tokenizer())
        sent = served.apply_chat_template(
            TURNS[: n - 1], add_generation_prompt=True, tokenize=False
        )
        sent = served(sent, add_special_tokens=False).input_ids
        alone, whole = (
            tokens_of(tmp_path, tokenizer(), TURNS[:n], render=render, whole_prompt=w)[1]
            for w in (False, True)
        )
        asked = whole.loss.tolist().index(True)
        assert whole.tokens[:asked].tolist() == sent
        answers = [e.tokens[e.loss].tolist() for e in (alone, whole)]
        assert answers[0] == answers[1] and whole.n_bytes == alone.n_bytes
        differ += not np.array_equal(alone.tokens, whole.tokens)
    assert differ == (2 if render == "role_eos" else 0)


def test_an_answer_that_ends_with_eos_needs_a_tokenizer_that_has_one(tmp_path):
    tokenizer = copy.deepcopy(qwen_like())
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"tokenizer has none.*or set dataset.render=role_colon"):
        tokens_of(tmp_path, tokenizer, render="role_eos")
    assert tokens_of(tmp_path, tokenizer)[0].endswith("[User] [:]")


def weighted(*weights, turns=TURNS):
    """The turns with a weight for each message; none where it is ...."""
    return [m if w is ... else {**m, "weight": w} for m, w in zip(turns, weights)]


YES, NO = "[_Yes] [,] [_it] [_is] [.//]", "[_No] [!//] [User] [:]"
ASKED, EOS = "User : _So ? _ 3 4 5 // Assistant :", "<|endoftext|>"


@pytest.mark.parametrize(
    "weights, changes, text",
    [
        # the last message is no answer: nothing follows it
        ((..., ..., ...), {"mask": "completion"}, f": {YES} {ASKED[: -len(' Assistant :')]}"),
        ((..., 0, ..., ...), {"mask": "completion"}, f": _Yes , _it _is .// {ASKED} {NO}"),
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
def test_messages_of_weight_1_are_learned_and_of_weight_0_are_not(tmp_path, weights, changes, text):
    assert tokens_of(tmp_path, qwen_like(), weighted(*weights), **changes)[0].endswith(text)


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
    for mask, learned in (("last_assistant", ["No!"]), ("completion", ["Yes, it is.", "No!"])):
        found = whole.rstrip("\n"), "".join(f"{x}{eos}" for x in learned), len("".join(learned))
        assert chat(tmp_path, CHAT, mask) == found
    text, trained, _ = chat(tmp_path, CHAT, "all")
    assert text == whole and trained == text[1:]  # nothing predicts the first token
    text, _, _ = chat(tmp_path, CHAT, "last_assistant", messages=TURNS[:3])
    assert text.endswith(f"Yes, it is.{eos}")  # what follows the last answer is left out


@pytest.mark.parametrize("mask", ["completion", "last_assistant", "all"])
@pytest.mark.parametrize("weights", [(0, 1), (1, 0), (..., 0), (0, ...), (1, 1)])
def test_weights_in_a_chat_template_are_those_of_the_texts_characters(tmp_path, mask, weights):
    """Against a mask by places in the whole text: answers are found in it by their words, and each
    token is looked up by the characters that it stands for."""
    tokenizer = chatting(CHAT)
    whole, eos = tokenizer.apply_chat_template(TURNS, tokenize=False), tokenizer.eos_token
    by_default = {"completion": (1, 1), "last_assistant": (0, 1), "all": (1, 1)}[mask]
    if mask == "last_assistant" and weights[1] == 0:
        by_default = (1, 1)  # the first is then the last one that may be learned
    learned = [d if w is ... else w for d, w in zip(by_default, weights)]
    inside = [mask == "all"] * len(whole)
    for answer, counts in zip(("Yes, it is.", "No!"), learned):
        start = whole.index(answer)
        span = slice(start, start + len(answer + eos))
        inside[span] = [bool(counts)] * len(inside[span])
    given = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    reference = [inside[start] for start, _ in given.offset_mapping]
    reference[0] = False
    turns = weighted(..., weights[0], ..., weights[1])
    _, row = tokens_of(tmp_path, tokenizer, turns, mask=mask, render="chat_template")
    n = len(row.tokens)  # what follows the last answer in the loss is left out
    assert row.tokens.tolist() == given.input_ids[:n] and row.loss.tolist() == reference[:n]
    assert not any(reference[n:])


@pytest.mark.parametrize("form", ["messages", "conversations"])
@pytest.mark.parametrize(
    "k, weight, says",
    [
        (1, 0.5, r"\[1\].weight of .*'assistant' is 0.5. Allowed: 0 \(not learned\), 1"),
        (3, True, r"\[3\].weight of .* is True"),
        (3, "1", r"\[3\].weight of .* is '1'"),
        (0, 1, r"\[0\].weight of a message of role 'user' is 1. Allowed: 0"),
    ],
)
def test_other_weights_are_refused_with_row_and_field(tmp_path, form, k, weight, says):
    keys = LISTS[form]
    names = {"user": "human", "assistant": "gpt"} if form == "conversations" else {}
    good = [dict(zip(keys, (names.get(m["role"], m["role"]), m["content"]))) for m in TURNS]
    turns = [{**m, "weight": weight} if i == k else m for i, m in enumerate(good)]
    path = write_json(tmp_path / "train.jsonl", [{form: good}, {form: turns}])
    with pytest.raises(DataError, match=rf"train.jsonl:2: {form}{says}"):
        own.count(str(path))
    write_json(path, [{"messages": weighted(..., 1, ..., 0)}])
    assert own.count(str(path)).answer_bytes == len("Yes, it is.")
    with pytest.raises(DataError, match=r"jsonl:1: no token counts.*give one weight 1"):
        tokens_of(tmp_path, qwen_like(), weighted(..., 0, ..., 0))


def test_a_template_that_rewrites_what_came_before_trains_the_last_answer_only(tmp_path):
    text, trained, _ = chat(tmp_path, FORGETS, "last_assistant")
    assert trained.startswith("No!") and "Yes, it is." not in text
    for template, words in (
        (FORGETS, r":1: .*does not take the row with mask=completion"),
        (None, "render=chat_template, but the tokenizer has none"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ):
        with pytest.raises(DataError, match=words):
            chat(tmp_path, template, "completion")
    # a date is the same one every day
    assert chat(tmp_path, "{{ date_string }}" + CHAT, "all")[0].startswith("26 Jul 2024")

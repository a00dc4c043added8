"""Messages as text, token by token, on tokenizers that split as Llama 3's and Qwen's do."""

import dataclasses
import json

import pytest

from lorasweep.data import load as data
from lorasweep.errors import SpecError
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


def test_the_form_of_messages_is_part_of_a_run_and_checked_before_it_starts():
    def with_data(**changes):
        return dataclasses.replace(spec, dataset=dataclasses.replace(spec.dataset, **changes))

    spec = dataclasses.replace(
        tiny_spec(), dataset=compose_request(["dataset=tulu3"]).points[0].spec.dataset
    )
    before = with_data(render="role_eos")
    assert "render" not in before.plain()["dataset"] and before.id != spec.id
    with pytest.raises(SpecError, match=r"render='chatml'. Allowed: role_colon, role_eos"):
        validate(with_data(render="chatml"))
    with pytest.raises(SpecError, match="has no effect with format='prompt_completion'"):
        validate(with_data(format="prompt_completion"))

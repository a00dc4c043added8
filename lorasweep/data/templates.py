"""Write the form in which rows are trained as a chat template, for servers, and check it.

Jinja as transformers renders it. In a template, `messages` are what a client sends: for rows with
two columns the prompt and the completion, as they are in the columns.
"""

import copy
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lorasweep.data import messages, text
from lorasweep.data.messages import Turn
from lorasweep.data.sources import Row
from lorasweep.errors import DataError
from lorasweep.spec.dataset import FIRST_RENDER, DatasetSpec

ONE_PROMPT = "this adapter was trained on one prompt and its completion: send one user message"
FILLED = (
    "{%% set ns = namespace(filled=[]) %%}{%% for m in messages %%}{%% set ns.filled = ns.filled + "
    '[dict(m, content=%s) if m.role == "user" else m] %%}{%% endfor %%}'
    '{%% set messages = ns.filled %%}{{ "" }}'
)
"""Put the user's messages in a data set's template, before a chat template. The empty text at the
end keeps a line end that follows, which Jinja would remove."""


def with_template(spec: DatasetSpec, tokenizer: Any) -> Any:
    """Return a copy of the tokenizer whose chat template renders messages as rows are rendered."""
    found, given = copy.copy(tokenizer), getattr(tokenizer, "chat_template", None)
    if spec.render != "chat_template":
        found.chat_template = _plain(spec, bool(text.bos_of(spec, tokenizer)))
    elif isinstance(given, dict):  # several, by name, such as one for tools
        found.chat_template = {name: _extended(spec, one) for name, one in given.items()}
    else:
        found.chat_template = _extended(spec, given or "")
    return found


def _user(spec: DatasetSpec) -> str:
    """Return the Jinja expression for the text of a user's message `m`."""
    if spec.format in messages.LISTS or spec.template == "{prompt}":
        return "m.content"
    return f'{_literal(spec.template)} | replace("{{prompt}}", m.content)'


def _extended(spec: DatasetSpec, given: str) -> str:
    """Return the tokenizer's template with the data set's, and with the date of training."""
    if "date_string" in given:
        given = f'{{% set date_string = {_literal(text.DATE)} %}}{{{{ "" }}}}{given}'
    return given if _user(spec) == "m.content" else FILLED % _user(spec) + given


def _plain(spec: DatasetSpec, bos: bool) -> str:
    """Return a template for the forms role_eos and role_colon of `text.parts_of`."""
    role = '{{ ("system" if m.role == "developer" else m.role) | capitalize }}'
    said = f'({_user(spec)} if m.role == "user" else m.content)'
    answer, start = 'm.role == "assistant"', "{{ bos_token }}" if bos else ""
    if spec.render == "role_colon":
        each = f'{role}{{{{ ": " ~ {said} ~ "\\n\\n" }}}}'
        end = '{% if add_generation_prompt %}{{ "Assistant:" }}{% elif messages and '
        end += 'messages[-1].role == "assistant" %}{{ "User:" }}{% endif %}'
    elif spec.format in messages.LISTS:
        each = f'{role}{{{{ ": " ~ {said} ~ (eos_token if {answer} else "\\n\\n") }}}}'
        end = '{% if add_generation_prompt %}{{ "Assistant: " }}{% endif %}'
    else:
        each, end = f'{{{{ {said} ~ (eos_token if {answer} else "") }}}}', ""
        start += '{% if messages | map(attribute="role") | list not in [["user"], ["user", '
        start += f'"assistant"]] %}}{{{{ raise_exception({_literal(ONE_PROMPT)}) }}}}{{% endif %}}'
    return f"{start}{{% for m in messages %}}{each}{{% endfor %}}{end}"


def _literal(given: str) -> str:
    """Return a text as a literal of Jinja, which reads the escapes of JSON."""
    return json.dumps(given, ensure_ascii=False)


def request_of(spec: DatasetSpec, row: Any, where: str) -> tuple[list[Turn], list[dict[str, Any]]]:
    """Return a row as a client sends it to a server: its messages, and its tools."""
    found = messages.read(dataclasses.replace(spec, template="{prompt}"), row, where)
    return found.turns, found.tools


def check_rows(spec: DatasetSpec, rows: Iterable[Row], tokenizer: Any) -> None:
    """Compare rows as servers would render them with the same rows as they are trained on.

    Raises:
        DataError: a text differs.
    """
    served = with_template(spec, tokenizer)
    for where, row in rows:
        pieces = text.rendered(spec, row, where, tokenizer)
        check(spec, served, *request_of(spec, row, where), pieces, where)


def check(
    spec: DatasetSpec,
    served: Any,
    turns: list[Turn],
    tools: list[dict[str, Any]],
    pieces: list[list[Any]],
    where: str,
) -> None:
    """Compare the text of a request with the text trained on, `pieces` of [text, in the loss].

    The whole conversation has the same text, and the prompt of the last answer in the loss ends
    where that answer begins. By a chat template, text after the last answer in the loss is not
    trained on. With mask=all, which has no prompts, only the whole is compared.

    Raises:
        DataError: the texts differ.
    """

    def apply(turns: list[Turn], is_open: bool) -> str:
        how = {"tools": tools or None, "tokenize": False}
        return served.apply_chat_template(turns, add_generation_prompt=is_open, **how)

    trained = "".join(piece for piece, _ in pieces)
    last = max((k for k, (_, in_loss) in enumerate(pieces) if in_loss), default=0)
    prompt = "".join(piece for piece, _ in pieces[:last])
    answers = [k for k, turn in enumerate(turns) if turn["role"] == "assistant"]
    what = ""
    try:
        found = apply(turns, False)
        same = found.startswith(trained) if spec.render == "chat_template" else found == trained
        if same and prompt and spec.mask != "all":
            found, trained = apply(turns[: answers[-1]], True), prompt
            same = any(apply(turns[:k], True) == prompt for k in reversed(answers))
        if not same:
            pairs = enumerate(zip(found, trained))
            differ = next((k for k, (a, b) in pairs if a != b), min(len(found), len(trained)))
            near = slice(max(0, differ - 20), differ + 20)
            what = f"gives {found[near]!r} where training has {trained[near]!r}"
    except Exception as error:  # templates may raise any exception
        what = f"raises {error}"
    if what:
        other = "role_colon" if spec.render != "role_colon" else FIRST_RENDER
        raise DataError(
            f"{where}: the chat template for servers {what}. An adapter could not be served in the "
            f"form render={spec.render} in which it is trained. Set dataset.render={other}."
        )


def save(served: Any, stop: dict[str, list[Any]], folder: Path) -> None:
    """Write a tokenizer with its chat template, and where generation ends, as transformers does."""
    served.save_pretrained(folder)
    path = folder / "generation_config.json"  # a whole model has other settings there
    ends = json.loads(path.read_text()) if path.is_file() else {}
    ends["eos_token_id"] = [served.eos_token_id, *stop.get("stop_token_ids", ())]
    if "stop" in stop:
        ends["stop_strings"] = stop["stop"]
    path.write_text(json.dumps(ends, indent=2))

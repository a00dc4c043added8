"""Read messages, prompts and loss masks from rows of the known formats.

Functions that take a row raise DataError, with file and line, if a column of its format is missing
or a weight is neither 0 nor 1.
"""

import json
from typing import Any

from lorasweep.data import chat
from lorasweep.data.chat import LISTS, WEIGHT, Turn
from lorasweep.errors import DataError
from lorasweep.spec.dataset import DatasetSpec

JOINED = "+"
"""Joins the names of several columns in DatasetSpec.prompt_field."""
Message = tuple[str, str]
"""Role and text. The text of a message that calls tools has the calls, too."""


def columns(spec: DatasetSpec) -> tuple[str, ...]:
    """Return the columns that rows of a data set must have."""
    pair = (*spec.prompt_field.split(JOINED), spec.completion_field)
    needed = (spec.format,) if spec.format in LISTS else pair
    return (*needed, spec.answer_field) if spec.answer_field else needed


def turns_of(spec: DatasetSpec, row: Any, where: str) -> list[Turn]:
    """Return a row's messages for a chat template; a prompt and a completion make two messages."""
    tools = [chat.TOOLS] if spec.format == "messages" else []
    chat.refuse_columns(row, [*columns(spec), *tools], where)
    if spec.format not in LISTS:
        prompt, completion = prompt_and_completion(spec, row, where)
        said = (("user", prompt), ("assistant", completion))
        return [{"role": role, "content": content} for role, content in said]
    turns = chat.turns_of(spec.format, row, where)
    for k, (message, turn) in enumerate(zip(row[spec.format], turns)):
        weight, field = message.get(WEIGHT), f"{where}: {spec.format}[{k}].{WEIGHT}"
        if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
            raise DataError(
                f"{field} is {weight!r}. Allowed: 0 (the answer is not learned), 1 (it is), or no "
                f"{WEIGHT}. Correct the row."
            )
        if weight == 1 and turn["role"] != "assistant" and spec.mask != "all":
            raise DataError(
                f"{field} is 1 on a message of role {turn['role']!r}. With mask={spec.mask} only "
                f"answers of the assistant are learned. Remove the {WEIGHT}, or set mask=all."
            )
    return turns


def messages_of(spec: DatasetSpec, row: Any, where: str) -> list[Message]:
    """Return the role and the text of each of a row's messages."""
    return [(turn["role"], chat.text_of(turn)) for turn in turns_of(spec, row, where)]


def whole_of(spec: DatasetSpec, row: Any, where: str) -> tuple[Message, ...]:
    """Return a row's tools, if any, as one message, and its messages. Equal rows are duplicates."""
    messages = messages_of(spec, row, where)
    tools = chat.tools_of(spec.format, row, where)
    described = [(chat.TOOLS, json.dumps(tools, sort_keys=True))] if tools else []
    return (*described, *messages)


def in_loss(spec: DatasetSpec, row: Any, where: str) -> list[bool]:
    """Return for each of a row's messages whether its content is in the loss.

    The weight of a message decides, else the mask. last_assistant skips answers of weight 0.
    """
    roles = [turn["role"] for turn in turns_of(spec, row, where)]
    listed = row[spec.format] if spec.format in LISTS else [{}] * len(roles)
    weights = [message.get(WEIGHT) for message in listed]
    answers = [i for i, role in enumerate(roles) if role == "assistant" and weights[i] != 0]
    by_mask = {"all": range(len(roles)), "completion": answers, "last_assistant": answers[-1:]}
    learned = by_mask[spec.mask]
    return [i in learned if weight is None else weight == 1 for i, weight in enumerate(weights)]


def prompt_and_completion(spec: DatasetSpec, row: Any, where: str) -> tuple[str, str]:
    """Return the prompt (in the template) and the completion of a row with two columns."""
    name = spec.prompt_field
    names = [name] if isinstance(row, dict) and name in row else name.split(JOINED)
    texts = [text_of(row, one, where) for one in names]
    said = "\n\n".join(filter(None, texts)) if len(texts) > 1 else texts[0]
    prompt = spec.template.replace("{prompt}", said)
    return prompt, text_of(row, spec.completion_field, where)


def opening(spec: DatasetSpec, row: Any, where: str) -> tuple[Message, ...]:
    """Return what precedes a row's first answer. Rows with equal openings share a prompt."""
    whole = whole_of(spec, row, where)
    roles = [role for role, _ in whole]
    return whole[: roles.index("assistant")] if "assistant" in roles else whole


def prompt_of(spec: DatasetSpec, row: Any, where: str) -> tuple[Message, ...]:
    """Return a row's prompt: its tools, and the messages before the first one in the loss.

    If only the last answer of a conversation is in the loss, that is all of the conversation before
    it; if all answers are in the loss, what precedes the first one.
    """
    whole, learned = whole_of(spec, row, where), in_loss(spec, row, where)
    after = len(learned) - learned.index(True) if True in learned else 0
    return whole[: len(whole) - after]


def text_of(row: Any, name: str, where: str) -> str:
    """Return the text in a row's column; raise DataError if there is none."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with a text {name!r}, got {str(row)[:40]!r}.")
    if name not in row:
        there = ", ".join(map(str, sorted(row))) or "none"
        raise DataError(
            f"{where}: no field {name!r}, only {there}. Correct the row, or set prompt_field, "
            "completion_field and answer_field of the data set."
        )
    if not isinstance(row[name], str):
        raise DataError(
            f"{where}: field {name!r} is {str(row[name])[:40]} ({type(row[name]).__name__}), not a "
            "text. Put it into quotes, or remove the row."
        )
    chat.check_text(row[name], f"{where}: field {name!r}")
    return row[name]

"""Read messages, prompts and loss masks from rows of the known formats.

Functions that take a row raise DataError, with file and line, if a column of its format is missing
or a weight is neither 0 nor 1.
"""

from typing import Any

from lorasweep.errors import DataError
from lorasweep.spec.dataset import DatasetSpec

Message = tuple[str, str]
"""Role and content."""
LISTS = {"messages": ("role", "content"), "conversations": ("from", "value")}
"""Format, which is also the column with a list of messages -> keys of sender and text."""
WEIGHT = "weight"
"""Key of a message, as in OpenAI's chat files. 1: the message is in the loss; 0: it is not."""
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""Senders in conversations -> roles."""


def columns(spec: DatasetSpec) -> tuple[str, ...]:
    """Return the columns that rows of a data set must have."""
    pair = (spec.prompt_field, spec.completion_field)
    needed = (spec.format,) if spec.format in LISTS else pair
    return (*needed, spec.answer_field) if spec.answer_field else needed


def messages_of(spec: DatasetSpec, row: Any, where: str) -> list[Message]:
    """Return a row's messages; a prompt (in the template) and a completion make two messages."""
    name = spec.format
    if name not in LISTS:
        prompt, completion = prompt_and_completion(spec, row, where)
        return [("user", prompt), ("assistant", completion)]
    speaker, content = LISTS[name]
    messages = row.get(name) if isinstance(row, dict) else None
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DataError(
            f"{where}: format={name} expects a list {name!r} of {{{speaker}, {content}}}. Correct "
            "the row, or set another format."
        )
    found = [(text_of(m, speaker, where), text_of(m, content, where)) for m in messages]
    if name == "conversations":
        for who, _ in found:
            if who not in SPEAKERS:
                raise DataError(
                    f"{where}: a message is from {who!r}. Allowed: {', '.join(SPEAKERS)}. Correct "
                    "the row, or write it as format=messages."
                )
        found = [(SPEAKERS[who], text) for who, text in found]
    for k, (message, (role, _)) in enumerate(zip(messages, found)):
        weight, field = message.get(WEIGHT), f"{where}: {name}[{k}].{WEIGHT}"
        if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
            raise DataError(
                f"{field} is {weight!r}. Allowed: 0 (the answer is not learned), 1 (it is), or no "
                f"{WEIGHT}. Correct the row."
            )
        if weight == 1 and role != "assistant" and spec.mask != "all":
            raise DataError(
                f"{field} is 1 on a message of role {role!r}. With mask={spec.mask} only answers "
                f"of the assistant are learned. Remove the {WEIGHT}, or set mask=all."
            )
    return found


def in_loss(spec: DatasetSpec, row: Any, where: str) -> list[bool]:
    """Return for each of a row's messages whether its content is in the loss.

    The weight of a message decides, else the mask. last_assistant skips answers of weight 0.
    """
    messages = messages_of(spec, row, where)
    listed = row[spec.format] if spec.format in LISTS else [{}] * len(messages)
    weights = [message.get(WEIGHT) for message in listed]
    answers = [i for i, (role, _) in enumerate(messages) if role == "assistant" and weights[i] != 0]
    by_mask = {"all": range(len(messages)), "completion": answers, "last_assistant": answers[-1:]}
    learned = by_mask[spec.mask]
    return [i in learned if weight is None else weight == 1 for i, weight in enumerate(weights)]


def prompt_and_completion(spec: DatasetSpec, row: Any, where: str) -> tuple[str, str]:
    """Return the prompt (in the template) and the completion of a row with two columns."""
    prompt = spec.template.replace("{prompt}", text_of(row, spec.prompt_field, where))
    return prompt, text_of(row, spec.completion_field, where)


def opening(spec: DatasetSpec, row: Any, where: str) -> tuple[Message, ...]:
    """Return the messages before a row's first answer. Rows with equal ones share a prompt."""
    messages = messages_of(spec, row, where)
    roles = [role for role, _ in messages]
    return tuple(messages[: roles.index("assistant")] if "assistant" in roles else messages)


def prompt_of(spec: DatasetSpec, row: Any, where: str) -> tuple[Message, ...]:
    """Return a row's prompt: the messages before the first one in the loss.

    If only the last answer of a conversation is in the loss, that is all of the conversation before
    it; if all answers are in the loss, what precedes the first one.
    """
    messages, learned = messages_of(spec, row, where), in_loss(spec, row, where)
    return tuple(messages[: learned.index(True)] if True in learned else messages)


def text_of(row: Any, name: str, where: str) -> str:
    """Return the text in a row's column; raise DataError if there is none."""
    if not isinstance(row, dict) or not isinstance(row.get(name), str):
        keys = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(
            f"{where}: no text field {name!r}. The row has: {keys}. Set prompt_field, "
            "completion_field and answer_field in the dataset file."
        )
    return row[name]

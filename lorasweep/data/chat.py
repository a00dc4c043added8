"""Read a chat row: its messages, the tools that they may call, and what is refused in it.

Rows have the form of OpenAI's chat files (`messages`, with `tools`) or of ShareGPT
(`conversations`). Functions raise DataError, with file, row and the place in the row.
"""

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from lorasweep.data.sources import parsed
from lorasweep.errors import DataError

Turn = dict[str, Any]
"""A message as chat templates take it: role, content, tool_calls, and other keys of the row."""
LEARNED = ("train", "training", "trainable", "learn", "loss", "mask", "masked")
"""Keys with which other programs mark the messages that are learned."""
LISTS = {"messages": ("role", "content"), "conversations": ("from", "value")}
"""Format, which is also the column with a list of messages -> keys of sender and text."""
WEIGHT = "weight"
"""Key of a message, as in OpenAI's chat files. 1: the message is in the loss; 0: it is not."""
TOOLS, CALLS = "tools", "tool_calls"
"""Key of a row with the tools that may be called; key of a message with calls of the assistant."""
ROLES = {
    "messages": {"developer": "system"} | {r: r for r in ("system", "user", "assistant", "tool")},
    "conversations": {
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        "system": "system",
    },
}
"""Format -> senders -> roles."""
CALL = '{"type": "function", "function": {"name": NAME, "arguments": {...}}}'
TOOL = '{"type": "function", "function": {"name": NAME, "parameters": {...}}}'
WITH_TOOLS = "with tools"
OF_ROWS = {
    *("system", "system_prompt", "history", "documents", "image", "images", "audio", "audios"),
    *("video", "videos", "weight", "label", "chat_template_kwargs", "functions", TOOLS),
}
"""Columns that change what is to be learned. Only tools of messages are read."""


def turns_of(form: str, row: Any, where: str) -> list[Turn]:
    """Return the messages of a row, for a chat template."""
    speaker, content = LISTS[form]
    messages = row.get(form) if isinstance(row, dict) else None
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise DataError(
            f"{where}: format={form} expects a list {form!r} of {{{speaker}, {content}}}. Correct "
            "the row, or set another format."
        )
    turns = []
    for k, message in enumerate(messages):
        at, who = f"{where}: {form}[{k}]", message.get(speaker)
        if not isinstance(who, str) or who not in ROLES[form]:
            allowed = ", ".join(ROLES[form])
            raise DataError(f"{at}: a message is from {who!r}. Allowed: {allowed}. Correct it.")
        turn: Turn = {"role": ROLES[form][who]}
        calls = _calls(message, turn["role"], at)
        turn["content"] = _content(message.get(content), bool(calls), f"{at}.{content}")
        if calls:
            turn[CALLS] = calls
        read = {speaker, content, WEIGHT, CALLS}
        others = {k: v for k, v in message.items() if v is not None and k not in read}
        if twice := turn.keys() & others:
            raise DataError(f"{at}: {min(twice)!r} beside {speaker} and {content}. Remove one.")
        turns.append(turn | others)
    return turns


def others_of(turn: Turn) -> dict[str, Any]:
    """Return what a message has beside its role, text and calls, unless it is empty or false.

    Of keys that say what is learned, false is a value, too.
    """
    read = {"role", "content", CALLS, *(("tool_call_id", "name") if turn["role"] == "tool" else ())}
    marks = {k for k in turn if k in LEARNED and turn[k] not in (None, "")}
    return {k: v for k, v in turn.items() if k not in read and (v or k in marks)}


def refuse_columns(row: Any, read: Collection[str], where: str) -> None:
    """Raise DataError if a row has a value in a column that changes what is to be learned."""
    for name in OF_ROWS - {*read} if isinstance(row, dict) else ():
        given = row.get(name)
        if given not in (None, "", "[]", [], {}) and (name != "label" or isinstance(given, bool)):
            raise DataError(
                f"{where}: column {name!r} is {given!r:.80}, and is not read. Write it into the "
                "messages or the prompt, or remove the column."
            )


def _content(given: Any, calling: bool, at: str) -> str | None:
    """Return a message's text, or that of its parts; None is allowed beside calls of tools."""
    if isinstance(given, str):
        check_text(given, at)
    if isinstance(given, str) or (given is None and calling):
        return given
    if not isinstance(given, list):
        raise DataError(
            f"{at} is {'null' if given is None else repr(given)[:80]}. Allowed: a text, a list of "
            f"text parts, or null in a message with {CALLS}. Correct or remove the row."
        )
    for k, part in enumerate(given):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"{at}[{k}] is a part of type {kind!r}. Only text is trained. Allowed: "
                '{"type": "text", "text": TEXT}. Remove the part or the row.'
            )
    text = "".join(part["text"] for part in given)
    check_text(text, at)
    return text


def check_text(text: str, at: str) -> None:
    """Raise DataError if a text has half of a UTF-16 pair, as of an emoji that was cut in two."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{at}: character {error.start + 1} is {text[error.start]!r}, half of a character, "
            "which no tokenizer reads. Correct the text or remove the row."
        ) from None


def _calls(message: Mapping[str, Any], role: str, at: str) -> list[dict[str, Any]]:
    """Return the calls of tools in a message, with their arguments as objects."""
    given = message.get(CALLS) or []
    if given and role != "assistant":
        raise DataError(f"{at} has {CALLS}, but is from {role!r}. Only the assistant calls tools.")
    found = []
    for k, function in enumerate(_functions(given, f"{at}.{CALLS}", CALL)):
        arguments = _from_json(function.get("arguments"))
        if not isinstance(arguments, dict):
            raise DataError(
                f"{at}.{CALLS}[{k}].function.arguments is {function.get('arguments')!r:.80}. "
                "Allowed: an object, or its JSON as text ('{}' for none). Correct the row."
            )
        found.append({**given[k], "function": {**function, "arguments": arguments}})
    return found


def tools_of(form: str, row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the tools that a row of messages describes, as a list or as the list's JSON."""
    if form != "messages":
        return []
    given = _from_json(row.get(TOOLS)) or []
    _functions(given, f"{where}: {TOOLS}", TOOL)
    return given


def _functions(given: Any, at: str, form: str) -> list[dict[str, Any]]:
    """Return the functions in a list of tools or of calls; each has a name."""
    if not isinstance(given, list):
        raise DataError(f"{at} is {given!r:.80}. Expected a list of {form}. Correct the row.")
    for k, entry in enumerate(given):
        function = entry.get("function") if isinstance(entry, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not (isinstance(name, str) and name and entry.get("type") in ("function", None)):
            raise DataError(f"{at}[{k}] is {entry!r:.80}. Expected {form}. Correct the row.")
    return [entry["function"] for entry in given]


def _from_json(given: Any) -> Any:
    """Return what a text says in JSON; anything else as it is."""
    with suppress(ValueError):
        return parsed(given) if isinstance(given, str) else given
    return given


def text_of(turn: Turn) -> str:
    """Return a message as one text: its content, then as JSON its calls and its other keys."""
    functions = [call["function"] for call in turn.get(CALLS, ())]
    calls = [{"name": f["name"], "arguments": f["arguments"]} for f in functions]
    more = [json.dumps(part, sort_keys=True) for part in (calls, others_of(turn)) if part]
    return "".join([turn["content"] or "", *more])


def kinds_of(form: str, row: Mapping[str, Any]) -> list[str]:
    """Return the format of a row that was read, and what it has that is not in every such row."""
    if form not in LISTS:
        return [form]
    messages, (speaker, content) = row[form], LISTS[form]
    calling = any(m.get(CALLS) or m[speaker] == "tool" for m in messages)
    kinds = {
        WITH_TOOLS: calling or (form == "messages" and row.get(TOOLS)),
        "with weights": any(m.get(WEIGHT) is not None for m in messages),
        "with text parts": any(isinstance(m.get(content), list) for m in messages),
    }
    kinds |= {f"with {key}": True for turn in turns_of(form, row, "") for key in others_of(turn)}
    return [form, *(kind for kind, found in kinds.items() if found)]


def rows_line(counts: Mapping[str, int]) -> str:
    """Say how many rows of which kind were understood. `counts`: number of rows by `kinds_of`."""
    ordered = sorted(counts, key=lambda kind: kind.startswith("with "))
    total = sum(counts[kind] for kind in ordered if not kind.startswith("with "))
    return f"rows: {total:,} understood: " + ", ".join(f"{counts[k]:,} {k}" for k in ordered)

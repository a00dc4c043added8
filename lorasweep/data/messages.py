"""Read a row of a known format: its messages, which of them are learned, and their tools.

A row has two columns of text, or a list of messages in the form of OpenAI's chat files (`messages`,
with `tools`) or of ShareGPT (`conversations`).
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from lorasweep.errors import DataError
from lorasweep.spec.dataset import DatasetSpec

Turn = dict[str, Any]
"""A message as chat templates take it: role, content, tool_calls, and other keys of the row."""
Message = tuple[str, str]
"""Role and text. The text of a message that calls tools has the calls, too."""
DATE = "26 Jul 2024"
"""Date in chat templates, so that rows do not depend on the day: the default in Llama templates."""
JOINED = "+"
"""Joins the names of several columns in DatasetSpec.prompt_field."""
LEARNED = ("train", "training", "trainable", "learn", "loss", "mask", "masked")
"""Keys with which other programs mark the messages that are learned."""
LISTS = {"messages": ("role", "content"), "conversations": ("from", "value")}
"""Format, which is also the column with a list of messages -> keys of sender and text."""
WEIGHT = "weight"
"""Key of a message, as in OpenAI's chat files. 1: the message is in the loss; 0: it is not."""
TOOLS, CALLS = "tools", "tool_calls"
"""Key of a row with the tools that may be called; key of a message with calls of the assistant."""
_SAME = {role: role for role in ("system", "user", "assistant")}
ROLES = {
    "messages": {"developer": "system", **_SAME, "tool": "tool"},
    "conversations": {"human": "user", "gpt": "assistant", **_SAME},
}
"""Format -> senders -> roles."""
CALL = '{"type": "function", "function": {"name": NAME, "arguments": {...}}}'
TOOL = '{"type": "function", "function": {"name": NAME, "parameters": {...}}}'
OF_ROWS = {
    *("system", "system_prompt", "history", "documents", "image", "images", "audio", "audios"),
    *("video", "videos", "weight", "label", "chat_template_kwargs", "functions", TOOLS),
}
"""Columns that change what is to be learned. Only tools of messages are read."""


@dataclass(frozen=True)
class Conversation:
    """A row that was read."""

    turns: list[Turn]
    """The messages for a chat template; a prompt and a completion make two."""
    learned: list[bool]
    """Whether the content of each message is in the loss: its weight decides, else the mask."""
    tools: list[dict[str, Any]]
    kinds: list[str]
    """The format, and what the row has that is not in every such row."""

    @property
    def messages(self) -> list[Message]:
        """The role and the text of each message."""
        return [(turn["role"], text_of(turn)) for turn in self.turns]

    @property
    def whole(self) -> tuple[Message, ...]:
        """The tools, if any, as one message, and the messages. Equal rows are duplicates."""
        described = [(TOOLS, json.dumps(self.tools, sort_keys=True))] if self.tools else []
        return (*described, *self.messages)

    @property
    def opening(self) -> tuple[Message, ...]:
        """What precedes the first answer, or the whole row."""
        return self._before([turn["role"] == "assistant" for turn in self.turns])

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What precedes the first message in the loss, earlier answers included."""
        return self._before(self.learned)

    def _before(self, marks: list[bool]) -> tuple[Message, ...]:
        whole = self.whole
        return whole[: len(whole) - (len(marks) - marks.index(True) if True in marks else 0)]


def columns(spec: DatasetSpec) -> tuple[str, ...]:
    """Return the columns that rows of a data set must have."""
    pair = (*spec.prompt_field.split(JOINED), spec.completion_field)
    needed = (spec.format,) if spec.format in LISTS else pair
    return (*needed, spec.answer_field) if spec.answer_field else needed


def read(spec: DatasetSpec, row: Any, where: str) -> Conversation:
    """Read a row; DataError, with file, row and place, if it lacks or has what cannot be learned.

    mask=last_assistant skips answers of weight 0.
    """
    form = spec.format
    if not isinstance(row, dict):
        _refuse(f"{where}: the row", row, f"an object with {' and '.join(columns(spec))}")
    for name in OF_ROWS - {*columns(spec), *([TOOLS] if form == "messages" else ())}:
        given = row.get(name)
        if given not in (None, "", "[]", [], {}) and (name != "label" or isinstance(given, bool)):
            _refuse(f"{where}: column {name!r}", given, "no value, as it is not read")
    tools: list[dict[str, Any]] = []
    kinds, weights = dict[str, Any](), [None, None]
    if form not in LISTS:
        name = spec.prompt_field
        names = [name] if name in row else name.split(JOINED)
        *texts, answer = (_column(row, one, where) for one in (*names, spec.completion_field))
        said = "\n\n".join(filter(None, texts)) if len(texts) > 1 else texts[0]
        both = (("user", spec.template.replace("{prompt}", said)), ("assistant", answer))
        turns = [{"role": role, "content": content} for role, content in both]
    else:
        speaker, content = LISTS[form]
        given = row.get(form)
        if not isinstance(given, list) or not all(isinstance(m, dict) for m in given):
            _refuse(f"{where}: {form}", given, f"a list of {{{speaker}, {content}}}")
        turns = [_turn(form, message, f"{where}: {form}[{k}]") for k, message in enumerate(given)]
        if form == "messages":
            tools = _from_json(row.get(TOOLS)) or []
            _functions(tools, f"{where}: {TOOLS}", TOOL)
        weights = [message.get(WEIGHT) for message in given]
        kinds = {
            "with tools": tools or any(CALLS in t or t["role"] == "tool" for t in turns),
            "with weights": any(weight is not None for weight in weights),
            "with text parts": any(isinstance(m.get(content), list) for m in given),
            **{f"with {key}": True for turn in turns for key in others_of(turn)},
        }
    for k, (weight, turn) in enumerate(zip(weights, turns, strict=True)):
        can = turn["role"] == "assistant" or spec.mask == "all"
        if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)[: 1 + can]):
            at = f"{where}: {form}[{k}].{WEIGHT} of a message of role {turn['role']!r}"
            _refuse(at, weight, "0 (not learned), 1 (learned; only answers, or with mask=all)")
        check_text(turn["content"] or "", f"{where}: message {k + 1}")
    answers = [k for k, t in enumerate(turns) if t["role"] == "assistant" and weights[k] != 0]
    by_mask = {"all": range(len(turns)), "completion": answers, "last_assistant": answers[-1:]}
    learned = [k in by_mask[spec.mask] if w is None else w == 1 for k, w in enumerate(weights)]
    return Conversation(turns, learned, tools, [form, *(k for k, found in kinds.items() if found)])


def _refuse(at: str, given: Any, allowed: str) -> NoReturn:
    said = "null" if given is None else f"{given!r:.80}"
    raise DataError(f"{at} is {said}. Allowed: {allowed}. Correct or remove the row.")


def _column(row: Mapping[str, Any], name: str, where: str) -> str:
    if name not in row:
        raise DataError(
            f"{where}: no field {name!r}, only {', '.join(map(str, sorted(row))) or 'none'}. Set "
            "prompt_field, completion_field and answer_field, or correct the row."
        )
    if not isinstance(row[name], str):
        _refuse(f"{where}: field {name!r}", row[name], "a text, in quotes")
    return row[name]


def _turn(form: str, message: Mapping[str, Any], at: str) -> Turn:
    speaker, content = LISTS[form]
    who, said, calls = message.get(speaker), message.get(content), message.get(CALLS) or []
    if not isinstance(who, str) or who not in ROLES[form]:
        _refuse(f"{at}.{speaker}", who, ", ".join(ROLES[form]))
    turn: Turn = {"role": ROLES[form][who]}
    if calls and turn["role"] != "assistant":
        _refuse(f"{at}.{CALLS} of role {turn['role']!r}", calls, "calls of the assistant")
    if isinstance(said, list):
        for k, part in enumerate(said):
            text = part.get("text") if isinstance(part, dict) else None
            if not isinstance(text, str) or part.get("type") != "text":
                _refuse(f"{at}.{content}[{k}]", part, '{"type": "text", "text": TEXT}')
        said = "".join(part["text"] for part in said)
    if not (isinstance(said, str) or (said is None and calls)):
        more = f"a text, a list of text parts, or null in a message with {CALLS}"
        _refuse(f"{at}.{content}", said, more)
    turn["content"] = said
    for k, function in enumerate(_functions(calls, f"{at}.{CALLS}", CALL)):
        arguments = _from_json(function.get("arguments"))
        if not isinstance(arguments, dict):
            more = "an object, or its JSON as text ('{}' for none)"
            _refuse(f"{at}.{CALLS}[{k}].function.arguments", function.get("arguments"), more)
        call = {**calls[k], "function": {**function, "arguments": arguments}}
        turn.setdefault(CALLS, []).append(call)
    read = {speaker, content, WEIGHT, CALLS}
    others = {k: v for k, v in message.items() if v is not None and k not in read}
    if twice := turn.keys() & others:
        raise DataError(f"{at}: {min(twice)!r} beside {speaker} and {content}. Remove one.")
    return turn | others


def _functions(given: Any, at: str, form: str) -> list[dict[str, Any]]:
    """Return the functions in a list of tools or of calls; each has a name."""
    if not isinstance(given, list):
        _refuse(at, given, f"a list of {form}")
    for k, entry in enumerate(given):
        function = entry.get("function") if isinstance(entry, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not (isinstance(name, str) and name and entry.get("type") in ("function", None)):
            _refuse(f"{at}[{k}]", entry, form)
    return [entry["function"] for entry in given]


def _from_json(given: Any) -> Any:
    """Return what a text says in JSON; anything else as it is."""
    with suppress(ValueError, RecursionError):
        return parsed(given) if isinstance(given, str) else given
    return given


def parsed(text: str) -> Any:
    """Return the value of a JSON text; ValueError: it is none, or an object has a key twice."""
    return json.loads(text, object_pairs_hook=lambda pairs: once(*zip(*pairs)))


def once(names: Sequence[str] = (), values: Sequence[Any] = ()) -> dict[str, Any]:
    """Return named values; ValueError: a name comes twice, as only one would be read."""
    if len(names) > len({*names}) and (twice := {n for n in names if n and names.count(n) > 1}):
        raise ValueError(f"{min(twice)!r} is named twice: remove or rename one")
    return dict(zip(names, values))


def check_text(text: str, at: str) -> None:
    """Raise DataError if a text has half of a UTF-16 pair, as of an emoji that was cut in two."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"{at}: character {error.start + 1}"
        _refuse(half, text[error.start], "whole characters, not a half that no tokenizer reads")


def others_of(turn: Turn) -> dict[str, Any]:
    """Return what a message has beside its role, text and calls, unless it is empty or false.

    Of keys that say what is learned, false is a value, too.
    """
    read = {"role", "content", CALLS, *(("tool_call_id", "name") if turn["role"] == "tool" else ())}
    marks = {k for k in turn if k in LEARNED and turn[k] not in (None, "")}
    return {k: v for k, v in turn.items() if k not in read and (v or k in marks)}


def text_of(turn: Turn) -> str:
    """Return a message as one text: its content, then as JSON its calls and its other keys."""
    functions = [call["function"] for call in turn.get(CALLS, ())]
    calls = [{"name": f["name"], "arguments": f["arguments"]} for f in functions]
    more = [json.dumps(part, sort_keys=True) for part in (calls, others_of(turn)) if part]
    return "".join([turn["content"] or "", *more])


def rows_line(counts: Mapping[str, int]) -> str:
    """Say how many rows of which kind were understood. `counts`: number of rows by kind."""
    ordered = sorted(counts, key=lambda kind: kind.startswith("with "))
    total = sum(counts[kind] for kind in ordered if not kind.startswith("with "))
    return f"rows: {total:,} understood: " + ", ".join(f"{counts[k]:,} {k}" for k in ordered)

"""Render rows as text and tokenize them, with a loss mask.

All rows of a split are read before a run starts, and kept as arrays, in memory or mapped from a
file that all processes share. Errors name file and line.
"""

import copy
import dataclasses
import fcntl
import hashlib
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorasweep.data import messages
from lorasweep.data.examples import Example, Fit
from lorasweep.data.messages import CALLS, DATE, TOOLS, Conversation, Turn, others_of
from lorasweep.data.sources import Row, Source, each
from lorasweep.errors import DataError
from lorasweep.spec.dataset import FIRST_RENDER, DatasetSpec

TOGETHER = 256
"""Rows per call of the tokenizer, which is faster than one by one."""
VERSION = 4
"""Increase it when the same rows give other tokens, so that cached files are made again."""
NOT_IN_ROWS = (
    *("name", "revision", "test_revision", "n_train", "n_test", "n_test_curve"),
    *("n_validation", "unseen_rows", "answer_field", "verifier"),
)
"""DatasetSpec fields that change no row, or that are covered by the identity of the source."""


class Part(NamedTuple):
    """Text that is tokenized separately, so that the loss starts and ends on token borders."""

    text: str
    in_loss: bool
    eos: bool = False
    """Whether the EOS token follows. It is in the loss if the text is."""


# ---------------------------------------------------------------- tokenized rows

HEADER, DTYPES = 4096, ("<i8", "<i8", "<i4", "?")
"""A file of rows has HEADER bytes, {"rows", "tokens", "sha256", "fit"} as JSON filled up with
spaces, and four arrays: end of each row in the tokens, UTF-8 bytes of each row's text in the loss,
tokens, loss."""


class Rows(Sequence[Example]):
    """Tokenized rows, end to end in four arrays. Examples are views of them."""

    def __init__(self, arrays: Sequence[np.ndarray], fit: Fit | None = None) -> None:
        """Hold `arrays`: ends, n_bytes, tokens, loss."""
        self.arrays, self.fit = arrays, fit
        self.ends, self.n_bytes, self.tokens, self.loss = arrays

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "Rows":
        """Copy text examples into arrays, one by one, because a data set may be large."""
        ends, n_bytes, tokens, loss = [], [], bytearray(), bytearray()
        for e in examples:
            tokens += e.tokens.astype("<i4").tobytes()
            loss += e.loss.tobytes()
            ends.append(len(loss))
            n_bytes.append(e.n_bytes)
        counted = [np.array(ends, "<i8"), np.array(n_bytes, "<i8")]
        return cls([*counted, np.frombuffer(tokens, "<i4"), np.frombuffer(loss, "?")])

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, slice):
            return [self[i] for i in range(len(self))[k]]
        k = range(len(self))[k]  # raises IndexError beyond the end
        row = slice(self.ends[k - 1] if k else 0, self.ends[k])
        return Example(self.tokens[row], self.loss[row], int(self.n_bytes[k]))

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the four arrays."""
        digest = hashlib.sha256()
        for array in self.arrays:
            digest.update(array.data)
        return digest.hexdigest()


def kept(path: Path, make: Callable[[], Rows]) -> Rows:
    """Return the rows of a file; make and write them first if it is missing or damaged.

    Other processes wait for the one that writes. Where no file can be written, rows stay in memory.
    """
    if (rows := mapped(path)) is not None:
        return rows
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("ab")
    except OSError:  # as in a read-only folder
        return make()
    with lock:
        with suppress(OSError):  # without locks on the file system, processes repeat the work
            fcntl.flock(lock, fcntl.LOCK_EX)
        if (rows := mapped(path)) is not None:
            return rows
        made = make()
        sizes = {"rows": len(made), "tokens": len(made.tokens)}
        head = json.dumps({**sizes, "sha256": made.sha256, "fit": made.fit})
        partial = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(3).hex()}")
        try:
            with partial.open("wb") as file:
                file.writelines([head.encode().ljust(HEADER), *(a.data for a in made.arrays)])
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        return mapped(path) or made


def mapped(path: Path) -> Rows | None:
    """Map a file of rows; None if it is missing, or its size or checksum is wrong."""
    try:
        with path.open("rb") as file:
            head = json.loads(file.read(HEADER))
        counts = [int(head[k]) for k in ("rows", "rows", "tokens", "tokens")]
        whole = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
        sizes = [n * np.dtype(dtype).itemsize for n, dtype in zip(counts, DTYPES)]
        ends = np.cumsum([HEADER, *sizes])
        arrays = [whole[a:b].view(t) for a, b, t in zip(ends, ends[1:], DTYPES)]
        rows = Rows(arrays, head["fit"])
    except (OSError, ValueError, KeyError, TypeError):  # also of a file that is cut
        return None
    return rows if ends[-1] == len(whole) and rows.sha256 == head["sha256"] else None


# ---------------------------------------------------------------- rendering


def examples(
    spec: DatasetSpec, split: str, source: Source, tokenizer: Any, limit: int | None, cache: str
) -> Rows:
    """Tokenize the first `limit` usable rows of a split, or map them from the folder `cache`.

    Nothing is kept if `cache` is empty, or if the tokenizer is not of the `tokenizers` library.

    Raises:
        DataError: a row cannot be used, or there are no rows.
    """

    def make() -> Rows:
        given = source.rows()
        if spec.too_long == "cut":
            given = itertools.islice(given, limit)  # later rows may be unreadable
        lengths: list[int] = []
        found = Rows.of(itertools.islice(_tokenized(spec, given, tokenizer, lengths), limit))
        where = f"dataset {spec.name!r}, split {split!r}: no rows"
        if not lengths:
            raise DataError(
                f"{where} (unseen_prompts={spec.unseen_prompts}). Set train_split and test_split "
                "to splits that have rows."
            )
        enough = sorted(lengths)[math.ceil(0.99 * len(lengths)) - 1]
        if not found:
            raise DataError(
                f"{where} can be used (too_long={spec.too_long}, max_length={spec.max_length}): "
                f"all are longer. Set max_length={enough}."
            )
        left_out = len(lengths) - len(found)
        cut = sum(length > spec.max_length for length in lengths) - left_out
        found.fit = (len(lengths), cut, left_out, enough)
        return found

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not cache or backend is None:
        return make()
    content = json.dumps([backend.to_str(), tokenizer.bos_token, tokenizer.eos_token_id])
    described = hashlib.sha256(content.encode()).hexdigest()
    how = {k: v for k, v in dataclasses.asdict(spec).items() if k not in NOT_IN_ROWS}
    if spec.render == "chat_template":
        how["chat_template"] = tokenizer.chat_template
    key = json.dumps([VERSION, how, described, source.identity, split, limit])
    return kept(Path(cache, f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.rows"), make)


def fits_of(train: Rows, held_out: Rows) -> dict[str, Fit]:
    """Return what max_length does to the rows of each part, as far as it is known."""
    parts = {"training": train.fit, "held-out": held_out.fit}
    return {name: fit for name, fit in parts.items() if fit}


def check_fit(spec: DatasetSpec, fits: Mapping[str, Fit], setting: str) -> str:
    """Warn if max_length cuts or leaves out over 1% of a part; DataError: over half of it."""
    shares = {name: (cut + left_out) / n for name, (n, cut, left_out, _) in fits.items()}
    if max(shares.values(), default=0.0) <= 0.01:
        return ""
    worst = max(shares, key=shares.__getitem__)
    n, cut, left_out, _ = fits[worst]
    enough = max(fit[-1] for fit in fits.values())
    said = (
        f"dataset {spec.name!r}: max_length={spec.max_length} leaves out {left_out:,} and cuts "
        f"{cut:,} of {n:,} {worst} rows. Set {setting}{enough}, with which 99% are whole."
    )
    if shares[worst] > 0.5:
        raise DataError(said)
    return said


def _tokenized(
    spec: DatasetSpec, given: Iterator[Row], tokenizer: Any, lengths: list[int]
) -> Iterator[Example]:
    """Tokenize rows part by part, except those that `too_long` leaves out; note all `lengths`."""

    def rendered(row: Any, where: str) -> tuple[str, list[Part]]:
        parts: list[Part] = []
        for part in parts_of(spec, row, where, tokenizer):
            messages.check_text(part.text, f"{where}, as rendered")  # also what is in calls
            if part.eos and tokenizer.eos_token_id is None:
                raise DataError(
                    f"dataset {spec.name!r}: with render={spec.render} an answer ends with the EOS "
                    "token, and the tokenizer has none. Name it in tokenizer_config.json "
                    "(eos_token), or set dataset.render=role_colon."
                )
            last = parts[-1] if parts and spec.whole_prompt else None
            if last and last.in_loss == part.in_loss and not last.eos:
                part = part._replace(text=parts.pop().text + part.text)
            parts.append(part)
        return where, parts

    rows = each(given, rendered)
    while together := list(itertools.islice(rows, TOGETHER)):
        texts = [part.text for _, parts in together for part in parts]
        pieces = iter(tokenizer(texts, add_special_tokens=False).input_ids if texts else ())
        for where, parts in together:
            ids: list[int] = []
            loss: list[bool] = []
            for part, piece in zip(parts, pieces):
                ids += [*piece, tokenizer.eos_token_id] if part.eos else piece
                loss += [part.in_loss] * (len(ids) - len(loss))
            n_bytes = sum(len(part.text.encode()) for part in parts if part.in_loss)
            lengths.append(len(ids))
            cut = len(ids) > spec.max_length
            tokens = np.array(ids[: spec.max_length], dtype=np.int32)
            mask = np.array(loss[: spec.max_length], dtype=bool)
            mask[:1] = False  # nothing predicts the first token
            if cut and (spec.too_long == "skip" or (spec.too_long != "cut" and not mask.any())):
                continue
            if not mask.any():
                length = f", max_length={spec.max_length}" if cut else ""
                raise DataError(
                    f"{where}: no token counts in the loss (mask={spec.mask}, {len(ids)} tokens"
                    f"{length}). Remove the row, add an answer or give one weight 1, change the "
                    "mask, raise max_length, or set too_long=cut_or_skip."
                )
            if cut:  # count the bytes that were kept, so that bits per byte are right
                n_bytes = len(tokenizer.decode(tokens[mask], skip_special_tokens=True).encode())
            yield Example(tokens=tokens, loss=mask, n_bytes=n_bytes)


def fits(spec: DatasetSpec, row: Row, tokenizer: Any) -> bool:
    """Return whether a row is used: it is not left out because it is too long."""
    return any(True for _ in _tokenized(spec, iter([row]), tokenizer, []))


def parts_of(spec: DatasetSpec, row: Any, where: str, tokenizer: Any) -> list[Part]:
    """Render a row as text in the form `spec.render`.

    With mask=all, the text between messages is in the loss, too.

    role_colon: BOS if there is one, then 'Role:', ' content' and a blank line, as
    `RoleColonRenderer` in github.com/thinking-machines-lab/tinker-cookbook. The loss of an answer
    covers its space and blank line. The loss of a last answer also covers 'User:', which is added
    after it and ends sampling.

    role_eos: BOS if `spec.bos` and the tokenizer adds it to texts, 'Role: ' and 'content'. EOS ends
    an answer; a blank line ends other messages. A row with a prompt column has, after BOS, only the
    filled template and the completion.

    chat_template: the tokenizer's template. An answer is the text that the template adds for it,
    without line ends after EOS. Text after the last answer in the loss is left out, unless
    mask=all. Tools and their calls are rendered by chat templates only.

    Raises:
        DataError: a column is missing, or the chat template refuses the row, or leaves out a call.
    """
    heads, bos = spec.mask == "all", bos_of(spec, tokenizer)
    parts = [Part(bos, False)] if bos else []
    found = messages.read(spec, row, where)
    if spec.format == "prompt_completion" and spec.render == FIRST_RENDER:
        prompt, completion = (turn["content"] for turn in found.turns)
        return [*parts, Part(prompt, heads), Part(completion, True, eos=True)]
    calling = any(CALLS in turn for turn in found.turns)
    names = [name for name, there in ((TOOLS, found.tools), (CALLS, calling)) if there]
    names += sorted({key for turn in found.turns for key in others_of(turn)})
    if spec.render == "chat_template":
        template = getattr(tokenizer, "chat_template", None)
        if not template:
            raise DataError(
                f"dataset {spec.name!r}: render=chat_template, but the tokenizer has none. Choose "
                "an instruct model, or set render=role_colon."
            )
        names = [name for name in names if name not in str(template)]
    if names:
        raise DataError(
            f"{where}: the row has {' and '.join(names)}, for which render={spec.render} has no "
            "form. Set dataset.render=chat_template, with a model whose chat template reads it, or "
            "remove it."
        )
    if spec.render == "chat_template":
        try:
            return _chat_parts(found, heads, tokenizer)
        except Exception as error:  # templates may raise any exception
            raise DataError(
                f"{where}: the tokenizer's chat template does not take the row with mask="
                f"{spec.mask} ({error}). Remove the row, or choose another model, "
                "dataset.mask=last_assistant or, for rows without tools, dataset.render=role_colon."
            ) from error
    for turn, learned in zip(found.turns, found.learned, strict=True):
        head, answer = f"{turn['role'].capitalize()}:", turn["role"] == "assistant"
        if spec.render == "role_colon":
            parts += [Part(head, heads), Part(f" {turn['content']}\n\n", learned)]
        else:
            parts += [Part(f"{head} ", heads), Part(turn["content"], learned, eos=answer)]
            parts += [] if answer else [Part("\n\n", heads and learned)]
    if spec.render == "role_colon" and found.turns and found.turns[-1]["role"] == "assistant":
        parts.append(Part("User:", found.learned[-1]))
    return parts


def bos_of(spec: DatasetSpec, tokenizer: Any) -> str:
    """Return the BOS token with which a row begins; '' if with none, or by the chat template."""
    begins = spec.render == "role_colon"
    if spec.render == FIRST_RENDER and spec.bos:
        begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return (begins and tokenizer.bos_token) or ""


def rendered(spec: DatasetSpec, row: Any, where: str, tokenizer: Any) -> list[list[Any]]:
    """Return a row as it is trained on, in pieces: [text, whether it is in the loss]."""
    parts = parts_of(spec, row, where, tokenizer)
    texts = [(part.text + (tokenizer.eos_token if part.eos else ""), part) for part in parts]
    pieces = itertools.groupby((t for t in texts if t[0]), lambda t: t[1].in_loss)
    return [["".join(text for text, _ in piece), in_loss] for in_loss, piece in pieces]


def _chat_parts(row: Conversation, heads: bool, tokenizer: Any) -> list[Part]:
    """Render by the chat template. `heads`: whether text between messages is in the loss, too."""
    turns = row.turns
    how: dict[str, Any] = {"tools": row.tools or None, "tokenize": False, "date_string": DATE}

    def apply(turns: list[Turn], is_open: bool) -> str:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=is_open, **how)

    parts: list[Part] = []
    done, eos = "", tokenizer.eos_token or ""
    for i, (turn, learned) in enumerate(zip(turns, row.learned, strict=True)):
        calls = Counter(call["function"]["name"] for call in turn.get(CALLS, ()))
        others = others_of(turn)
        if learned == heads and not calls and not others:  # no border: the same mask around it
            continue
        before = apply(turns[:i], turn["role"] == "assistant")
        after = apply(turns[: i + 1], False)
        lost = [name for name, n in calls.items() if after.count(name) - before.count(name) < n]
        for key in others:
            without = {name: value for name, value in turn.items() if name != key}
            lost += [key] if apply([*turns[:i], without], False) == after else []
        if lost:
            raise ValueError(f"it leaves out {lost[0]!r} of message {i + 1}")
        if learned == heads:
            continue
        if not before.startswith(done) or not after.startswith(before):
            raise ValueError(f"message {i + 1} changes the text before it")
        answer = after[len(before) :]
        ended = bool(eos) and answer.rstrip("\n").endswith(eos)
        said = answer.rstrip("\n").removesuffix(eos) if ended else answer
        parts += [Part(before[len(done) :], heads), Part(said, learned, eos=ended)]
        done = before + said + (eos if ended else "")
    if heads:
        whole = apply(turns, False)
        if not whole.startswith(done):
            raise ValueError("a message that is not learned is changed by what follows")
        parts.append(Part(whole[len(done) :], True))
    return parts


# ---------------------------------------------------------------- templates for servers
# Chat templates in the form in which rows are trained. In Jinja, as transformers renders it;
# `messages` are what a client sends: for two columns the prompt and the completion, as they are.

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
        found.chat_template = _plain(spec, bool(bos_of(spec, tokenizer)))
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
        given = f'{{% set date_string = {_literal(DATE)} %}}{{{{ "" }}}}{given}'
    return given if _user(spec) == "m.content" else FILLED % _user(spec) + given


def _plain(spec: DatasetSpec, bos: bool) -> str:
    """Return a template for the forms role_eos and role_colon of `parts_of`."""
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
        pieces = rendered(spec, row, where, tokenizer)
        check_served(spec, served, *request_of(spec, row, where), pieces, where)


def check_served(
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


def save_tokenizer(served: Any, stop: dict[str, list[Any]], folder: Path) -> None:
    """Write a tokenizer with its chat template, and where generation ends, as transformers does."""
    served.save_pretrained(folder)
    path = folder / "generation_config.json"  # a whole model has other settings there
    ends = json.loads(path.read_text()) if path.is_file() else {}
    ends["eos_token_id"] = [served.eos_token_id, *stop.get("stop_token_ids", ())]
    if "stop" in stop:
        ends["stop_strings"] = stop["stop"]
    path.write_text(json.dumps(ends, indent=2))

"""Write the messages of a conversation as text, in parts that are tokenized one by one.

Parts end where the loss starts or ends, so that the loss mask falls on token borders. Refuses to
know tokenizers; the template of one is a function here.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

Message = tuple[str, str]
"""Role and content."""


class Part(NamedTuple):
    """A piece of text that is tokenized by itself, without special tokens."""

    text: str
    in_loss: bool
    eos: bool = False
    """Whether the end-of-sequence token follows, in the loss or not as the text."""


def role_colon(
    messages: Sequence[Message], in_loss: Sequence[bool], heads: bool, bos: str | None
) -> list[Part]:
    """Render as 'Role:' and ' content' with a blank line, the form of the study's base models.

    `in_loss`: of each message, whether it is learned; `heads`: whether 'Role:' is. The answer with
    its space and its blank line is in the loss; if it is the last message, so is the 'User:' that
    ends sampling. The text of `bos` comes first, if the tokenizer has one. As `RoleColonRenderer`
    in github.com/thinking-machines-lab/tinker-cookbook.
    """
    parts = [Part(bos, False)] if bos else []
    for (role, content), learned in zip(messages, in_loss, strict=True):
        parts.append(Part(f"{role.capitalize()}:", heads))
        parts.append(Part(f" {content}\n\n", learned))
    if messages and messages[-1][0] == "assistant":
        parts.append(Part("User:", in_loss[-1]))
    return parts


def role_eos(
    messages: Sequence[Message], in_loss: Sequence[bool], heads: bool, bos: str | None
) -> list[Part]:
    """Render as 'Role: ' and 'content'; the end-of-sequence token ends an answer.

    `in_loss` and `heads` as for `role_colon`. Other messages end with a blank line. There is no
    beginning-of-sequence token.
    """
    parts: list[Part] = []
    for (role, content), learned in zip(messages, in_loss, strict=True):
        answer = role == "assistant"
        parts.append(Part(f"{role.capitalize()}: ", heads))
        parts.append(Part(content, learned, eos=answer))
        if not answer:
            parts.append(Part("\n\n", heads and learned))
    return parts


def chat_template(
    messages: Sequence[Message],
    in_loss: Sequence[bool],
    heads: bool,
    apply: Callable[[Sequence[Message], bool], str],
    eos: str,
) -> list[Part]:
    """Render as a tokenizer's chat template does, for instruct models.

    `in_loss` as for `role_colon`; `heads`: whether the text between messages is learned, too.
    `apply`: (messages, whether an answer is to follow) -> text. An answer is what the template adds
    to the text before it, without line ends behind `eos`, the text of the end-of-sequence token.
    What follows the last answer in the loss is left out, unless `heads`.

    Raises:
        ValueError: the template changes an answer, or what stands before it, by what follows.
    """
    parts: list[Part] = []
    done = ""
    for i, learned in enumerate(in_loss):
        if learned == heads:  # the text around it is in the loss as it is: there is no border
            continue
        before = apply(messages[:i], messages[i][0] == "assistant")
        after = apply(messages[: i + 1], False)
        if not before.startswith(done) or not after.startswith(before):
            raise ValueError(f"message {i + 1} changes the text before it")
        answer = after[len(before) :]
        ended = bool(eos) and answer.rstrip("\n").endswith(eos)
        said = answer.rstrip("\n").removesuffix(eos) if ended else answer
        parts += [Part(before[len(done) :], heads), Part(said, learned, eos=ended)]
        done = before + said + (eos if ended else "")
    if heads:
        whole = apply(messages, False)
        if not whole.startswith(done):
            raise ValueError("a message that is not learned is changed by what follows")
        parts.append(Part(whole[len(done) :], True))
    return parts


RENDERERS: dict[
    str, Callable[[Sequence[Message], Sequence[bool], bool, str | None], list[Part]]
] = {
    "role_colon": role_colon,
    "role_eos": role_eos,
}
"""By name, as `render` in a dataset file; `chat_template` needs a tokenizer as well."""


def counted(messages: Sequence[Message], weights: Sequence[int | None], mask: str) -> list[bool]:
    """Return for each message whether its content is in the loss.

    A weight of 0 takes a message out, and a weight of 1 puts it in; without one (None) the mask
    decides. The last assistant message is the last one whose weight is not 0.
    """
    answers = [i for i, (role, _) in enumerate(messages) if role == "assistant" and weights[i] != 0]
    by_mask = {"all": range(len(messages)), "completion": answers, "last_assistant": answers[-1:]}
    return [
        i in by_mask[mask] if weight is None else weight == 1 for i, weight in enumerate(weights)
    ]

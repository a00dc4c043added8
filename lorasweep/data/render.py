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


def role_colon(messages: Sequence[Message], mask: str, bos: str | None) -> list[Part]:
    """Render as 'Role:' and ' content' with a blank line, the form of the study's base models.

    The answer with its space and its blank line is in the loss; if it is the last message, so is
    the 'User:' that ends sampling. The text of `bos` comes first, if the tokenizer has one. As
    `RoleColonRenderer` in github.com/thinking-machines-lab/tinker-cookbook.
    """
    parts = [Part(bos, False)] if bos else []
    counted = _counted(messages, mask)
    for (role, content), in_loss in zip(messages, counted):
        parts.append(Part(f"{role.capitalize()}:", mask == "all"))
        parts.append(Part(f" {content}\n\n", in_loss))
    if messages and messages[-1][0] == "assistant":
        parts.append(Part("User:", counted[-1]))
    return parts


def role_eos(messages: Sequence[Message], mask: str, bos: str | None) -> list[Part]:
    """Render as 'Role: ' and 'content'; the end-of-sequence token ends an answer.

    Other messages end with a blank line. There is no beginning-of-sequence token.
    """
    parts: list[Part] = []
    for (role, content), in_loss in zip(messages, _counted(messages, mask)):
        answer = role == "assistant"
        parts.append(Part(f"{role.capitalize()}: ", mask == "all"))
        parts.append(Part(content, in_loss, eos=answer))
        if not answer:
            parts.append(Part("\n\n", mask == "all"))
    return parts


def chat_template(
    messages: Sequence[Message],
    mask: str,
    apply: Callable[[Sequence[Message], bool], str],
    eos: str,
) -> list[Part]:
    """Render as a tokenizer's chat template does, for instruct models.

    `apply`: (messages, whether an answer is to follow) -> text. An answer in the loss is what the
    template adds to the text before it, without line ends behind `eos`, the text of the
    end-of-sequence token. What follows the last answer in the loss is left out.

    Raises:
        ValueError: the template changes an answer, or what stands before it, by what follows.
    """
    if mask == "all":
        return [Part(apply(messages, False), True)]
    parts: list[Part] = []
    done = ""
    for i, in_loss in enumerate(_counted(messages, mask)):
        if not in_loss:
            continue
        before, after = apply(messages[:i], True), apply(messages[: i + 1], False)
        if not before.startswith(done) or not after.startswith(before):
            raise ValueError(f"message {i + 1} changes the text before it")
        answer = after[len(before) :]
        ended = bool(eos) and answer.rstrip("\n").endswith(eos)
        said = answer.rstrip("\n").removesuffix(eos) if ended else answer
        parts += [Part(before[len(done) :], False), Part(said, True, eos=ended)]
        done = before + said + (eos if ended else "")
    return parts


RENDERERS: dict[str, Callable[[Sequence[Message], str, str | None], list[Part]]] = {
    "role_colon": role_colon,
    "role_eos": role_eos,
}
"""By name, as `render` in a dataset file; `chat_template` needs a tokenizer as well."""


def _counted(messages: Sequence[Message], mask: str) -> list[bool]:
    """Return for each message whether its content is in the loss."""
    answers = [i for i, (role, _) in enumerate(messages) if role == "assistant"]
    counted = {"all": range(len(messages)), "completion": answers, "last_assistant": answers[-1:]}
    return [i in counted[mask] for i in range(len(messages))]

"""Rules of a server for adapters: what it takes, what a fleet must leave out, the command to serve.

A profile is a file of conf/serve, in which every rule has its source.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from lorasweep.errors import SpecError
from lorasweep.spec.method import parse_layers
from lorasweep.spec.model import ROUTER, ModelSpec
from lorasweep.spec.values import Value

HEAD = "unembedding"
BASE = "BASE"
"""What a command names in place of a base that is not on the hub."""
IN_BATCH = 8
"""Largest number of adapters in a batch that a command asks for; each takes GPU memory. A
convention; vLLM's default is 1."""


@dataclass(frozen=True)
class Profile(Value):
    """What a server takes. The defaults take all that a fleet writes, as PEFT does."""

    WHERE: ClassVar[str] = "serve."

    name: str = "peft"
    server: str = "PEFT"
    """The server, with the version whose files were read."""
    ranks: tuple[int, ...] = ()
    """Allowed values of the server's largest rank, ascending; empty: every rank."""
    heads: tuple[str, ...] | None = None
    """Architectures whose unembedding takes an adapter; None: all."""
    no_tied_heads: str = ""
    """Why an unembedding that is tied to the embedding is left out; empty: it is not."""
    no_experts: str = ""
    """Why experts are refused; empty: they are served."""
    weights: tuple[str, ...] = ("F64", "F32", "F16", "BF16")
    """Types of tensors, as safetensors names them."""
    refuses: tuple[str, ...] = ()
    """Keys of adapter_config.json with which the server refuses an adapter; KEY=START: values."""
    ignores: tuple[str, ...] = ()
    """Keys that change the adapter in PEFT, and that the server ignores."""
    command: str = ""
    """Template of the command to serve; empty: there is none."""
    chat_template: str = ""
    """Template of the option with a chat template other than the base's own."""

    def largest_rank(self, rank: int) -> int:
        """Return the lowest largest rank of the server for adapters up to `rank`.

        Raises:
            SpecError: the server takes no such rank.
        """
        if not self.ranks:
            return rank
        found = next((allowed for allowed in self.ranks if allowed >= rank), None)
        if found is None:
            raise SpecError(
                f"rank {rank}: {self.server} takes ranks up to {self.ranks[-1]}, set to one of "
                f"{', '.join(map(str, self.ranks))}. Add serve=peft, or another server's profile."
            )
        return found

    def why_no_head(self, model: ModelSpec, architecture: str) -> str:
        """Return why the unembedding of a base gets no adapter; '' if it gets one.

        `architecture`: the class that config.json names; '' if it is not known.
        """
        if model.tied and self.no_tied_heads:
            return self.no_tied_heads
        if self.heads is None or architecture in self.heads:
            return ""
        if not architecture:
            return f"the architecture of the base is not known, and {self.server} takes it for some"
        return (
            f"{self.server} takes it for some architectures, and {architecture} is not among them"
        )


PEFT = Profile()


def adapted(profile: Profile, layers: str, model: ModelSpec, architecture: str) -> tuple[str, str]:
    """Return the layer sets to adapt for a server, and why the unembedding was left out of them.

    Raises:
        SpecError: the server takes none of these layers, or no experts.
    """
    sets = parse_layers(layers)
    if profile.no_experts and model.n_experts and {"mlp", ROUTER} & set(sets):
        raise SpecError(
            f"serve={profile.name}, and model {model.name!r} has experts: {profile.no_experts}. "
            "Add method.layers=attention, or serve=peft."
        )
    why = profile.why_no_head(model, architecture) if HEAD in sets else ""
    if not why:
        return layers, ""
    left = "+".join(s for s in sets if s != HEAD)
    if not left:
        raise SpecError(
            f"serve={profile.name}: the unembedding is left out, as {why}, and method.layers="
            f"{layers} has nothing else. Add method.layers=attention+mlp, or serve=peft."
        )
    return left, why


def serve_command(
    profile: Profile, base: str, folders: Mapping[str, str], rank: int, template: str = ""
) -> str:
    """Return the command that serves adapters on one base; '' for a profile without a server.

    Args:
        folders: name of each adapter -> its folder.
        rank: the largest rank of the adapters.
        template: file with the chat template of the adapters; '': the base's own.
    """
    modules = (shlex.quote(f"{name}={folder}") for name, folder in folders.items())
    command = profile.command.format(
        base=shlex.quote(base),
        rank=profile.largest_rank(rank),
        in_batch=min(len(folders), IN_BATCH),
        adapters=len(folders),
        modules=" ".join(modules),
    )
    option = profile.chat_template.format(file=shlex.quote(template)) if template else ""
    return f"{command} {option}".rstrip()

"""The interface between a method and the training loop: what it is handed, and what it trains."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, Union

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Experts:
    """The experts of one layer: a module with `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I].

    E experts, H hidden, I the width of one expert; gate's rows come before up's.
    """

    module: Any
    n_active: int
    """How many of them a token passes through."""


@dataclass(frozen=True)
class Router:
    """What chooses the experts of a layer for each token: a module with `weight` [E, H]."""

    module: Any


Target: TypeAlias = Union["nn.Linear", Experts, Router]


def weights_of(target: Target) -> "Iterator[torch.Tensor]":
    """Yield the weights of a target."""
    if isinstance(target, Experts):
        yield from (target.module.gate_up_proj, target.module.down_proj)
    else:
        yield (target.module if isinstance(target, Router) else target).weight


def whole(tensor: "torch.Tensor") -> "torch.Tensor":
    """Put a tensor together that is split over processes, in all of them; others as they are."""
    together = getattr(tensor, "full_tensor", None)
    return tensor if together is None else together()


class Parameters(Protocol):
    """The parameters of a pack, as the optimizer uses them."""

    stacked: bool
    """True: the first axis of every tensor is the member. False: N = 1 without such an axis."""

    def parameters(self) -> "dict[str, torch.Tensor]":
        """Return the tensors by name, in a fixed order."""

    def part_of(self, name: str) -> tuple[str, slice]:
        """Return the tensor's name in one member's state, and the members that it holds."""

    def lr_ratios(self, name: str) -> list[float]:
        """Return the learning rate factor of each member that this (stacked) tensor holds."""

    def keep(self, members: list[int]) -> "dict[str, tuple[str, list[int]]]":
        """Drop all members but `members` (increasing indices into the current order).

        Returns for each new tensor the name of the old one, and the rows of it that were kept.
        """


class Trainables(Parameters, Protocol):
    """The parameters of a pack, as the training loop uses them."""

    def spread(self) -> None:
        """Take up the parameters of a model that was spread over processes, before any update."""

    def only(self, members: list[int]) -> AbstractContextManager[None]:
        """Let the model and what follows be those of some members meanwhile, without gradient.

        `members`: increasing indices into the current order.
        """

    def norms(self) -> list[dict[str, float]]:
        """Return the norms to record, one dict per member."""

    def spectra(self) -> list[dict[str, dict[str, float]]]:
        """Return the final spectral norms by matrix: {name: {delta, ...}}, one dict per member."""

    def detach(self) -> None:
        """Restore the base model."""

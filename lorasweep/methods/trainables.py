"""The interface between a method and the training loop: the parameters that are trained."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


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

    def norms(self) -> list[dict[str, float]]:
        """Return the norms to record, one dict per member."""

    def spectra(self) -> list[dict[str, dict[str, float]]]:
        """Return the final spectral norms by matrix: {name: {delta, ...}}, one dict per member."""

    def detach(self) -> None:
        """Restore the base model."""

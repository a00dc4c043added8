"""What the training loop sees of a method: the parameters that it trains."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Parameters(Protocol):
    """What the optimizer sees of the parameters that a pack trains."""

    stacked: bool  # True: every tensor has a member axis first; False: N = 1, no such axis

    def parameters(self) -> "dict[str, torch.Tensor]":
        """Name -> tensor, in a fixed order."""

    def part_of(self, name: str) -> tuple[str, slice]:
        """Return the name that this tensor's part has in one member's state, and the members that
        it holds."""

    def lr_ratios(self, name: str) -> list[float]:
        """Return, for each member that this tensor holds, the factor on its learning rate (stacked
        ones only)."""

    def keep(self, members: list[int]) -> "dict[str, tuple[str, list[int]]]":
        """Compact the pack to `members` (rising indices into the present order).

        Returns for each new tensor the one that it came from, and the rows of that which it kept.
        """


class Trainables(Parameters, Protocol):
    """What the loop sees of them, too."""

    def norms(self) -> list[dict[str, float]]:
        """Norms worth recording, one dict a member."""

    def spectra(self) -> list[dict[str, dict[str, float]]]:
        """Spectral norms at the end, by matrix: {name: {delta, ...}}, one dict a member."""

    def detach(self) -> None:
        """Give the base model back as it was."""

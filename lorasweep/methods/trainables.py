"""The interface between a method and the training loop: its target modules and its parameters."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, Union

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Experts:
    """The experts of one layer: a module with `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I].

    E experts, H hidden, I width of an expert. The rows of gate come first.
    """

    module: Any
    n_active: int
    """Experts that a token passes through."""


Target: TypeAlias = Union["nn.Linear", Experts]


def whole(tensor: "torch.Tensor") -> "torch.Tensor":
    """Gather a tensor that is split over processes; return any other tensor unchanged."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


class Trainables:
    """The trained parameters of a pack. The defaults are those of one run."""

    stacked: bool = False
    """True: the first axis of every tensor is the run. False: one run, without such an axis."""

    def parameters(self) -> "dict[str, torch.Tensor]":
        """Return the tensors by name, in a fixed order."""

    def part_of(self, name: str) -> tuple[str, slice]:
        """Return the tensor's name in the state of one run, and the runs that it holds."""
        return name, slice(0, 1)

    def lr_ratios(self, name: str) -> list[float]:
        """Return the learning rate factor of each run that this (stacked) tensor holds."""
        return [1.0]

    def keep(self, runs: list[int]) -> "dict[str, tuple[str, list[int]]]":
        """Drop all runs but `runs` (increasing); return new name -> old name, and the kept rows."""
        raise NotImplementedError("a pack of one run cannot be compacted")

    def refresh(self) -> None:
        """Look up the parameters of the model again, after sharding has replaced them."""

    def only(self, runs: list[int]) -> AbstractContextManager[None]:
        """Restrict the model, `norms` and `spectra` to `runs` (increasing); not for gradients."""
        return nullcontext()

    def grouped(self, groups: list[int]) -> AbstractContextManager[None]:
        """Restrict the model to the first run of each group; at the end every run has the gradient.

        `groups`: the group of each run, numbered by their first runs.
        """
        return nullcontext()

    def norms(self) -> list[dict[str, float]]:
        """Return the norms to record, one dict per run."""
        return [{}]

    def spectra(self) -> list[dict[str, dict[str, float]]]:
        """Return the final spectral norms by matrix: {name: {delta, ...}}, one dict per run."""
        return [{}]

    def detach(self) -> None:
        """Restore the base model."""

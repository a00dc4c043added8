"""The fine-tuning methods: one file a method, found by its name.

This package knows which fields a method has, how many parameters it trains and how it attaches to a
model. It refuses to know the training loop. Files here import only the standard library at the top
(planning needs the fields without torch); torch is imported inside `attach`.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from lorasweep.errors import SpecError, unknown

if TYPE_CHECKING:
    import torch

    from lorasweep.spec.run import ModelSpec

LAYER_SETS = ("attention", "mlp", "unembedding")


@dataclass
class Method:
    """Fields of a method; a subclass lives in a file of its own, named as `name`."""

    name: str = "???"
    MAX_PACK: ClassVar[int | None] = None  # how many runs may share a pack; None: no limit
    PACKED_FIELDS: ClassVar[tuple[str, ...]] = ()  # fields that may differ inside a pack

    def check(self, model: "ModelSpec") -> None:
        """Raise SpecError if this method cannot be applied to `model`. Changes nothing."""
        raise NotImplementedError

    def n_trainable(self, model: "ModelSpec") -> int:
        """Count the trained parameters of one run, from the model's shape alone."""
        raise NotImplementedError

    def step_flops(self, model: "ModelSpec", n_tokens: int) -> float:
        """Estimate the floating-point operations of forward and backward over `n_tokens` tokens."""
        raise NotImplementedError

    def attach(
        self, base: Any, model: "ModelSpec", methods: "Sequence[Method]", seeds: "Sequence[int]"
    ):
        """Attach N = len(methods) members to the loaded `base`; return their Trainables."""
        raise NotImplementedError


class Trainables(Protocol):
    """What the loop may ask of the parameters that a pack trains."""

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

    def norms(self) -> list[dict[str, float]]:
        """Norms worth recording, one dict a member."""

    def spectra(self) -> list[dict[str, dict[str, float]]]:
        """Spectral norms at the end, by matrix: {name: {delta, ...}}, one dict a member."""

    def detach(self) -> None:
        """Give the base model back as it was."""


@cache
def method_classes() -> dict[str, type[Method]]:
    """Name -> class, one for each file of this folder."""
    found: dict[str, type[Method]] = {}
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if info.ispkg or info.name == "base":
            continue
        module = importlib.import_module(f"lorasweep.methods.{info.name}")
        found[info.name] = module.METHOD
    return found


def method_class(name: str) -> type[Method]:
    """Look a method up by name; raise SpecError with the list of names."""
    classes = method_classes()
    if name not in classes:
        raise SpecError(unknown("method", str(name), classes))
    return classes[name]


def parse_layers(layers: str) -> tuple[str, ...]:
    """Split 'attention+mlp' into its switches, in canonical order; 'all' means all three."""
    if not isinstance(layers, str):
        raise SpecError(f"layers={layers!r} is not text. Write e.g. layers=attention+mlp.")
    parts = LAYER_SETS if layers == "all" else tuple(p.strip() for p in layers.split("+"))
    bad = [p for p in parts if p not in LAYER_SETS]
    if bad or not parts:
        raise SpecError(
            f"layers={layers!r}: {bad or 'nothing'} is no layer set. Allowed: {', '.join(LAYER_SETS)}, "
            "joined by '+', or 'all'. Example: method.layers=attention+mlp"
        )
    return tuple(p for p in LAYER_SETS if p in parts)


def canonical_layers(layers: str) -> str:
    """Spell a layer set in the one way that is hashed."""
    return "+".join(parse_layers(layers))

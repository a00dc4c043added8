"""Measure members of a pack on held-out items: those that are due, not for the sake of another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorasweep.methods.trainables import Trainables
from lorasweep.models.sharding import Mesh
from lorasweep.spec.run import RunSpec
from lorasweep.train.events import Record
from lorasweep.train.objectives.base import Objective

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Evaluator:
    """The held-out measures of a pack's members."""

    model: "nn.Module"
    objective: Objective[Any]
    trainables: Trainables
    mesh: Mesh

    def measure(
        self, members: Sequence[RunSpec], runs: set[str], final: bool
    ) -> dict[str, tuple[Record, int]]:
        """Return the measures of `runs` with the norms of their weights, and how many items it was.

        `members`: all of the pack. `final`: on all held-out items, else on a part.
        """
        at = [k for k, m in enumerate(members) if m.id in runs]
        if not at:
            return {}
        norms, some = self.trainables.norms(), [members[k] for k in at]
        with self.trainables.only(at):
            found = self.mesh.run(self.objective.evaluate, self.model, some, final)
        return {members[k].id: ({**e.measures, **norms[k]}, e.n_items) for k, e in zip(at, found)}

    def at_end(self, members: Sequence[RunSpec], runs: set[str]) -> dict[str, Record]:
        """Return what is measured of `runs` when they have finished, and their spectra."""
        at = [k for k, m in enumerate(members) if m.id in runs]
        if not at:
            return {}
        some = [members[k] for k in at]
        with self.trainables.only(at):
            more = self.mesh.run(self.objective.at_end, self.model, some)
            spectra = self.trainables.spectra()
        return {m.id: {**a, "spectra": b} for m, a, b in zip(some, more, spectra)}

"""Measure members of a pack on held-out items: those that are due, not for the sake of another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorasweep.methods.trainables import Trainables
from lorasweep.models.sharding import Mesh
from lorasweep.spec.run import RunSpec
from lorasweep.train.events import EVALUATION, Record, phase
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
        measured: dict[str, tuple[Record, int]] = {}
        norms = self.trainables.norms() if runs else []
        for at in self._together(members, runs):
            some = [members[k] for k in at]
            with phase(EVALUATION), self.trainables.only(at):
                found = self.mesh.run(self.objective.evaluate, self.model, some, final)
            for k, m, e in zip(at, some, found):
                measured[m.id] = {**e.measures, **norms[k]}, e.n_items
        return measured

    def _together(self, members: Sequence[RunSpec], runs: set[str]) -> list[list[int]]:
        """Return the members to measure, those in one forward pass together.

        On a CPU those of one data set: the held-out rows of others would be padded to the most and
        longest (1.4 times the tokens of a hundred customers, LOG.md), and a larger pass is hardly
        faster. On a GPU all. Assumption: there small passes cost more than padding.
        """
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        groups: dict[str, list[int]] = {}
        for k, m in enumerate(members):
            if m.id in runs:
                groups.setdefault(m.dataset.canonical if on_cpu else "", []).append(k)
        return list(groups.values())

    def at_end(self, members: Sequence[RunSpec], runs: set[str]) -> dict[str, Record]:
        """Return what is measured of `runs` when they have finished, and their spectra."""
        at = [k for k, m in enumerate(members) if m.id in runs]
        if not at:
            return {}
        some = [members[k] for k in at]
        with phase(EVALUATION), self.trainables.only(at):
            more = self.mesh.run(self.objective.at_end, self.model, some)
            spectra = self.trainables.spectra()
        return {m.id: {**a, "spectra": b} for m, a, b in zip(some, more, spectra)}

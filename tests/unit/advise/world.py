"""What the adviser knows in tests: the shipped catalogue, and kept answers or none."""

from functools import cache
from pathlib import Path

from lorasweep.advise.advice import advise
from lorasweep.advise.evidence import Kept, Known, read_kept
from lorasweep.advise.read import customer_of
from lorasweep.config import catalogue
from tests.world import ROOT

CONF = [ROOT / "conf"]


@cache
def known(results: Path | None = ROOT / "analysis/results") -> Known:
    found = read_kept(results, catalogue.widths(CONF)) if results else Kept()
    return Known(catalogue.models(CONF), catalogue.machines(CONF), found)


def advice(world: Known | None = None, **columns):
    row = {"name": "acme", "model": "llama-3.1-8b", "task": "sft", **columns}
    return advise(customer_of(row), world or known())

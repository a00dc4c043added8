"""The door to `analysis`."""

import sys

from lorasweep.cli import answer


def test_a_single_run_does_not_load_the_analysis(compose, monkeypatch):
    """pandas and scipy take a second or two."""
    for module in ("analysis.questions.registry", "analysis.measures.power"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    request = compose("scale=smoke")
    answer.check_claims(request.sweep)
    assert answer.seeds_needed(request.points, request.sweep) == []

"""The door to `analysis`."""

import json
import sys

import pytest

from lorasweep.cli import answer
from lorasweep.errors import NotAtScale
from tests.world import ROOT

SWEEPS = sorted(p.stem for p in (ROOT / "sweeps").glob("*.yaml") if p.stem != "study")


def test_a_single_run_does_not_load_the_analysis(compose, monkeypatch):
    """pandas and scipy take a second or two."""
    for module in ("analysis.questions.registry", "analysis.inference.decide"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    request = compose("scale=smoke")
    answer.check_claims(request.sweep)
    assert answer.outlooks(request.points, request.sweep, request.scale) == []


UNKNOWN = {
    "rank": ["faster"],
    "regime": ["nothing", "real", "real_16"],
    "rl": ["wider"],
}
"""Claims of which no data were run at tiny, so that no spread over seeds is known."""


@pytest.mark.parametrize(
    "scale", ["tiny", *(pytest.param(s, marks=pytest.mark.full) for s in ("small", "tiny_beyond"))]
)
@pytest.mark.parametrize("sweep", [s for s in SWEEPS if s != "tune"])  # it ends when it is decided
def test_a_shipped_sweep_can_decide_its_claims_or_says_that_it_cannot(compose, sweep, scale):
    """If not: change `sweep.replicate.seeds`, the claim's `sd`, or `underpowered`."""
    try:
        request = compose(f"+sweep={sweep}", f"scale={scale}")
    except NotAtScale:
        return
    found = [o for _, o in answer.outlooks(request.points, request.sweep, scale)]
    wrong = [o.line() for o in found if o.warns or (o.can_decide and o.underpowered)]
    assert len(found) == len(request.sweep.claims) and not wrong, wrong
    if scale == "tiny":
        assert [o.claim for o in found if o.can_decide is None] == UNKNOWN.get(sweep, [])


def test_the_plan_holds_each_claims_expected_interval_against_its_margin(command):
    plan = (
        *("+sweep=lr_ratio", "scale=smoke", "action=plan", "sweep.rounds=1"),
        "++sweep.claims.ratio.planning={smoke: {sd: 0.12}, tiny: {sd: 9}}",
        "++sweep.claims.ratio.underpowered=false",
    )
    enough = "sweep.replicate.seeds=[1,2,3,4,5]"
    text = command(*plan, enough).stdout
    assert "claim ratio: expected interval 10 [8.82, 11.3], margin [7.1, 14.1]: can decide" in text
    few = command(*plan, "sweep.replicate.seeds=[1,2]").stdout
    assert "warning, claim ratio: " in few and "cannot decide: needs 4 seeds (planned 3)" in few
    ratio, *_, parity = json.loads(command(*plan, enough, "format=json").stdout)["claims"]
    assert (ratio["planned"], ratio["can_decide"], parity["can_decide"]) == (6, True, None)
    assert ratio["half_width"] < ratio["room"]

"""Axes of a grid, and axes whose values are mappings."""

import pytest

from lorasweep.errors import SpecError
from lorasweep.sweep.grid import assignments, fields_of
from tests.world import compose_request


def test_axes_of_mappings_set_several_fields_and_are_products_themselves():
    axes = {
        "seed": [0, 1],
        "cell": [
            {"batch_size": 4, "lr": [1, 2]},
            {"batch_size": 16, "lr": 3, "knobs": {"facts": 8}},
        ],
    }
    found = assignments(axes)
    assert len(found) == 6 and {"seed": 1, "batch_size": 4, "lr": 2} in found
    assert {"seed": 0, "batch_size": 16, "lr": 3, "knobs": {"facts": 8}} in found
    assert fields_of(axes) == {"seed", "batch_size", "lr", "knobs"}


def test_knobs_on_an_axis_name_the_data_set():
    points = compose_request(["+sweep=capacity", "scale=smoke"]).points
    assert {p.spec.dataset.name for p in points} == {"facts(facts=64)"}
    assert {p.spec.dataset.generator_params["facts"] for p in points} == {64}


def test_a_field_inside_a_mapping_is_not_overwritten_in_silence():
    with pytest.raises(SpecError, match="batch_size"):
        compose_request(["+sweep=batch_size", "scale=smoke", "batch_size=8"])


@pytest.mark.parametrize(
    "scale", ["smoke", pytest.param("tiny", marks=pytest.mark.slow)]
)  # the others are composed part by part in test_compose
def test_the_study_is_defined_at_every_scale(scale):
    request = compose_request(["+sweep=study", f"scale={scale}"])
    assert [p.sweep_name for p in request.parts] == request.sweep.parts and all(
        p.points for p in request.parts
    )
    known = {p.id for p in next(r for r in request.parts if r.sweep_name == "rank").points}
    for name in ("short_runs", "compute"):  # their runs are those of `rank`, where scales say so
        points = next(r for r in request.parts if r.sweep_name == name).points
        mine = {
            p.id for p in points if not p.arm.endswith("_more")
        }  # rates that `short_runs` alone asks about
        assert len(mine & known) >= len(mine) / 2


@pytest.mark.parametrize("scale", ["tiny", "tiny_beyond"])
@pytest.mark.parametrize(
    ("sweep", "shared"),
    [
        ("rank", ("fullft", "lora", "common")),
        ("compute", ("fullft", "lora")),
        ("short_runs", ("fullft", "lora", "fullft_more")),
        ("recipes", ("fullft", "tuned")),
        ("invariance", ("by_rank",)),
    ],
)
def test_sweeps_share_the_runs_of_a_cell_of_regime(scale, sweep, shared):
    """A run is known by its spec alone, so what `regime` has trained is not trained again."""
    known = {p.id for p in compose_request(["+sweep=regime", "scale=tiny"]).points}
    asked = compose_request([f"+sweep={sweep}", f"scale={scale}"])
    mine = {p.id for p in asked.points if p.arm in shared and p.spec.seed == 100}
    assert mine <= known and len(mine) >= 10


def test_without_generator_params_a_data_set_keeps_its_name():
    points = compose_request(["+sweep=rank", "scale=smoke"]).points
    assert {p.spec.dataset.name for p in points} == {"dialect_smoke"}

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
            {"batch_size": 16, "lr": 3, "generator_params": {"facts": 8}},
        ],
    }
    found = assignments(axes)
    assert len(found) == 6 and {"seed": 1, "batch_size": 4, "lr": 2} in found
    assert {"seed": 0, "batch_size": 16, "lr": 3, "generator_params": {"facts": 8}} in found
    assert fields_of(axes) == {"seed", "batch_size", "lr", "generator_params"}


def test_generator_parameters_on_an_axis_name_the_data_set():
    points = compose_request(["+sweep=capacity", "scale=smoke"]).points
    assert {p.spec.dataset.name for p in points} == {"facts(facts=64)"}
    assert {p.spec.dataset.generator_params["facts"] for p in points} == {64}


def test_a_field_inside_a_mapping_is_not_overwritten_in_silence():
    with pytest.raises(SpecError, match="batch_size"):
        compose_request(["+sweep=batch_size", "scale=smoke", "batch_size=8"])


def test_without_generator_params_a_data_set_keeps_its_name():
    points = compose_request(["+sweep=rank", "scale=smoke"]).points
    assert {p.spec.dataset.name for p in points} == {"dialect_smoke"}

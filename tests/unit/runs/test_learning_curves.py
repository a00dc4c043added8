"""Learning curves end where their last loss is on the same held-out rows as the others."""

import json

import pandas as pd
import pytest

from analysis.runs.learning_curves import by_run, same_rows

POINTS = [(0, 3.0), (1, 2.5), (2, 2.0), (4, 1.5)]


@pytest.mark.parametrize(
    ("at_end", "wanted"),
    [
        ({"test_nll_curve": 1.6}, [(1, 2.5), (2, 2.0), (4, 1.6)]),
        ({}, [(1, 2.5), (2, 2.0)]),  # the last loss is on more rows
    ],
)
def test_a_curve_is_read_to_its_end_where_the_same_rows_were_evaluated_there(at_end, wanted):
    curve = [{"step": s, "test_nll": y} for s, y in POINTS]
    curve[-1] |= at_end
    table = pd.DataFrame([{"result": json.dumps({"curve": curve})}])
    assert same_rows(by_run(table)[0]) == wanted and same_rows(None) == []

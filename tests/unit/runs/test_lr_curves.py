"""Tables that must be refused before a curve is made of them."""

import numpy as np
import pandas as pd
import pytest

from analysis.runs.lr_curves import lr_curves
from analysis.runs.table import TableError
from tests.tables import table


def test_two_bases_are_never_mixed():
    frame = table(lambda lr, s: 2.0, seeds=(0, 1))
    frame["base_sha256"] = np.where(frame["seed"] == 0, "a" * 64, "b" * 64)
    with pytest.raises(TableError, match="cannot share a curve"):
        lr_curves(frame)


def test_a_missing_column_is_named():
    with pytest.raises(TableError, match="test_nll"):
        lr_curves(pd.DataFrame({"model": ["m"]}))

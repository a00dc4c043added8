"""The columns that tell the curves of a table of runs apart."""

from analysis.runs.table import CURVE_KEYS
from lorasweep.methods.registry import METHODS
from lorasweep.spec.run import RunSpec
from lorasweep.spec.values import fields

SHARED = {"lr", "seed", "method", "name"}
"""A curve has several learning rates and seeds; the method's name is the column `method`."""
NO_TRAINING = {"test_rows", "train_version"}
"""Which rows are measured, and a version that all runs of a table share."""


def test_runs_that_are_trained_otherwise_share_no_curve():
    settings = {f.key for f in fields(RunSpec)} | {
        f.key for method in METHODS.values() for f in fields(method)
    }
    assert settings - SHARED - NO_TRAINING <= {*CURVE_KEYS, "method"}

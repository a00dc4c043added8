"""A sweep without one of its arms is still answered: what cannot be known is UNDECIDED."""

import pytest

from analysis.questions.registry import analyse
from analysis.report import report
from lorasweep.cli.answer import KEPT
from tests.planted import ANSWERS, kept_answer

ONE_ARM = {"invariance-tiny", "rl_bits-tiny"}  # their runs are all of one method
ALONE = {"capacity-tiny"}  # its claims about one method need no other
SLOW = {"batch_size-tiny", "rank-tiny", "regime-tiny"}
CASES = [
    pytest.param(folder, method, marks=pytest.mark.full if folder.name in SLOW else ())
    for folder in ANSWERS
    for method in ("fullft", "lora")
]


@pytest.mark.parametrize(("folder", "method"), CASES, ids=lambda v: getattr(v, "name", v))
def test_a_sweep_without_an_arm_is_answered(folder, method):
    table, question = kept_answer(folder)
    table = table[table["method"] != method]
    if table.empty:
        assert folder.name in ONE_ARM
        return
    table = table[table["seed"] == table["seed"].mode()[0]].reset_index(drop=True)
    analysis = analyse(table, question, KEPT)
    text = report.render(analysis, question, table)
    assert all(v.claim in text for v in analysis.verdicts)
    if folder.name not in ALONE | ONE_ARM:
        assert {v.outcome for v in analysis.verdicts} == {"UNDECIDED"}

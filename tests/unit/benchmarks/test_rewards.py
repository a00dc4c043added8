"""The arithmetic of rewarded runs against others' and in packs."""

import numpy as np
import pytest

from benchmarks.rewards import compared, differing, flips, panels


def curves(*ends):
    return [{4: 0.1, 12: end} for end in ends]


def test_two_sides_agree_within_two_errors_of_the_difference_of_their_means():
    first, last = compared(curves(0.30, 0.32, 0.34), curves(0.33, 0.35, 0.37))
    assert not first["compared"] and first["difference"] == first["error"] == 0 and first["agree"]
    assert last["compared"] and last["difference"] == pytest.approx(-0.03)
    # each mean has the error .02 / sqrt(3)
    assert last["error"] == pytest.approx(0.02 * np.sqrt(2 / 3))
    assert last["agree"]
    assert not compared(curves(0.30, 0.32, 0.34), curves(0.34, 0.36, 0.38))[1]["agree"]


def test_an_answer_that_differs_counts_once():
    def drawn(*answers):
        return [np.array(a) for a in answers]

    alone = drawn([1, 2, 0], [3, 0], [4, 5, 0])
    assert differing(alone, alone) == 0
    assert differing(drawn([1, 2, 0], [3, 0, 0], [5, 4, 0]), alone) == 2


def test_the_page_shows_flips_and_the_figure_two_errors():
    case = {"case": "words", "members": 4, "answers": 9, "tokens": 2000, "differing": 3}
    assert flips([case])[1:] == [["words", "4", "9", "2,000", "3", "1.5e+03"]] and flips([]) == []
    rows = compared(curves(0.30, 0.32, 0.34), curves(0.44, 0.46, 0.48))
    one, difference = panels({"updates": rows, "seeds": [1, 2, 3]})
    assert [s.label for s in one.series] == ["lorasweep", "TRL's GRPO"]
    assert difference.series[0].high[1] == pytest.approx(-0.14 + 2 * rows[1]["error"])

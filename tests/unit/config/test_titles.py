"""Two requests that ask for different runs share no title, so no report and no count of looks."""

import pytest

from lorasweep.store import looks
from lorasweep.sweep.request import from_plain, question
from tests.world import compose_request

ASKED = ("+sweep=lr_ratio", "scale=smoke")


@pytest.fixture(scope="module")
def plain():
    return compose_request(ASKED)


def test_the_command_as_the_file_states_it_has_the_plain_title(plain):
    assert plain.title == "lr_ratio-smoke" and question(plain)["changes"] == []


@pytest.mark.parametrize(
    "change",
    [
        "steps=500",
        "sweep.axes.model=[tiny128]",
        "~sweep.arms.fullft",
        "sweep.replicate.seeds=[5,6]",
    ],
)
def test_a_command_line_that_changes_the_runs_changes_title_and_looks(
    compose, plain, change, tmp_path
):
    other = compose(*ASKED, change)
    assert other.title.startswith("lr_ratio-smoke-") and question(other)["changes"] == [change]
    assert looks.path_of(tmp_path, other.title) != looks.path_of(tmp_path, plain.title)
    assert plain.is_in_family(other.title) and not other.is_in_family("lr_ratio-smoke_2")
    assert from_plain(other.plain()).title == other.title  # as the follow-up job reads it


def test_two_changes_have_two_titles_whatever_their_order(compose):
    first, second = "steps=500", "weight_decay=0.1"
    both = [compose(*ASKED, *order).title for order in ((first, second), (second, first))]
    assert both[0] == both[1] != compose(*ASKED, first).title


@pytest.mark.parametrize(
    "changes",
    [
        ["exec.pack_size=1", "format=json", "cluster.time_min=5", "sweep.rounds=2"],
        ["weight_decay=0"],
        ["sweep.claims.ratio.margin=[2,50]"],  # the looks keep the first: see store.looks
    ],
)
def test_options_that_change_no_run_keep_the_title(compose, changes):
    assert compose(*ASKED, *changes).title == "lr_ratio-smoke"


@pytest.mark.full
def test_a_study_with_changed_parts_has_a_title_of_its_own(compose):
    fewer = compose("+sweep=study", "scale=smoke", "sweep.parts=[lr_ratio,rank]")
    changed = compose("+sweep=study", "scale=smoke", "sweep.parts=[lr_ratio]", "steps=40")
    assert {p.changed for p in fewer.parts} == {""}
    assert len({"study-smoke", fewer.title, changed.title}) == 3
    assert {p.title for p in fewer.parts} == {"lr_ratio-smoke", "rank-smoke"}
    assert changed.parts[0].title == compose(*ASKED, "steps=40").title

"""Two requests that ask for different runs share no title, so no report and no count of looks."""

import pytest

from lorasweep.store import looks
from lorasweep.sweep.request import from_plain, question

ASKED = ("+sweep=lr_ratio", "scale=smoke")


def test_the_command_as_the_file_states_it_has_the_plain_title(compose):
    assert compose(*ASKED).title == "lr_ratio-smoke"
    assert question(compose(*ASKED))["changes"] == []


@pytest.mark.parametrize(
    "change",
    [
        "steps=500",
        "sweep.axes.model=[tiny128]",
        "~sweep.arms.fullft",
        "model.tied=true",
        "sweep.replicate.seeds=[5,6]",
    ],
)
def test_a_command_line_that_changes_the_runs_changes_title_and_looks(compose, change, tmp_path):
    plain, other = compose(*ASKED), compose(*ASKED, change)
    assert other.title.startswith("lr_ratio-smoke-") and question(other)["changes"] == [change]
    assert looks.path_of(tmp_path, other.title) != looks.path_of(tmp_path, plain.title)
    assert plain.is_in_family(other.title) and not other.is_in_family("lr_ratio-smoke_2")
    assert from_plain(other.plain()).title == other.title  # as the follow-up job reads it


def test_two_changes_have_two_titles_whatever_their_order(compose):
    titles = {compose(*ASKED, f"steps={n}").title for n in (500, 600)}
    assert len(titles) == 2
    first, second = "steps=500", "batch_size=4"
    assert compose(*ASKED, first, second).title == compose(*ASKED, second, first).title


@pytest.mark.parametrize(
    "change",
    ["exec.pack_size=1", "format=json", "cluster.time_min=5", "weight_decay=0", "sweep.rounds=2"],
)
def test_options_that_change_no_run_keep_the_title(compose, change):
    assert compose(*ASKED, change).title == "lr_ratio-smoke"


def test_a_margin_cannot_be_changed_by_moving_to_another_title(compose):
    """The looks of the same runs keep the first margin (store.looks refuses the new one)."""
    other = compose(*ASKED, "sweep.claims.ratio.margin=[2,50]")
    assert other.title == "lr_ratio-smoke"


@pytest.mark.full
def test_a_study_with_changed_parts_has_a_title_of_its_own(compose):
    fewer = compose("+sweep=study", "scale=smoke", "sweep.parts=[lr_ratio,rank]")
    changed = compose("+sweep=study", "scale=smoke", "sweep.parts=[lr_ratio]", "steps=40")
    assert {p.changed for p in fewer.parts} == {""}
    assert len({"study-smoke", fewer.title, changed.title}) == 3
    assert {p.title for p in fewer.parts} == {"lr_ratio-smoke", "rank-smoke"}
    assert changed.parts[0].title == compose(*ASKED, "steps=40").title

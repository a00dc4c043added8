"""The command that a following job runs: its exit code says whether another try may help."""

import json

import pytest

from lorasweep.cli import follow
from lorasweep.errors import ClusterError, GaveUp, SpecError, StoreError
from lorasweep.launch.slurm import (
    job,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (ClusterError("busy"), job.TRY_AGAIN),
        (StoreError("held"), job.TRY_AGAIN),
        (GaveUp("idle"), 2),
        (KeyboardInterrupt(), job.INTERRUPTED),
        (SpecError("wrong"), 2),
    ],
)
def test_the_following_command_says_whether_another_try_may_help(
    compose, tmp_path, monkeypatch, error, code
):
    asked = compose("+sweep=lr_ratio", "scale=smoke", "cluster=slurm")
    (tmp_path / "request.json").write_text(json.dumps(asked.plain()))
    task = {"follow": str(tmp_path / "request.json"), "trainer": "a.b:c", "idle": 1, "finished": 4}
    (tmp_path / "task.json").write_text(json.dumps(task))
    acted = []

    def act(request, trainer, follow):
        acted.append((request.title, trainer, follow["idle"]))
        if error:
            raise error

    monkeypatch.setattr(follow, "act", act)
    monkeypatch.setattr(follow.signal, "signal", lambda *_: None)
    assert follow.main(str(tmp_path / "task.json")) == code
    assert acted == [(asked.title, "a.b:c", 1)]

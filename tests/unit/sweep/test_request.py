"""Requests and the names of their runs."""

import json

from lorasweep.sweep import request
from lorasweep.sweep.names import run_names


def test_a_request_comes_back_from_its_file(compose):
    asked = compose("+sweep=lr_ratio", "scale=tiny", "cluster=slurm", "cluster.gpus=2")
    again = request.from_plain(json.loads(json.dumps(asked.plain())))
    assert again.points == asked.points and again.title == "lr_ratio-tiny"
    assert (again.exec, again.cluster, again.sweep) == (asked.exec, asked.cluster, asked.sweep)


def test_a_request_of_version_0_1_is_read(compose):
    """Its claims have the stored keys, which are the same today, and `at` and added runs by scale."""
    asked = compose("+sweep=large_batches", "scale=tiny")
    stored = json.loads(json.dumps(asked.plain()))
    claim = stored["sweep"]["claims"]["at_32"]
    assert [claim[k] for k in ("whose", "sd", "units")] == ["popular", {"tiny": 0.0027}, None]
    stored["sweep"]["at"] = {"tiny": {"ranks": [8]}}
    for axes in stored["sweep"]["arms"].values():
        axes["added_after"] = {"tiny": axes["added_after"], "small": {"what": "x", "why": "y"}}
    again = request.from_plain(stored)
    assert again.sweep == asked.sweep and request.question(again) == request.question(asked)


def test_names_say_what_differs_and_no_more(compose):
    asked = ("+sweep=lr_ratio", "scale=smoke")
    points = compose(*asked).points
    assert set(run_names(points).values()) >= {"fullft lr=0.002", "lora lr=0.005"}
    more = ("sweep.arms.lora.rank=[2,4]", "+sweep.axes.batch_size=[4,8]")
    points = compose(*asked, *more).points
    names = set(run_names(points).values())
    assert "lora r2 batch_size=4 lr=0.005" in names and len(names) == len(points)

"""Checks before a submission: the run folder, the disk, runs that other machines hold."""

import os
from pathlib import Path

import pytest

from lorasweep.errors import ClusterError, StoreError
from lorasweep.launch.slurm import submit
from lorasweep.store import claims
from lorasweep.store.run_store import RunStore


def test_a_run_of_a_machine_that_died_is_found_out_by_watching(tmp_path, compose, monkeypatch):
    """Its heartbeat stands still: nobody else can tell."""
    monkeypatch.setattr(claims, "SILENCE_S", 0.5)
    monkeypatch.setattr(submit, "SILENCE_S", 0.5)
    store = RunStore(tmp_path / "runs")
    store.prepare()
    point = compose("scale=smoke").points[0]
    monkeypatch.setenv("LORASWEEP_HOST", "elsewhere")
    store.claim(point.spec)
    monkeypatch.delenv("LORASWEEP_HOST")
    said = []
    assert store.state(point.id) == "running" and store.unsure([point.id]) == [point.id]
    submit.watch_others(store, [point], said.append)
    assert "watching 1 run" in said[0] and store.state(point.id) == "interrupted"


def test_a_run_folder_that_nodes_cannot_see_is_refused(tmp_path):
    mounts = [("/", "ext4"), ("/scratch", "tmpfs"), ("/home", "nfs4")]
    nodes = frozenset({"n1", "n2"})
    with pytest.raises(ClusterError, match="tmpfs of this machine"):
        submit.check_visible(Path("/scratch/runs"), nodes, mounts)
    with pytest.raises(ClusterError, match=r"cluster\.shared=true"):
        submit.check_visible(Path("/tmp/runs"), nodes, mounts)
    submit.check_visible(Path("/home/me/runs"), nodes, mounts)
    submit.check_visible(
        Path("/tmp/runs"), frozenset({os.uname().nodename}), mounts
    )  # the node is this machine


def test_a_disk_that_is_too_small_is_refused_with_what_is_needed(packs, tmp_path, monkeypatch):
    monkeypatch.setattr(submit.checkpoint, "free_bytes", lambda path: 2**20)
    with pytest.raises(StoreError, match=r"0\.00 GiB free, and this sweep needs up to 0\.\d\d GiB"):
        submit.check_disk(tmp_path, packs(), 4)

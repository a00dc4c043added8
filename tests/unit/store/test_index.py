"""The index of finished runs is a cache."""

import json
import os

import pytest

from lorasweep.store import files, index
from lorasweep.store.run_store import RunStore
from tests.world import OTHER_USER, as_another_user


def test_the_index_is_a_cache_and_no_more(tmp_path, compose):
    store = RunStore(tmp_path / "runs")
    store.prepare()
    points = compose("+sweep=lr_ratio", "scale=smoke", f"sweep.axes.seed={list(range(10))}").points
    for p in points:
        store.claim(p.spec)
        store.finish(p.id, "done", {"test_nll": 2.0, "wall_s": 1.0, "threads": 1})
    ids = [p.id for p in points]
    assert (
        set(store.states(ids).values()) == {"done"}
        and (tmp_path / "runs/.index/runs.json").is_file()
    )
    read = []
    assert (
        index.read(store.root, ids, lambda rid: read.append(rid), {}).keys() == set(ids)
        and not read
    )
    result = store.folder(ids[0]) / "result.json"
    result.write_text(
        result.read_text().replace('"test_nll": 2.0', '"test_nll": 3.25')
    )  # damaged: its checksum fails
    assert store.states(ids)[ids[0]] != "done" and store.states(ids)[ids[1]] == "done"
    (tmp_path / "runs/.index/runs.json").write_text('{"version": 1, "runs": {"x": 3}}')
    assert RunStore(tmp_path / "runs").states(ids)[ids[1]] == "done"


def test_two_users_of_a_folder_with_the_sticky_bit_share_the_index(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    runs.chmod(0o3775)
    if os.geteuid() == 0:
        os.chown(runs, 0, OTHER_USER)
    before = os.umask(0o022)
    try:
        store = RunStore(runs)
        store.prepare()
        finish(store, range(30))
        assert len(store.finished(map(str, range(30)))) == 30

        def go_on():
            other = RunStore(runs)
            other.prepare()
            finish(other, range(30, 60))
            assert len(other.finished(map(str, range(60)))) == 60

        as_another_user(tmp_path, go_on)
        kept = json.loads((runs / ".index/runs.json").read_bytes())
        assert len(kept["runs"]) == 60
        assert {p.name for p in runs.glob(".*")} == {".index"}
    finally:
        os.umask(before)


def finish(store, numbers):
    for k in numbers:
        store.folder(str(k)).mkdir()
        store.finish(str(k), "done", {"test_nll": 2.0})


def test_a_write_that_fails_leaves_no_file(tmp_path, monkeypatch):
    def refuse(*paths):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(PermissionError):
        files.write_atomic(tmp_path / "x", b"1")
    assert not list(tmp_path.iterdir())

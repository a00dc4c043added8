"""The index of finished runs is a cache."""

import json

from lorasweep.store.run_store import RunStore
from tests.world import as_another_user


def finish(store, ids):
    for rid in ids:
        store.folder(rid).mkdir()
        store.finish(rid, "done", {"test_nll": 2.0})
    assert len(store.finished(ids)) == len(ids)


def test_the_index_is_only_a_cache(store, monkeypatch):
    store.prepare()
    ids, path = [str(k) for k in range(30)], store.root / ".index/runs.json"
    finish(store, ids)
    fresh, read = RunStore(store.root), []
    monkeypatch.setattr(fresh, "result", read.append)
    assert fresh.finished(ids).keys() == set(ids) and not read
    result = store.folder(ids[0]) / "result.json"
    result.write_text(result.read_text().replace("2.0", "3.25"))  # its checksum is wrong
    assert store.states(ids)[ids[0]] != "done" and store.states(ids)[ids[1]] == "done"
    path.write_text('{"version": 1, "runs": {"x": 3}}')
    assert RunStore(store.root).states(ids)[ids[1]] == "done"


def test_two_users_of_a_folder_with_the_sticky_bit_share_the_index(tmp_path, group_folder):
    store = group_folder(0o3775)
    finish(store, [str(k) for k in range(30)])

    def second_user():
        other = RunStore(store.root)
        other.prepare()
        finish(other, [str(k) for k in range(30, 60)])
        assert len(other.finished(map(str, range(60)))) == 60

    as_another_user(tmp_path, second_user)
    kept = json.loads((store.root / ".index/runs.json").read_bytes())
    assert len(kept["runs"]) == 60
    assert {p.name for p in store.root.glob(".*")} == {".index"}

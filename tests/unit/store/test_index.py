"""The index of finished runs is a cache."""

from lorasweep.store import index
from lorasweep.store.run_store import RunStore


def test_the_index_is_a_cache_and_no_more(tmp_path, compose):
    store = RunStore(tmp_path / "runs")
    store.prepare()
    points = compose("+sweep=lr_ratio", "scale=smoke", f"sweep.axes.seed={list(range(10))}").points
    for p in points:
        store.claim(p.spec)
        store.finish(p.id, "done", {"test_nll": 2.0, "wall_s": 1.0, "threads": 1})
    ids = [p.id for p in points]
    assert set(store.states(ids).values()) == {"done"} and (tmp_path / "runs/.index.json").is_file()
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
    (tmp_path / "runs/.index.json").write_text('{"version": 1, "runs": {"x": 3}}')
    assert RunStore(tmp_path / "runs").states(ids)[ids[1]] == "done"

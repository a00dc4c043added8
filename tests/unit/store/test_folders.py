"""Folders that are replaced: no file of the user's is lost, whatever happens in between."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

from lorasweep.errors import SpecError, StoreError
from lorasweep.spec.execution import Exec
from lorasweep.store import folders
from lorasweep.store.folders import MARK, replaced
from tests.unit.store.conftest import at_once


def write(folder, last="facts.json", whole=True, **contents):
    with replaced(folder, last, whole) as partial:
        for name, text in contents.items():
            path = partial / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)


def files_of(folder):
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: p.read_text() for name, p in found.items() if name != MARK}


def exec_in(folder):
    return Exec(runs_dir=str(folder / "runs"), models_dir=[], data_dir=[str(folder / "data")])


def test_only_our_files_are_replaced_and_those_of_the_user_stay(tmp_path):
    out, there = tmp_path / "out", (".git", ".DS_Store", "lost+found")  # as in a new folder
    for name in there:
        (out / name).mkdir(parents=True)
    write(out, facts_json="1", README_md="a", adapter__model="x")
    assert all((out / name).exists() for name in there)
    (out / "notes.txt").write_text("mine")
    write(out, facts_json="2", README_md="b")
    assert files_of(out) == {"facts.json": "2", "README.md": "b", "notes.txt": "mine"}
    write(out, facts_json="1", README_md="a")  # an earlier content is ours, too
    assert files_of(out)["README.md"] == "a"


@pytest.mark.parametrize(
    "spoil, match",
    [
        (lambda out: (out / "README.md").write_text("edited"), "README.md is not as"),
        (lambda out: (out / "new.txt").write_text("mine"), "new.txt is not as"),
        (lambda out: (out / "new.txt").symlink_to(out.parent / "other"), "new.txt is not as"),
        (lambda out: (out / "new.txt").mkdir(), "new.txt is not as"),
        (lambda out: (out / MARK).unlink(), "no .lorasweep.jsonl"),
        (lambda out: (out / "adapter").symlink_to(out.parent), r"adapter/new\.txt is not as"),
        (lambda out: out.rename(out.parent / "real") and out.symlink_to("real"), "is a link"),
    ],
)
def test_what_the_user_changed_or_added_is_refused_and_kept(tmp_path, spoil, match):
    out = tmp_path / "out"
    write(out, README_md="a", x_txt="1")
    (tmp_path / "other").write_text("mine")
    spoil(out)
    before = files_of(out)
    with pytest.raises(SpecError, match=match):
        write(out, README_md="b", new_txt="2", adapter__new_txt="3")
    assert files_of(out) == before and (tmp_path / "other").read_text() == "mine"
    assert not (tmp_path / "new.txt").exists()


def test_a_name_in_a_marker_cannot_point_outside(tmp_path):
    out, other = tmp_path / "out", tmp_path / "other.txt"
    write(out, README_md="a")
    other.write_text("a")
    with (out / MARK).open("r+") as mark:
        mark.write(mark.read().replace("README.md", "../other.txt"))
    with pytest.raises(SpecError, match="is not as lorasweep wrote it"):
        write(out, facts_json="1")
    assert other.read_text() == "a"


@pytest.mark.parametrize("at", range(6))
def test_after_a_kill_at_any_rename_the_next_command_repairs(tmp_path, monkeypatch, at):
    """An exception that nothing handles stands for the kill; the staged files stay, too."""
    out = tmp_path / "out"
    write(out, facts_json="1", README_md="a", adapter__model="x")
    (out / "notes.txt").write_text("mine")
    steps = iter(range(100))

    def killed(do):
        def one(*given, **more):
            if next(steps) == at:
                raise SystemExit
            return do(*given, **more)

        return one

    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(folders.shutil, "rmtree", lambda *a, **k: None)
        m.setattr(folders.os, "replace", killed(os.replace))
        m.setattr(folders.Path, "unlink", killed(Path.unlink))
        write(out, facts_json="2", README_md="b", new_txt="3", more_txt="4")
    assert files_of(out).get("facts.json") != "2"  # the last: so the folder is not complete
    write(out, facts_json="3", README_md="c")
    assert files_of(out) == {"facts.json": "3", "README.md": "c", "notes.txt": "mine"}


def test_commands_at_once_leave_the_files_of_one_also_if_some_fail(tmp_path):
    out = tmp_path / "out"

    def one(k):
        for turn in range(20):
            with suppress(ValueError), replaced(out, "facts.json") as partial:
                for name in ("facts.json", "README.md", f"f{turn % 3}.txt"):
                    (partial / name).write_text(f"{k}")
                if k and turn % 2:
                    raise ValueError
        return 0

    assert at_once(4, one) == [0] * 4
    found = files_of(out)
    assert len({*found.values()}) == 1 and len(found) == 3


@pytest.mark.parametrize("error", [OSError(28, "No space left"), Exception("os error 28")])
@pytest.mark.parametrize("before", [{}, {"README.md": "a"}])
def test_a_full_disk_leaves_what_was_there(tmp_path, error, before):
    out = tmp_path / "out"
    if before:
        write(out, README_md="a")
    with pytest.raises(StoreError, match="written"), replaced(out, "x") as partial:
        (partial / "README.md").write_text("b")
        raise error
    assert files_of(out) == before and not (out / folders.PARTIAL).exists()


def test_a_folder_of_another_kind_is_refused(tmp_path):
    """An adapter must not take the place of a fleet's rules, nor a search that of a customer."""
    write(tmp_path / "fleet", "fleet.json", fleet_json="{}")
    write(tmp_path / "fleet", "index.html", whole=False, index_html="x")
    for last in ("lorasweep.json", "adapter_model.safetensors"):
        with pytest.raises(SpecError, match="folder of a fleet"):
            folders.check(tmp_path / "fleet", last, exec_in(tmp_path), [])
    folders.check(tmp_path / "fleet", "fleet.json", exec_in(tmp_path), [])
    with replaced(tmp_path / "one", "adapter_model.safetensors") as partial:
        (partial / "adapter_model.safetensors").write_text("x")
    with pytest.raises(SpecError, match="or of an adapter"):
        write(tmp_path / "one", facts_json="1")
    (tmp_path / "one/adapter_model.safetensors").unlink()
    write(tmp_path / "one", facts_json="1")  # nothing is left to lose


def test_a_folder_in_use_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "table.csv").write_text("a")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    for out in (".", "runs", "runs/x", "data", "table.csv", "link"):
        with pytest.raises((SpecError, StoreError), match=r"would be mixed|is a link|no folder"):
            folders.check(tmp_path / out, "x", exec_in(tmp_path), [], [tmp_path / "table.csv"])
    folders.check(tmp_path / "new/one", "x", exec_in(tmp_path), [])
    assert sorted(tmp_path.rglob("*")) == before

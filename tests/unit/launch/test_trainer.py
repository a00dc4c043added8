"""The real trainer's data: tokenized once for all workers, and the same for a whole run folder."""

import dataclasses
import json
from contextlib import suppress
from types import SimpleNamespace

import pytest

from lorasweep.errors import DataError
from lorasweep.launch.trainer import TorchTrainer
from lorasweep.spec.execution import Exec
from tests.bpe import qwen_like
from tests.world import as_another_user, compose_request, tiny_spec


@pytest.fixture
def load(tmp_path):
    """`load(answer)` writes a data set and loads it as a new worker would."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "gsm8k").mkdir()
    data = compose_request(["dataset=gsm8k"]).points[0].spec.dataset
    data = dataclasses.replace(data, revision="", n_test=4, n_test_curve=4)
    exec_ = Exec(runs_dir=str(tmp_path / "runs"), data_dir=[str(tmp_path)])
    base = SimpleNamespace(tokenizer=qwen_like())

    def run(answer, **changes):
        for split in ("train", "test"):
            rows = [json.dumps({"question": f"So? {i}", "answer": answer}) for i in range(9)]
            path = tmp_path / "gsm8k" / f"{split}.jsonl"
            path.write_text("\n".join(rows))
            with suppress(PermissionError):  # already done by its owner
                path.chmod(0o666)
        spec = tiny_spec(dataset=dataclasses.replace(data, **changes))
        return TorchTrainer().data(spec, exec_, base)

    return run


def test_a_worker_finds_what_another_tokenized(load, tmp_path):
    first = load("Yes")
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs/.tokens").glob("*.rows")}
    assert len(kept) == 2 and load("Yes").sha256 == first.sha256
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs/.tokens").glob("*.rows")} == kept


def test_a_data_set_that_changed_is_refused_before_it_is_trained_on(load, tmp_path):
    load("Yes")
    with pytest.raises(DataError, match=r"gsm8k.*exec\.runs_dir=.*/runs-2"):
        load("No")
    load("No", name="mine")
    load("Yes")
    (note,) = [p for p in (tmp_path / "runs/.data").iterdir() if '"mine"' not in p.read_text()]
    note.unlink()
    load("No")


@pytest.mark.parametrize("known", [False, True])
def test_data_of_a_folder_that_is_only_read_are_checked_and_not_recorded(load, tmp_path, known):
    """As when another user's runs are trained again: verified, or exported."""
    runs = tmp_path / "runs"
    runs.chmod(0o755)
    for path in (tmp_path / "gsm8k", tmp_path):
        path.chmod(0o777)
    if known:
        load("Yes")

    def read():
        assert len(load("Yes").test) == 4
        assert known or not list(runs.iterdir())
        if known:
            with pytest.raises(DataError, match="gsm8k"):
                load("No")

    as_another_user(tmp_path, read)

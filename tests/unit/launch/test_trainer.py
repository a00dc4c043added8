"""Data of the real trainer: tokenized once, one for a run folder, broken for its owner alone."""

import dataclasses
import errno
import json
from contextlib import suppress
from types import SimpleNamespace

import pytest

from lorasweep.errors import DataError
from lorasweep.launch import pack as packs
from lorasweep.launch.trainer import TorchTrainer
from lorasweep.methods.lora import LoRA
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.spec.execution import Exec
from lorasweep.store import checkpoint
from lorasweep.store.run_store import RunStore
from lorasweep.train.objectives.sft import SupervisedFineTuning
from tests.customers import make_base, model_of, write_rows
from tests.small_hub import qwen_like
from tests.unit.launch import trainers
from tests.world import as_another_user, compose_request, tiny_spec, write_splits


@pytest.fixture
def load(tmp_path):
    """`load(answer)` writes a data set and loads it as a new worker would."""
    for name in ("runs", "gsm8k"):
        (tmp_path / name).mkdir()
    data = compose_request(["dataset=gsm8k"]).points[0].spec.dataset
    data = dataclasses.replace(data, revision="", n_test=4, n_test_curve=4)
    exec_ = Exec(runs_dir=str(tmp_path / "runs"), data_dir=[str(tmp_path)])
    base = SimpleNamespace(tokenizer=qwen_like())

    def run(answer, **changes):
        rows = [{"question": f"So? {i}", "answer": answer} for i in range(9)]
        write_splits(tmp_path / "gsm8k", rows)
        for path in (tmp_path / "gsm8k").iterdir():
            with suppress(PermissionError):  # already done by its owner
                path.chmod(0o666)
        spec = tiny_spec(dataset=dataclasses.replace(data, **changes))
        return TorchTrainer().data(spec, exec_, base)

    return run


def test_data_are_tokenized_once_and_refused_if_they_changed(load, tmp_path):
    first = load("Yes")
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs/.tokens").glob("*.rows")}
    assert len(kept) == 2 and load("Yes").sha256 == first.sha256
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "runs/.tokens").glob("*.rows")} == kept
    with pytest.raises(DataError, match=r"gsm8k.*exec\.runs_dir=.*/runs-2"):
        load("No")
    load("No", name="mine")
    load("Yes")
    (note,) = [p for p in (tmp_path / "runs/.data").iterdir() if '"mine"' not in p.read_text()]
    note.unlink()
    load("No")


def test_data_of_a_folder_that_is_only_read_are_checked_and_not_recorded(load, tmp_path):
    """As when another user's runs are trained again: verified, or exported."""
    runs = tmp_path / "runs"
    runs.chmod(0o755)
    for path in (tmp_path / "gsm8k", tmp_path):
        path.chmod(0o777)

    def read():
        before = sorted(runs.rglob("*"))
        assert len(load("Yes").test) == 4 and sorted(runs.rglob("*")) == before
        if before:  # the owner's
            with pytest.raises(DataError, match="gsm8k"):
                load("No")

    as_another_user(tmp_path, read)
    load("Yes")
    as_another_user(tmp_path, read)


SECRET = "zanzibar 7351"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def pack(base, tmp_path):
    """Four customers' runs; the rows of the third hold the secret."""
    found = []
    for k, name in enumerate(("ann", "bob", "secret", "dan")):
        folder = tmp_path / name
        answer = f"{SECRET} {{k}}" if name == "secret" else "357 {k}"
        write_rows(folder / "train.jsonl", 12 + k, answer)
        sizes = {"holdout": 6, "n_validation": 3, "n_test": 3, "n_test_curve": 3, "max_length": 64}
        dataset = DatasetSpec(name=name, source="jsonl", location=str(folder), **sizes)
        fields = {"method": LoRA(rank=4), "steps": 3 + k, "batch_size": 2}
        found.append(tiny_spec(model=model_of(base), dataset=dataset, **fields))
    return found


def train(pack, tmp_path, trainer=None, **settings):
    store = RunStore(tmp_path / "runs")
    store.prepare()
    given = {"skip_broken_data": True, "keep_weights": True, "checkpoint_s": 0.0, **settings}
    trainer = trainer or TorchTrainer()
    events = trainers.train(store, pack, trainer, runs_dir=str(store.root), **given)
    return store, events, [store.state(s.id) for s in pack]


def all_text(store, spec):
    files = [p for p in store.folder(spec.id).rglob("*") if p.is_file()]
    return b"\n".join(p.read_bytes() for p in files).decode(errors="replace")


def test_broken_data_fail_only_their_owners_run(pack, tmp_path):
    path, secret = tmp_path / "secret" / "train.jsonl", json.dumps({"text": SECRET}) + "\n"
    for text, cause in {f"{{{SECRET}\n": r"train\.jsonl:1", 9 * secret: "prompt"}.items():
        path.write_text(text)
        with pytest.raises(DataError, match=cause):
            train(pack, tmp_path / cause[:5], skip_broken_data=False)
    store, events, states = train(pack, tmp_path)
    assert states == ["done", "done", "failed", "done"]
    assert [e["run"] for e in events if e.get("ended") == "failed"] == [pack[2].id]
    for spec in (pack[0], pack[1], pack[3]):
        assert SECRET not in all_text(store, spec) and "secret" not in all_text(store, spec)
        assert store.result(spec.id)["pack_size"] == 3
    for breaks, cause in (
        (lambda: write_rows(path, 6, SECRET), "6 rows"),
        (path.unlink, "no file"),
    ):
        breaks()
        with pytest.raises(DataError, match=cause):
            train(pack, tmp_path / cause, skip_broken_data=False)


@pytest.mark.parametrize("error", [KeyError(SECRET), OSError(errno.EIO, "broken", SECRET)])
def test_an_error_in_training_is_quoted_to_its_owner_only(pack, tmp_path, monkeypatch, error):
    """It is found by halves: the runs resume from their checkpoints in smaller packs."""
    monkeypatch.setattr(packs, "CHECKPOINT_SHARE", 0)

    class Broken(TorchTrainer):
        def __call__(self, pack, exec_, resume):
            for event in super().__call__(pack, exec_, resume):
                if event.step == 3 and any(s.dataset.name == "secret" for s in pack):
                    raise error
                yield event

    store, _, states = train(pack, tmp_path, Broken())
    assert states == ["done", "done", "failed", "done"]
    assert SECRET in store.failure(pack[2].id) and SECRET in all_text(store, pack[2])
    for spec in (pack[0], pack[1], pack[3]):
        assert SECRET not in all_text(store, spec)
        assert store.result(spec.id)["resumed_in_other_company"]


def test_a_run_that_diverges_leaves_and_the_others_end(pack, tmp_path, monkeypatch):
    wild = pack[2].id
    monkeypatch.setattr(SupervisedFineTuning, "diverged", lambda self, run, loss: run == wild)
    store, _, states = train(pack, tmp_path)
    assert states == ["done", "done", "diverged", "done"]
    for k, spec in enumerate(pack):
        weights = checkpoint.load_weights(store.folder(spec.id))
        assert (weights is None) == (spec.id == wild)
        if weights:
            n = sum(t.numel() for t in weights.values())
            assert n == spec.method.n_trainable(spec.model)
            result = store.result(spec.id)
            assert (result["n_test"], result["n_train"]) == (3, 6 + k)
            assert result["test_nll"] != result["test_nll_curve"]  # of test and validation rows
    assert not list(store.root.rglob(".weights*"))

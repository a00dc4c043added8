"""A real W&B run, offline: written by the mirror, read back from its file."""

import json
import struct
from pathlib import Path

import pytest

from lorasweep.store.run_store import RunStore
from tests.integration.conftest import SMOKE
from tests.world import cli

pytestmark = pytest.mark.slow


def wandb_records(path):
    """Read a .wandb file: a 7-byte header, then LevelDB log blocks of 32,768 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = Path(path).read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_finished_runs_are_mirrored_once_and_read_back(tmp_path):
    env = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    one_each = ("sweep.arms.lora.lr=[5e-3]", "sweep.arms.fullft.lr=[2e-3]", "exec.workers=1")
    arguments = (*SMOKE, *one_each, "mirror=wandb")
    done = cli(*arguments, cwd=tmp_path, env=env)
    assert "UNDECIDED" in done.stdout
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    runs = RunStore(tmp_path / "runs")
    assert len(files) == 2
    assert {f.stem.removeprefix("run-") for f in files} == set(runs.existing())
    for path in files:
        records = list(wandb_records(path))
        (run,) = [r.run for r in records if r.HasField("run")][:1]
        assert run.run_group == "lr_ratio"
        own = runs.records(run.run_id)
        rows = [
            {(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in r.history.item}
            for r in records
            if r.HasField("history")
        ]
        assert [row["train_nll"] for row in rows] == [r["train_nll"] for r in own]
        assert [row["_step"] for row in rows] == [r["step"] for r in own]
    cli(*arguments, cwd=tmp_path, env=env)
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 2  # not replayed twice

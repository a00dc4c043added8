"""One pack: what a worker does when its claims are taken over."""

import json

import pytest

from lorasweep.launch.pack import execute
from lorasweep.launch.process import StopFlag
from lorasweep.spec.execution import Exec
from lorasweep.store import claims, files
from lorasweep.store.run_store import RunStore
from lorasweep.train.events import Event
from tests.world import tiny_spec

STEPS, LOST_AT = 6, 2


def take_over(store, rid):
    """Claim a run as another process does that believes its owner dead."""
    owner = json.dumps(claims.this_process()).encode()
    assert files.create_folder_once(store.folder(rid) / "attempts" / "2", {"owner.json": owner})


@pytest.mark.parametrize("n_lost", [1, 2])
def test_a_worker_stops_when_all_its_runs_were_taken_over(tmp_path, n_lost):
    store, specs = RunStore(tmp_path), [tiny_spec(seed=k) for k in range(2)]
    ids, steps = [s.id for s in specs], []

    def trainer(pack, exec_, resume):
        for step in range(1, STEPS + 1):
            steps.append(step)
            if step == LOST_AT:
                for rid in ids[:n_lost]:
                    take_over(store, rid)
            records = {i: {"step": step} for i in ids}
            ended = {i: ("done", {"test_nll": 1.0}) for i in ids} if step == STEPS else {}
            yield Event(step, records, ended, dict)

    execute(specs, Exec(), store, trainer, lambda event: None, StopFlag())
    assert store.records(ids[0])[-1]["step"] == LOST_AT - 1 and store.result(ids[0]) is None
    if n_lost == 1:
        assert steps[-1] == STEPS and store.state(ids[1]) == "done"
    else:
        assert steps[-1] == LOST_AT and store.end(ids[1], 1)["state"] == "stopped"

"""A fleet on a cluster: a job is lost, rows are changed, the follow-up job collects the adapters."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.customers import make_base, write_rows
from tests.slurm.cluster import FAST, ask, attempts, jobs_of, submitted
from tests.world import cli

FLEET = ("action=fleet", "customers=customers.yaml", "exec.threads=1")
JOBS = (*FAST, "cluster.runs_per_job=3", "exec.pack_size=3")
STATUS = ("action=status", "customers=customers.yaml", "format=json", *FAST)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Give a folder with a table: two customers, one of few rows, one without its file."""
    base = make_base(tmp_path / "base")
    write_rows(tmp_path / "ann.jsonl", 40, "357 in all {k}")
    write_rows(tmp_path / "bob.jsonl", 25, "No! {k}", question="Is it late? {k}")
    write_rows(tmp_path / "few.jsonl", 5, "Yes {k}")
    row = {"model": str(base / "config.json"), "task": "sft", "epochs": 2}
    table = [{"name": n, "data": f"{n}.jsonl", **row} for n in ("ann", "bob", "few", "gone")]
    (tmp_path / "customers.yaml").write_text(json.dumps(table))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.full
def test_a_fleet_is_spread_over_jobs_and_collected_by_the_follow_up_job(queue, folder):
    places = ("exec.reports_dir=here", "exec.runs_dir=here_runs")
    here = ("exec.pack_size=3", "exec.workers=1", *places)
    cli(*FLEET, *here, cwd=folder, check=False)
    with queue.closed():
        said = ask(folder, *FLEET, *JOBS, trainer=None)
        assert "submitted 7 runs" in said and "7 runs queued" in said
        assert "4 customers: 0 adapters, 3 not trained yet, 1 with errors" in said
        assert said.count("gone.jsonl") == 1
        shown = json.loads(ask(folder, *STATUS).splitlines()[-1])  # after the errors of rows
        assert shown["runs"]["queued"] == 7 and len(shown["follows"]) == 1
        assert shown["customers"] == {"customers": 4, "adapters": 0, "open": 3, "errors": 1}
        assert "submitted" not in ask(folder, *FLEET, *JOBS, trainer=None)
        (first,) = submitted(folder)
        lost = next(k for k, runs in enumerate(first.tasks) if len(runs) == 3)
        queue.command("scancel", jobs_of(first)[lost])  # before it started
        write_rows(folder / "bob.jsonl", 25, "{k}", question="Is it late? {k}")
    queue.drain()

    page = (folder / "reports/fleet-customers/index.html").read_text()
    assert "4 customers: 2 adapters, 0 not trained yet, 2 with errors" in page
    assert "but the revision" in page and "gone.jsonl" in page
    again = [s for s in submitted(folder) if s.folder != first.folder]
    assert {r for s in again for task in s.tasks for r in task} >= set(first.tasks[lost])
    for path in (folder / "here/fleet-customers").glob("[af]*/adapter_model.safetensors"):
        name = path.parent.name
        mine = folder / "reports/fleet-customers" / name
        one, other = load_file(path), load_file(mine / path.name)
        assert all(torch.equal(one[k], other[k]) for k in one)
        facts = [json.loads((p / "facts.json").read_text()) for p in (path.parent, mine)]
        assert facts[0]["run"] == facts[1]["run"] and facts[0]["gain"] == facts[1]["gain"]

    before = attempts(folder)
    last = ask(folder, *FLEET, *JOBS, trainer=None)
    assert "submitted 3 runs" in last  # bob's, of the rows that are there now
    queue.drain()
    trained = attempts(folder)
    assert len(trained) == len(before) + 3 and all(trained[i] == before[i] for i in before)
    last = ask(folder, *FLEET, *JOBS, trainer=None)
    assert "4 customers: 3 adapters, 0 not trained yet, 1 with errors" in last


@pytest.mark.full
def test_runs_that_no_row_asks_for_are_pruned_and_a_fleet_is_cancelled(queue, folder):
    options = (*FLEET, *JOBS, "cluster.follow=false")
    with queue.closed():
        ask(folder, *options, trainer=None)
        write_rows(folder / "bob.jsonl", 25, "{k}", question="Is it late? {k}")
        said = ask(folder, *options, trainer=None)
        assert "submitted 3 runs" in said and "3 queued run(s)" in said and "prune=true" in said
        assert "cancelled 3 queued run(s)" in ask(folder, *options, "prune=true", trainer=None)
        assert "unfinished run(s)" in ask(folder, "action=cancel", *STATUS[1:2], *FAST)
        queue.drain()
    shown = json.loads(ask(folder, *STATUS).splitlines()[-1])
    assert shown["runs"]["missing"] == 7 and not shown["jobs"]

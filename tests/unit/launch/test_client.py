"""Slurm's output is read: partitions, how jobs ended, and which owners of runs are alive."""

import json

import pytest

from lorasweep.errors import ClusterError
from lorasweep.launch.slurm import client
from lorasweep.launch.slurm.client import Partition, RunningJobs
from lorasweep.spec.execution import Cluster
from lorasweep.store import claims

OWNER = {"host": "elsewhere", "boot": "x", "pid": 1, "started": "1"}


def job(number, restart=0):
    return {"cluster": "here", "job": str(number), "restart": restart}


def test_partitions_are_read_and_known_by_name(slurm):
    lines = ["gpu*|64|512000|gpu:a100:8(S:0-1)|2-00:00:00|n1|"]
    lines += ["gpu*|32|256000|gpu:4|2-00:00:00|n2|", "long|64|9|(null)|infinite|n3|"]
    limits = {"30": 30, "30:00": 30, "1:30:00": 90, "1-12": 2160, "1-00:30:00": 1470}
    lines += [f"p{n}|1|1|(null)|{limit}|n4|" for n, limit in enumerate(limits)]
    slurm("here", sinfo="\n".join(lines))
    found = client.partitions()
    gpu = Partition("gpu", True, 64, 512_000, 8, 2880.0, frozenset({"n1", "n2"}), 2)
    assert found["gpu"] == gpu
    assert found["long"].gpus == 0 and found["long"].time_min == float("inf")
    assert [found[f"p{n}"].time_min for n in range(len(limits))] == list(limits.values())
    assert client.partition_of(Cluster(), found) is found["gpu"]
    with pytest.raises(ClusterError, match=r"'gpx'.*'gpu'"):
        client.partition_of(Cluster(partition="gpx"), found)


def test_the_worst_step_decides_how_a_job_ended(slurm):
    slurm(
        "here",
        sacct="7_1|FAILED|1:0|n1|20\n7_1.batch|FAILED|1:0|n1|20\n7_1.0|OUT_OF_MEMORY|0:125|n1|19\n"
        "7_2|CANCELLED by 5|0:0|n2|3\n7_3|RUNNING|0:0|n2|3\n7_4|FAILED|9:0|n2|3\n",
    )
    ends = client.ended(["7"])
    states = {label: end.state for label, end in ends.items()}
    assert states == {"7_1": "OUT_OF_MEMORY", "7_2": "CANCELLED", "7_4": "FAILED"}
    assert "cluster.mem_gib" in ends["7_1"].cause() and "memory" in ends["7_4"].cause()
    assert "memory" not in ends["7_2"].cause()


def test_slurm_decides_whether_an_owner_that_is_a_job_is_alive(slurm, tmp_path, monkeypatch):
    running = {"12": 0}
    asked = slurm("here", squeue=lambda *_: "".join(f"{j}|{n}|\n" for j, n in running.items()))
    alive = RunningJobs()
    assert alive("here", "12", 0) is True and alive("here", "13", 0) is False
    assert alive("here", "12", 1) is False  # a later execution
    assert alive("there", "12", 7) is None  # another cluster
    n = len(asked)
    assert alive("here", "13", 0) is False and len(asked) == n  # a dead job is not queried again

    def attempt(name, number):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "owner.json").write_text(json.dumps({**OWNER, "slurm": job(number)}))
        return folder

    first, liveness = attempt("1", 12), claims.Liveness(alive)
    assert liveness.alive(first)
    running.clear()
    monkeypatch.setattr(client, "FRESH_S", -1.0)  # later
    assert not liveness.alive(first)
    monkeypatch.undo()
    slurm("here")
    many = [attempt(f"a{k}", 100 + k) for k in range(50)]
    asked.clear()
    liveness.prepare(many)  # one query is enough for any number of dead jobs
    assert not any(map(liveness.alive, many)) and sum(c[0] == "squeue" for c in asked) == 1


def test_a_job_that_slurm_started_again_recognises_its_earlier_execution(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "here")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert "slurm" not in claims.this_process()  # a command in an interactive job
    monkeypatch.setenv(claims.JOB_VARIABLE, "1")
    assert claims.restarted({"slurm": job(12)})
    others = ({"slurm": job(12, restart=1)}, {"slurm": job(13)}, {})
    assert not any(map(claims.restarted, others))

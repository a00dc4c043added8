"""What Slurm says of jobs that run and that ended, and which owners of runs are therefore alive."""

import json

from lorasweep.launch.slurm import (
    client,
)
from lorasweep.launch.slurm.client import RunningJobs
from lorasweep.store import claims


def test_an_end_is_told_by_its_worst_step(monkeypatch):
    monkeypatch.setattr(
        client,
        "run",
        lambda *command: (
            "7_1|FAILED|1:0|n1|20\n7_1.batch|FAILED|1:0|n1|20\n7_1.0|OUT_OF_MEMORY|0:125|n1|19\n"
            "7_2|CANCELLED by 5|0:0|n2|3\n7_3|RUNNING|0:0|n2|3\n7_4|FAILED|9:0|n2|3\n"
        ),
    )
    ends = client.ended(["7"])
    assert (
        set(ends) == {"7_1", "7_2", "7_4"}
        and ends["7_1"].state == "OUT_OF_MEMORY"
        and ends["7_2"].state == "CANCELLED"
    )
    assert (
        "cluster.mem_gib" in ends["7_1"].cause()
        and "memory" in ends["7_4"].cause()
        and "memory" not in ends["7_2"].cause()
    )


def test_an_owner_that_is_a_job_lives_as_long_as_slurm_says(monkeypatch, tmp_path):
    running = {"12": 0}
    asked = []

    def ask(*command):
        asked.append(command)
        return (
            "ClusterName = here\n"
            if command[0] == "scontrol"
            else "".join(f"{j}|{n}|\n" for j, n in running.items())
        )

    monkeypatch.setattr(client, "run", ask)
    client.setting.cache_clear()
    lives = RunningJobs()
    assert lives("here", "12", 0) is True and lives("here", "13", 0) is False
    assert lives("here", "12", 1) is False  # its later execution is not its earlier one
    assert lives("there", "12", 7) is None  # another cluster's
    n = len(asked)
    assert lives("here", "13", 0) is False and len(asked) == n  # the dead stay dead, unasked
    attempt = tmp_path / "1"
    attempt.mkdir()
    owner = {
        "host": "elsewhere",
        "boot": "x",
        "pid": 1,
        "started": "1",
        "slurm": {"cluster": "here", "job": "12", "restart": 0},
    }
    (attempt / "owner.json").write_text(json.dumps(owner))
    liveness = claims.Liveness(lives)
    assert liveness.alive(attempt)
    running.clear()
    lives._asked = -100  # ten seconds later
    assert not liveness.alive(attempt)
    many = []  # one question is enough for any number of dead jobs
    for k in range(50):
        many.append(tmp_path / f"a{k}")
        many[-1].mkdir()
        (many[-1] / "owner.json").write_text(
            json.dumps({**owner, "slurm": {"cluster": "here", "job": str(100 + k), "restart": 0}})
        )
    asked.clear()
    liveness.prepare(many)
    assert not any(map(liveness.alive, many)) and sum(c[0] == "squeue" for c in asked) == 1
    client.setting.cache_clear()


def test_a_job_that_slurm_started_again_knows_its_earlier_self(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "here")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert (
        "slurm" not in claims.this_process()
    )  # an interactive job, in which somebody runs a command
    monkeypatch.setenv(claims.JOB_VARIABLE, "1")
    assert claims.restarted({"slurm": {"cluster": "here", "job": "12", "restart": 0}})
    assert not claims.restarted({"slurm": {"cluster": "here", "job": "12", "restart": 1}})
    assert not claims.restarted(
        {"slurm": {"cluster": "here", "job": "13", "restart": 0}}
    ) and not claims.restarted({})

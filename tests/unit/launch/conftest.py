"""The packs of a small sweep, to be put into jobs; Slurm's commands replaced by their output."""

import pytest
from submitit.core.utils import CommandFunction
from submitit.slurm.slurm import SlurmExecutor

from lorasweep.launch.slurm import queue
from lorasweep.plan import detect
from lorasweep.plan.planner import make_plan
from lorasweep.store.run_store import RunStore


@pytest.fixture
def packs(compose, tmp_path):
    """24 runs of `lr_ratio` at scale smoke, in packs of at most four."""
    seeds = "sweep.axes.seed=[0,1,2,3]"
    request = compose("+sweep=lr_ratio", "scale=smoke", seeds, "exec.pack_size=4")
    store = RunStore(tmp_path / "runs")
    return make_plan(request.points, store, request.exec, detect.this_machine()).packs


@pytest.fixture
def slurm(monkeypatch):
    """`slurm(name, **outputs)`: a cluster of this name, with at most two jobs in an array; command
    -> its output, or a function of its arguments. Returns the list of commands that are given."""
    asked = []

    def set_up(name, **outputs):
        outputs["scontrol"] = f"ClusterName = {name}\nMaxArraySize = 3\n"

        def run(command, *arguments):
            asked.append((command, *arguments))
            output = outputs.get(command, "")
            return output(*arguments) if callable(output) else output

        queue.setting.cache_clear()
        monkeypatch.setattr(queue, "run", run)
        monkeypatch.setattr(CommandFunction, "__call__", lambda sbatch: run(*sbatch.command))
        monkeypatch.setattr(SlurmExecutor, "affinity", lambda *_: 1)
        return asked

    yield set_up
    queue.setting.cache_clear()

"""Fixtures: the shipped configuration, composed as the command line does, and a fake trainer; a small
sweep, trained once; a planted one with its report, made once; a hub that is out of reach.

The summary says how long the tests of each folder took."""

import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Before anything imports torch or numpy: one thread a process, and one that waits lets others work.
# Test processes run beside each other, and processes that they start choose more threads themselves.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Temporary folders lie on a memory disk where it has room: most tests wait for no other disk.
_MEMORY, _ROOM = "/dev/shm", 6 * 2**30
if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > _ROOM:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", _MEMORY)

from lorasweep.__main__ import main  # noqa: E402
from lorasweep.cli.actions import act, check  # noqa: E402
from lorasweep.train.events import Event  # noqa: E402
from tests import small_hub  # noqa: E402
from tests.planted import FULL, LORA, START, World  # noqa: E402
from tests.world import cli, compose_request, planted_end  # noqa: E402

SMOKE = ("+sweep=lr_ratio", "scale=smoke")


def pytest_report_header():
    """Say which of its sets of kernels torch uses (tests/test_processors.py)."""
    import torch

    return f"kernels: {torch.backends.cpu.get_cpu_capability()}"


_begun, _seconds, _tests = pytest.StashKey(), Counter(), Counter()


def _processor():
    """Processor seconds of this process and of its children that ended."""
    return sum(os.times()[:4])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    item.stash[_begun] = _processor()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item, call):
    """Let the report, which travels to the process that prints, say what the test took."""
    if call.when == "teardown":
        item.user_properties.append(("processor_s", _processor() - item.stash[_begun]))


def pytest_runtest_logreport(report):
    if report.when == "teardown":
        folder = os.path.dirname(report.nodeid.partition("::")[0])
        _tests[folder] += 1
        _seconds[folder] += dict(report.user_properties)["processor_s"]


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("processor seconds, with processes that tests started")
    for folder, seconds in [*_seconds.most_common(), ("all", _seconds.total())]:
        count = _tests[folder] if folder in _tests else _tests.total()
        terminalreporter.line(f"{seconds:8.1f} s {count:5} tests  {folder}")


@pytest.fixture(params=["unmoved", "moved"])
def other_weights(request):
    """A base as it is, and on `moved` weights, where luck of one processor's rounding fails."""
    from tests.training import moved

    return moved if request.param == "moved" else lambda base: base


@pytest.fixture
def compose(tmp_path):
    """Compose a request as the command line does, with all outputs below tmp_path."""

    def make(*overrides):
        places = (f"exec.runs_dir={tmp_path}/runs", f"exec.reports_dir={tmp_path}/reports")
        request = compose_request([*places, *overrides])
        check(request)
        return request

    return make


class FakeTrainer:
    """Trains nothing: the final NLL is a planted function of the spec, and so are a learning curve
    and other measures if asked for. Counts what it was asked to train."""

    def __init__(self, nll, start=3.0, fail=None, curve=None, more=None):
        self.nll, self.start, self.trained = nll, start, []
        self.fail = fail or (lambda spec: False)
        self.curve = curve or (lambda spec: [{"step": 1, "test_nll": nll(spec)}])
        self.more = more or (lambda spec: {})

    def __call__(self, pack, exec_, resume):
        self.trained += [spec.id for spec in pack]
        if any(map(self.fail, pack)):
            raise RuntimeError("planted failure")
        records, ended = {}, {}
        for spec in pack:
            nll, more = self.nll(spec), {"steps_done": 1, **self.more(spec)}
            records[spec.id] = {"step": 1, "train_nll": nll, "test_nll": nll}
            ended[spec.id] = planted_end(spec, self.start, nll, self.curve(spec), **more)
        states = {spec.id: {"tensors": {}, "meta": {"step": 1}} for spec in pack}
        yield Event(1, records, ended, lambda: states)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run `python -m lorasweep ...` in this process, in tmp_path; returns the finished command."""

    def run(*arguments):
        from hydra.core.global_hydra import GlobalHydra

        monkeypatch.setattr(sys, "argv", ["lorasweep", *map(str, arguments)])
        monkeypatch.setenv("LORASWEEP_RUNS", f"{tmp_path}/runs")
        monkeypatch.setenv("LORASWEEP_REPORTS", f"{tmp_path}/reports")
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        GlobalHydra.instance().clear()
        signals, code = (signal.SIGTERM, signal.SIGHUP), 0
        handlers = [signal.getsignal(number) for number in signals]
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            for number, handler in zip(signals, handlers):
                signal.signal(number, handler)
            GlobalHydra.instance().clear()
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run


@pytest.fixture
def norms_in_float64(monkeypatch):
    """Norms and routers in float64: those of transformers go through float32, as 1e-9 cannot."""
    import torch

    def forward(self, x):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (x * scale)

    def route(self, x):
        logits = x.reshape(-1, x.shape[-1]) @ self.weight.mT
        top, chosen = logits.softmax(-1).topk(self.top_k)
        return logits, top / (top.sum(-1, keepdim=True) if self.norm_topk_prob else 1), chosen

    moe = "qwen3_moe.modeling_qwen3_moe.Qwen3Moe"
    for family in ("llama.modeling_llama.Llama", "qwen3.modeling_qwen3.Qwen3", moe):
        monkeypatch.setattr(f"transformers.models.{family}RMSNorm.forward", forward)
    monkeypatch.setattr(f"transformers.models.{moe}TopKRouter.forward", route)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """Run the sweep by its command; give its folder, with runs and reports, and what it printed."""
    folder = tmp_path_factory.mktemp("smoke")
    return folder, cli(*SMOKE, cwd=folder)


@pytest.fixture
def smoke_copy(smoke, tmp_path):
    folder, done = smoke
    for name in ("runs", "reports"):
        shutil.copytree(folder / name, tmp_path / name, copy_function=shutil.copy2)
    return done


@pytest.fixture(scope="session")
def rank_answer(tmp_path_factory):
    """A folder with `runs` and `reports` of the sweep `rank` at scale smoke, 96 updates."""
    folder, world = tmp_path_factory.mktemp("rank"), World(lambda spec: 0.7)
    sweep = ("+sweep=rank", "scale=smoke", "sweep.replicate.seeds=[1,2,3]", "sweep.axes.steps=96")
    places = (f"exec.runs_dir={folder}/runs", f"exec.reports_dir={folder}/reports")
    rates = (("fullft", FULL), ("lora", LORA))
    grids = (f"sweep.arms.{arm}.lr=${{around:{best:g},7,2}}" for arm, best in rates)
    request = compose_request([*sweep, *grids, *places, "format=json"])
    trainer = FakeTrainer(world.nll, start=START, curve=world.curve, more=world.more)
    assert act(request, trainer) == 0
    return folder


@pytest.fixture
def reports(rank_answer, tmp_path):
    """A copy of its report as `rank-smoke`, to be changed."""
    (made,) = (rank_answer / "reports").iterdir()
    shutil.copytree(made, tmp_path / "reports" / "rank-smoke")
    return tmp_path / "reports"


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Give `datasets` an empty cache and no network; return the cache."""
    small_hub.offline(tmp_path, monkeypatch)
    return tmp_path / "datasets"


@pytest.fixture
def hub(tmp_path, offline):
    """`hub(name, rows)` leaves a data set, rows: {configuration: {split: rows}}; returns its path."""
    import datasets
    import yaml

    def made(name, content, described=True):
        configs, infos = [], []
        for config, splits in content.items():
            features = datasets.Dataset.from_list(next(filter(None, splits.values()))).features
            files, counts = [], []
            (tmp_path / name / config).mkdir(parents=True)
            for split, rows in splits.items():
                path = f"{config}/{split}-00000-of-00001.parquet"
                columns = {column: [row[column] for row in rows] for column in features}
                datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / name / path)
                files.append({"split": split, "path": path})
                counts.append({"name": split, "num_examples": len(rows), "num_bytes": 1})
            configs.append({"config_name": config, "data_files": files})
            described_as = {"features": features._to_yaml_list(), "splits": counts}
            infos.append({"config_name": config, **described_as})
        card = {"configs": configs, **({"dataset_info": infos} if described else {})}
        (tmp_path / name / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
        return str(tmp_path / name)

    return made

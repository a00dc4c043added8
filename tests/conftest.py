"""Fixtures: the shipped configuration, composed as the command line does, and a fake trainer."""

import os
import shutil
import signal
import subprocess
import sys
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
from lorasweep.cli.actions import check  # noqa: E402
from lorasweep.train.events import Event  # noqa: E402
from tests.world import compose_request, planted_end  # noqa: E402


def pytest_report_header():
    """Say which of its sets of kernels torch uses (tests/test_processors.py)."""
    import torch

    return f"kernels: {torch.backends.cpu.get_cpu_capability()}"


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

"""One planted sweep with its whole report, made once: what study pages and qualification read. And
norms that a float64 reference can be compared with."""

import shutil
from pathlib import Path

import pytest

from lorasweep.cli.actions import act
from tests.conftest import FakeTrainer
from tests.planted import GRIDS, START, World
from tests.world import compose_request

RHO = 0.7


@pytest.fixture(scope="session")
def rank_answer(tmp_path_factory):
    """A folder with `runs` and `reports` of the sweep `rank` at scale smoke, 96 updates."""
    folder, world = tmp_path_factory.mktemp("rank"), World(lambda spec: RHO)
    request = compose_request(
        [
            "+sweep=rank",
            "scale=smoke",
            "format=json",
            "sweep.replicate.seeds=[1,2,3]",
            "sweep.axes.steps=96",
            f"exec.runs_dir={folder}/runs",
            f"exec.reports_dir={folder}/reports",
            *GRIDS,
        ]
    )
    trainer = FakeTrainer(world.nll, start=START, curve=world.curve, more=world.more)
    assert act(request, trainer) == 0
    return folder


@pytest.fixture
def reports(rank_answer, tmp_path) -> Path:
    """A copy of its report as `rank-smoke`, to be changed."""
    (made,) = (rank_answer / "reports").iterdir()
    shutil.copytree(made, tmp_path / "reports" / "rank-smoke")
    return tmp_path / "reports"


@pytest.fixture
def norms_in_float64(monkeypatch):
    """transformers' norms go through float32 even in a float64 model, and so do the probabilities of
    a router; a reference of 1e-9 cannot."""

    import torch

    def forward(self, x):
        return self.weight * (
            x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )

    def route(self, x):
        logits = x.reshape(-1, x.shape[-1]) @ self.weight.mT
        top, chosen = logits.softmax(-1).topk(self.top_k)
        return logits, top / (top.sum(-1, keepdim=True) if self.norm_topk_prob else 1), chosen

    for family in (
        "llama.modeling_llama.LlamaRMSNorm",
        "qwen3.modeling_qwen3.Qwen3RMSNorm",
        "qwen3_moe.modeling_qwen3_moe.Qwen3MoeRMSNorm",
    ):
        monkeypatch.setattr(f"transformers.models.{family}.forward", forward)
    router = "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeTopKRouter"
    monkeypatch.setattr(f"{router}.forward", route)

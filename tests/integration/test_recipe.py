"""Recipe models: the shipped bases are what their recipe makes, as far as a short training can
tell."""

import dataclasses

import pytest
import torch

from lorasweep.config.compose import shipped_model
from lorasweep.data import load as data
from lorasweep.data.batches import eval_batches
from lorasweep.models import load as models
from lorasweep.spec.dataset import DatasetSpec
from lorasweep.train import pretrain as recipe
from lorasweep.train.objectives.sft import evaluate

pytestmark = pytest.mark.slow


def test_a_recipe_is_trained_once_and_cached_by_content(tmp_path, capsys):
    spec = shipped_model("tiny64")
    short = dataclasses.replace(
        spec, recipe=dataclasses.replace(spec.recipe, steps=2, batch_size=4)
    )
    first = models.load(short, [str(tmp_path)])
    assert "training base model" in capsys.readouterr().out
    second = models.load(short, [str(tmp_path)])
    assert capsys.readouterr().out == "" and first.sha256 == second.sha256
    other = dataclasses.replace(short, recipe=dataclasses.replace(short.recipe, seed=1))
    assert recipe.file_name(other) != recipe.file_name(short)
    assert models.load(other, [str(tmp_path)]).sha256 != first.sha256


REACHED = {
    "tiny64": 2.0378,
    "tiny64-3m": 2.1849,
    "tiny64-s1": 2.0295,
    "tiny64-facts": 2.7169,
    "tiny64-knows": 0.8102,
    "tiny64-skills": 0.5059,
    "tiny128": 1.8809,
    "tiny128-3m": 2.0817,
    "tiny128-4m": 2.0215,
}
"""NLL of the shipped weights on held-out rows of what they were pretrained on, as their recipes
reached it."""


def held_out_nll(name: str) -> float:
    spec = shipped_model(name)
    language = DatasetSpec(
        name=f"pretrain-{spec.recipe.dataset}",
        source="synthetic",
        location=spec.recipe.dataset,
        format="tokens",
        mask="all",
        max_length=spec.recipe.length,
        n_test=512,
        knobs=spec.recipe.knobs,
    )
    return evaluate(
        models.load(spec, []).model, eval_batches(data.load(language, []).test, 8192), 1, "fp32"
    )[0]


@pytest.mark.parametrize("name", REACHED)
def test_shipped_bases_belong_to_the_recipe_in_conf(name):
    assert (models.SHIPPED / recipe.file_name(shipped_model(name))).is_file()
    assert held_out_nll(name) == pytest.approx(REACHED[name], abs=1e-3)


def test_no_base_is_shipped_without_this_test():
    assert {p.name for p in models.SHIPPED.glob("*.safetensors")} == {
        recipe.file_name(shipped_model(n)) for n in REACHED
    }


def test_the_recipe_remakes_a_shipped_base():
    """Trained anew in full; equal in NLL to rounding noise (bit for bit only on the processor that
    made it)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _, reached = recipe.pretrain(shipped_model("tiny64"))
    finally:
        torch.set_num_threads(threads)
    assert reached["nll"] == pytest.approx(REACHED["tiny64"], abs=0.02)

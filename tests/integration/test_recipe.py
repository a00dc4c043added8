"""Recipe models: the shipped bases are what their recipe makes, as far as a short training can tell."""

import dataclasses

import pytest

from lorasweep import models, recipe
from lorasweep.compose import shipped_model

pytestmark = pytest.mark.slow


def test_a_recipe_is_trained_once_and_cached_by_content(tmp_path, capsys):
    spec = shipped_model("tiny64")
    short = dataclasses.replace(spec, recipe=dataclasses.replace(spec.recipe, steps=2, batch_size=4))
    first = models.load(short, [str(tmp_path)])
    assert "training base model" in capsys.readouterr().out
    second = models.load(short, [str(tmp_path)])
    assert capsys.readouterr().out == "" and first.sha256 == second.sha256
    other = dataclasses.replace(short, recipe=dataclasses.replace(short.recipe, seed=1))
    assert recipe.file_name(other) != recipe.file_name(short)
    assert models.load(other, [str(tmp_path)]).sha256 != first.sha256


@pytest.mark.parametrize("name", ["tiny64", "tiny64-3m", "tiny64-s1", "tiny64-facts", "tiny64-knows", "tiny64-skills", "tiny128", "tiny128-3m", "tiny128-4m"])
def test_shipped_bases_belong_to_the_recipe_in_conf(name):
    assert (models.SHIPPED / recipe.file_name(shipped_model(name))).is_file()


def test_the_recipe_remakes_the_shipped_base():
    """Trained anew in full; equal in NLL to rounding noise (bit for bit only on the processor that made it)."""
    import torch

    from lorasweep import data
    from lorasweep.data.batches import eval_batches
    from lorasweep.loss import evaluate
    from lorasweep.spec import DatasetSpec

    spec = shipped_model("tiny64")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _, reached = recipe.pretrain(spec)
    finally:
        torch.set_num_threads(threads)
    language = DatasetSpec(name="pretrain-dialect", source="synthetic", location="dialect", format="tokens", mask="all",
                           max_length=64, n_test=512, knobs=spec.recipe.knobs)
    batches = eval_batches(data.load(language, []).test, 8192)
    shipped = evaluate(models.load(spec, []).model, batches, 1, "fp32")[0]
    assert reached["nll"] == pytest.approx(shipped, abs=0.02)

"""Recipe models: the shipped bases are what their recipe makes, as far as its first updates and the
shipped weights can tell. `make bases` remakes them; `make nightly` does so and compares."""

import dataclasses
import itertools
import json

import pytest
import torch

from lorasweep.cli import bases
from lorasweep.config.compose import shipped_model
from lorasweep.errors import ModelError
from lorasweep.models import find
from lorasweep.models import load as models
from lorasweep.train import pretrain
from tests.world import ROOT

pytestmark = pytest.mark.slow


def test_a_recipe_is_trained_once_and_cached_by_content(tmp_path, capsys):
    spec = shipped_model("tiny64")
    recipe = dataclasses.replace(spec.recipe, steps=2, batch_size=4)
    short = dataclasses.replace(spec, recipe=recipe)
    folder = [str(tmp_path)]
    with pytest.raises(ModelError, match="Pretrain it first"):
        models.load(short, folder)
    pretrain.ensure(short, folder)
    assert "training base model" in capsys.readouterr().out
    first = models.load(short, folder)
    pretrain.ensure(short, folder)
    assert capsys.readouterr().out == ""
    other = dataclasses.replace(short, recipe=dataclasses.replace(short.recipe, seed=1))
    assert find.recipe_file_name(other) != find.recipe_file_name(short)
    pretrain.ensure(other, folder)
    assert models.load(other, folder).sha256 != first.sha256


REACHED = {
    **{"tiny64": 2.0378, "tiny64-3m": 2.1849, "tiny64-s1": 2.0295, "tiny64-facts": 2.7169},
    **{"tiny64-knows": 0.8102, "tiny64-skills": 0.5059, "tiny64-skilled": 0.8634},
    **{"tiny64-experts": 2.0658, "tiny128": 1.8809, "tiny128-3m": 2.0817, "tiny128-4m": 2.0215},
}
PREFIX = json.loads((ROOT / "tests/golden/pretraining.json").read_text())
"""NLL of the shipped weights on held-out rows of their pretraining task; losses of first updates."""


@pytest.mark.parametrize(
    "name",
    [n if n in ("tiny64", "tiny128") else pytest.param(n, marks=pytest.mark.full) for n in REACHED],
)
def test_shipped_bases_belong_to_the_recipe_in_conf(name):
    """No base is shipped without this test."""
    spec = shipped_model(name)
    files = {find.recipe_file_name(shipped_model(n)) for n in REACHED}
    assert set(bases.NAMES) == REACHED.keys()
    assert {p.name for p in find.SHIPPED.glob("*.safetensors")} == files
    data = pretrain.pretraining_data(spec.recipe)
    nll = pretrain.held_out_nll(models.load(spec, []).model, data)
    assert nll == pytest.approx(REACHED[name], abs=1e-3)


@pytest.mark.full
@pytest.mark.parametrize("name", PREFIX)
def test_a_recipe_begins_as_the_shipped_base_was_made(name):
    """The recorded losses of the first updates, the warm-up and its end included. Other kernels
    (SSE4.2, AVX2, two threads) differ by 5e-7 nats, a weight decay of 0.01 by 9e-5, a constant rate in
    place of the cosine by 3e-4, other betas, eps, clipping, warm-up, bias correction or order of the
    rows by 3e-3 to 0.5."""
    spec = shipped_model(name)
    assert spec.recipe.steps // 20 < len(PREFIX[name]) - 20
    torch.manual_seed(spec.recipe.seed)
    model, data = models.empty_model(spec), pretrain.pretraining_data(spec.recipe)
    made = itertools.islice(pretrain.updates(model, spec.recipe, data), len(PREFIX[name]))
    assert [nll for _, nll in made] == pytest.approx(PREFIX[name], abs=1e-5)


def test_the_command_of_make_bases_tells_a_base_that_its_recipe_does_not_make(monkeypatch, capsys):
    spec = shipped_model("tiny64")
    shipped = models.load(spec, []).model
    for off, status in ((0.01, 0), (0.03, 1)):
        made = shipped, REACHED["tiny64"] + off
        monkeypatch.setattr(pretrain, "pretrain", lambda given, progress, made=made: made)
        assert bases.main(["--check", "tiny64"]) == status
    assert "retraining gave another loss for: tiny64" in capsys.readouterr().out

"""The command line's meaning: grids, axes, and bad input refused before anything starts, with what
to type next."""

import pytest
import yaml

from lorasweep.config.preflight import check_available
from lorasweep.errors import DataError, LorasweepError, ModelError, SpecError
from tests.world import ROOT


@pytest.mark.parametrize("group", ["model", "dataset"])
def test_every_model_and_data_set_is_described_in_full(compose, group):
    one = ("method=lora", "method.rank=1", "method.layers=attention")  # experts share a rank
    for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
        (point,) = compose(f"{group}={path.stem}", *one).points
        assert getattr(point.spec, group).name == path.stem and point.spec.model.n_params > 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["+sweep=lr_ratio", "lr=3e-3"], r"sweep\.arms\.fullft\.lr"),
        (["+sweep=lr_ratio", "model=tiny64"], r"sweep\.axes\.model"),
        (["+sweep=lr_ratio", "method.rank=4"], r"sweep\.arms\.lora\.rank"),
        (["+sweep=lr_ratio", "sweep.axes.model=[tinny64]"], "Did you mean 'tiny64'"),
        (["+sweep=lr_ratio", "sweep.axes.dataset=[dialekt]"], "Did you mean 'dialect'"),
        (["+sweep=lr_ratio", "sweep.arms.lora.method=loro"], "Did you mean 'lora'"),
        (["+sweep=lr_ratio", "+sweep.arms.lora.rnak=[1]"], "Did you mean 'rank'"),
        (["+sweep=large_batches", "scale=paper"], "no scale 'paper'. Its file has: smoke, tiny"),
        (["+sweep=lr_ratio", "sweep.arms.lora.lr=[fast]"], "expected a finite number, got 'fast'"),
        (["lr=1e9"], "between"),
        (["action=go"], "Available: adapter"),
        (["format=xml"], "json"),
        (["mirror=tensorboard"], "wandb"),
        (["exec.pack_size=0"], "pack_size"),
        (["exec.workers=0"], "workers"),
        (["dataset.n_test_curve=9999"], "n_test"),
    ],
)
def test_bad_input_is_refused_with_what_to_type_next(compose, overrides, words):
    with pytest.raises(LorasweepError, match=words):
        compose(*overrides)


def test_a_scale_that_extends_another_takes_its_block_first(compose):
    tiny, beyond = (compose("+sweep=lr_ratio", f"scale={s}") for s in ("tiny", "tiny_beyond"))
    params = [r.points[0].spec.dataset.generator_params for r in (tiny, beyond)]
    assert [p["shift_rank"] for p in params] == [2, 8] and params[1]["rule_shift"] == 0.25
    assert beyond.sweep.replicate == tiny.sweep.replicate and beyond.scale == "tiny_beyond"


def test_changing_an_arm_changes_the_arms_that_refer_to_it(compose):
    points = compose("+sweep=rank", "scale=smoke", "sweep.arms.lora.rank=[2,4]").points
    assert {p.spec.method.rank for p in points if p.arm == "redraw"} == {2, 4}


@pytest.mark.parametrize(
    ("group", "change", "words"),
    [
        ("sweep", {"claims": {"c": {"says": "x"}}}, r"sweep\.claims\.NAME\.says is now text"),
        ("sweep", {"claims": {"c": {"sd": 0.1}}}, r"sd is now planning: \{SCALE: \{sd: \.\.\.\}\}"),
        ("sweep", {"second": {"seeds": [1]}}, r"sweep\.second is now replicate"),
        ("sweep", {"at": {"tiny": {}}}, r"sweep\.at is now scales"),
        (
            "sweep",
            {"second": {}, "at": {"tiny": {"axes": {"knobs": [{}]}}}},
            r"second is now replicate; sweep\.at is now scales; sweep\.at\.NAME\.axes\.knobs is now",
        ),
        ("sweep", {"axes": {"knobs": [{}]}}, r"sweep\.axes\.knobs is now generator_params"),
        ("dataset", {"knobs": {"a": 8}}, r"'mine': dataset\.knobs is now generator_params"),
    ],
)
def test_the_keys_of_an_old_file_are_refused_with_the_new_ones(
    compose, tmp_path, group, change, words
):
    values = {"name": "mine"} if group == "dataset" else {"question": "?"}
    (tmp_path / group).mkdir()
    text = f"# @package {group}\n{yaml.safe_dump({**values, **change})}"
    (tmp_path / group / "mine.yaml").write_text(text)
    with pytest.raises(SpecError, match=words):
        new = "+" * (group == "sweep")
        compose(f"hydra.searchpath=[file://{tmp_path}]", f"{new}{group}=mine")


def test_all_that_is_wrong_is_said_at_once(compose):
    with pytest.raises(SpecError) as error:
        compose("+sweep=lr_ratio", "sweep.arms.lora.lr=[0.0]", "sweep.arms.lora.rank=[4,16]")
    assert str(error.value).count("lr=0") >= 2


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["+sweep=lr_ratio", "scale=small", "exec.models_dir=[/no]"], ModelError, "make weights"),
        (["dataset=gsm8k", "exec.data_dir=[/no]"], DataError, r"exec\.data_dir"),
        (["dataset=skills", "model=tiny64"], SpecError, "48 symbols"),
    ],
)
def test_missing_weights_and_data_and_symbols_are_said(compose, overrides, error, words):
    with pytest.raises(error, match=words):
        check_available(compose(*overrides))

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


def test_a_grid_may_be_changed_from_the_command_line(compose):
    lora = ("sweep.arms.lora.rank=[1,2]", "sweep.arms.lora.lr=[1e-3,1.0001e-3,2e-3]")  # 2, snapped
    rest = ("+sweep.axes.batch_size=[2,4]", "~sweep.arms.fullft")
    request = compose("+sweep=lr_ratio", "scale=smoke", *lora, *rest)
    assert len(request.points) == 8
    assert {p.spec.method.rank for p in request.points} == {1, 2}
    request = compose("+sweep=lr_ratio", "scale=smoke", "sweep.arms.lora.lr=${geom:1e-4,1e-3,2}")
    assert sorted(p.spec.lr for p in request.points if p.arm == "lora") == [1e-4, 3.16e-4, 1e-3]


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
        (["+sweep=lr_ratio", "scale=smoke", "sweep.axes.seed=[]"], "empty"),
        (["+sweep=large_batches", "scale=paper"], "no scale 'paper'. Its file has: smoke, tiny"),
        (["+sweep=lr_ratio", "sweep.arms.lora.lr=[-1e-3]"], "lr=-0.001"),
        (["+sweep=lr_ratio", "sweep.arms.lora.lr=[fast]"], "expected a finite number, got 'fast'"),
        (["+sweep=lr_ratio", "sweep.arms.lora.rank=[64]"], "from 1 to 32"),
        (["+sweep=lr_ratio", "+sweep.arms.lora.layers=[heads]"], "attention, mlp, unembedding"),
        (["+sweep=lr_ratio", "sweep.claims.ratio.margin=[3]"], "margin"),
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


def file_of(tmp_path, group, values):
    """Write an option of a user, and return the overrides that choose it."""
    (tmp_path / group).mkdir(exist_ok=True)
    (tmp_path / group / "mine.yaml").write_text(f"# @package {group}\n{yaml.safe_dump(values)}")
    return [f"hydra.searchpath=[file://{tmp_path}]", f"{'+' * (group == 'sweep')}{group}=mine"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"claims": {"c": {"says": "x"}}}, r"sweep\.claims\.NAME\.says is now text"),
        ({"claims": {"c": {"sd": 0.1}}}, r"sd is now planning: \{SCALE: \{sd: \.\.\.\}\}"),
        ({"second": {"seeds": [1]}}, r"sweep\.second is now replicate"),
        ({"at": {"tiny": {}}}, r"sweep\.at is now scales"),
        ({"axes": {"knobs": [{}]}}, r"sweep\.axes\.knobs is now generator_params"),
    ],
)
def test_the_keys_of_an_old_sweep_file_are_refused_with_the_new_ones(
    compose, tmp_path, change, words
):
    with pytest.raises(SpecError, match=words):
        compose(*file_of(tmp_path, "sweep", {"question": "?", **change}))


def test_the_keys_of_an_old_data_set_are_refused_with_the_new_ones(compose, tmp_path):
    with pytest.raises(SpecError, match=r"dataset 'mine': dataset\.knobs is now generator_params"):
        compose(*file_of(tmp_path, "dataset", {"name": "mine", "knobs": {"facts": 8}}))


@pytest.mark.parametrize(
    "overrides",
    [
        ["rank=4"],
        ["lr=abc"],
        ["scale=huge"],
        ["method=fullft", "method.rank=3"],
        ["+sweep=nothing"],
    ],
)
def test_unknown_keys_groups_and_types_are_hydras_errors(compose, overrides):
    with pytest.raises(Exception, match=r"(?i)could not|not in|error merging"):
        compose(*overrides)


def test_all_that_is_wrong_is_said_at_once(compose):
    with pytest.raises(SpecError) as error:
        compose("+sweep=lr_ratio", "sweep.arms.lora.lr=[0.0]", "sweep.arms.lora.rank=[4,16]")
    assert str(error.value).count("lr=0") >= 2


def test_missing_weights_and_data_say_how_to_get_them(compose, tmp_path):
    request = compose("+sweep=lr_ratio", "scale=small", f"exec.models_dir=[{tmp_path}]")
    with pytest.raises(ModelError, match="make weights"):
        check_available(request)
    request = compose("dataset=gsm8k", f"exec.data_dir=[{tmp_path}]")
    with pytest.raises(DataError, match=r"exec\.data_dir"):
        check_available(request)


def test_data_that_the_model_has_no_symbols_for_is_refused(compose):
    with pytest.raises(SpecError, match="48 symbols"):
        check_available(compose("dataset=skills", "model=tiny64"))

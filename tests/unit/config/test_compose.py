"""The command line's meaning: scales, arms that refer to others, the keys of old files."""

import pytest
import yaml

from lorasweep.errors import SpecError
from tests.world import ROOT


@pytest.mark.parametrize("group", ["model", "dataset"])
def test_every_model_and_data_set_is_described_in_full(compose, group):
    one = ("method=lora", "method.rank=1", "method.layers=attention")  # experts share a rank
    for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
        (point,) = compose(f"{group}={path.stem}", *one).points
        assert getattr(point.spec, group).name == path.stem and point.spec.model.n_params > 0


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
def test_old_keys_are_refused_with_the_new_ones(compose, tmp_path, group, change, words):
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

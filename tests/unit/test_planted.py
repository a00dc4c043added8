"""Planted truths through the whole pipeline (sweep file, grid, store, second stage, table, fit,
verdict, report): they must come back as what they are, and each verdict must be reachable."""

import json
import math

import numpy as np
import pytest

from analysis.optimum.valley import linex
from lorasweep.cli.actions import act
from lorasweep.errors import SpecError

FULL = 1.3e-3  # planted best full fine-tuning rate, off the grid


def valley(ratio, noise=5e-4, steep=0.7, cliff=None, depth=0.08, drift=0.0):
    """NLL over lr: an asymmetric valley; from `cliff` times the optimum on, the run diverges."""

    def nll(spec):
        best = FULL
        if spec.method.name == "lora":
            best *= ratio * 2 ** (drift * math.log2(spec.method.rank / 4))
        u = math.log(spec.lr / best)
        if cliff is not None and spec.lr > cliff * best:
            return math.nan
        rng = np.random.default_rng(int(spec.id, 16))
        shared = np.random.default_rng(spec.seed).normal(
            0, 3 * noise
        )  # one seed sees the same batches at every rate
        return 2.0 + depth * float(linex(np.array(u), steep)) * 2 + shared + rng.normal(0, noise)

    return nll


def ask(compose, capsys, fake_trainer, planted, seeds=(1, 2, 3, 4), extra=()):
    lora = f"sweep.arms.lora.lr=[{','.join(f'{FULL * planted.ratio * 2.0**k:.3g}' for k in range(-3, 4))}]"
    request = compose(
        "+sweep=lr_ratio",
        "scale=smoke",
        "scale.ranks=[4,8,16]",
        "format=json",
        f"scale.fresh_seeds=[{','.join(map(str, seeds))}]",
        "sweep.arms.fullft.lr=[1.5e-4,3e-4,6e-4,1.2e-3,2.4e-3,4.8e-3,9.6e-3]",
        lora,
        *extra,
    )
    trainer = fake_trainer(planted.nll)
    assert act(request, trainer) == 0
    out = json.loads(capsys.readouterr().out)
    assert act(request, trainer) == 0  # asked again: nothing is trained twice
    assert len(trainer.trained) == len(set(trainer.trained))
    assert json.loads(capsys.readouterr().out) == out
    return out, {v["claim"]: v for v in out["verdicts"]}


class Planted:
    def __init__(self, ratio, **kwargs):
        self.ratio, self.nll = ratio, valley(ratio, **kwargs)


@pytest.mark.parametrize(
    ("ratio", "primary", "order"),
    [
        (1, "REFUTED", "REFUTED"),
        (3, "REFUTED", "REFUTED"),
        (6, None, None),
        (10, "SUPPORTED", "SUPPORTED"),
        (20, "REFUTED", None),
    ],
)
def test_planted_ratio_comes_back(compose, capsys, fake_trainer, ratio, primary, order):
    out, verdicts = ask(compose, capsys, fake_trainer, Planted(ratio))
    estimate = verdicts["ratio"]["estimate"]
    assert estimate["low"] <= ratio <= estimate["high"]
    assert abs(math.log(estimate["value"] / ratio)) < math.log(1.15)
    assert primary is None or verdicts["ratio"]["outcome"] == primary
    assert verdicts["ratio"]["outcome"] != "SUPPORTED" or 7.1 <= ratio <= 14.1
    assert order is None or verdicts["order"]["outcome"] == order
    assert all(c["low"] < c["best_lr"] < c["high"] for c in out["curves"])


def test_no_drift_is_supported_and_a_planted_drift_is_refuted(compose, capsys, fake_trainer):
    _, flat = ask(compose, capsys, fake_trainer, Planted(3, noise=2e-4, steep=0.3))
    assert flat["drift"]["outcome"] == "SUPPORTED"


def test_a_planted_drift_is_refuted(compose, capsys, fake_trainer):
    _, steep = ask(compose, capsys, fake_trainer, Planted(3, noise=2e-4, steep=0.3, drift=0.5))
    assert steep["drift"]["outcome"] == "REFUTED"
    assert steep["drift"]["estimate"]["value"] == pytest.approx(0.5 * math.log(2), abs=0.1)


def test_a_cliff_just_right_of_the_best_rate_gives_a_bound_and_no_verdict(
    compose, capsys, fake_trainer
):
    """The loss falls until the run breaks down: where the optimum would lie is not known."""
    planted = Planted(3, cliff=0.9)
    out, verdicts = ask(compose, capsys, fake_trainer, planted)
    lora = [c for c in out["curves"] if c["method"] == "lora"]
    assert all(c["best_lr"] is None and "bounded_by_divergence" in c["flags"] for c in lora)
    assert all(c["low"] < FULL * 3 < c["high"] * 1.5 for c in lora)
    assert verdicts["ratio"]["outcome"] == "UNDECIDED" and verdicts["ratio"]["needed"]


def test_a_cliff_beyond_the_valley_leaves_the_optimum(compose, capsys, fake_trainer):
    _, verdicts = ask(compose, capsys, fake_trainer, Planted(10, cliff=3.0))
    assert verdicts["ratio"]["estimate"]["low"] <= 10 <= verdicts["ratio"]["estimate"]["high"]


def test_an_optimum_off_the_grid_is_a_bound(compose, capsys, fake_trainer):
    planted = Planted(3)
    out, verdicts = ask(
        compose,
        capsys,
        fake_trainer,
        planted,
        extra=["sweep.arms.fullft.lr=[1e-5,2e-5,4e-5,8e-5,1.6e-4]"],
    )
    full = next(c for c in out["curves"] if c["method"] == "fullft")
    assert full["best_lr"] is None and "at_edge" in full["flags"] and full["low"] is not None
    assert verdicts["ratio"]["outcome"] == "UNDECIDED"
    assert verdicts["ratio"]["needed"]


def test_one_seed_and_noise_leave_it_undecided_with_the_seeds_still_needed(
    compose, capsys, fake_trainer
):
    _, few = ask(compose, capsys, fake_trainer, Planted(10), seeds=())
    assert few["ratio"]["outcome"] == "UNDECIDED" and "seed" in few["ratio"]["why"]
    assert "seeds" in few["ratio"]["needed"]


def test_noise_leaves_it_undecided(compose, capsys, fake_trainer):
    _, noisy = ask(compose, capsys, fake_trainer, Planted(10, noise=0.02))
    assert noisy["ratio"]["outcome"] == "UNDECIDED"


def test_the_second_stage_brings_fresh_seeds_at_the_three_best_rates(compose, capsys, fake_trainer):
    planted = Planted(3)
    trainer = fake_trainer(planted.nll)
    request = compose(
        "+sweep=lr_ratio",
        "scale=smoke",
        "scale.fresh_seeds=[5,6]",
        "format=json",
        "sweep.arms.fullft.lr=[3e-4,6e-4,1.2e-3,2.4e-3,4.8e-3]",
    )
    act(request, trainer)
    assert len(trainer.trained) == 5 + 3 + 2 * 3 * 2


def test_fresh_seeds_go_only_to_the_arms_that_are_named(compose, fake_trainer):
    planted = Planted(3)
    trainer = fake_trainer(planted.nll)
    arguments = ("+sweep=lr_ratio", "scale=smoke", "scale.fresh_seeds=[5,6]", "format=json")
    act(compose(*arguments, "sweep.second.arms=[lora]"), trainer)
    assert len(trainer.trained) == 3 + 3 + 3 * 2  # two curves, then two seeds at LoRA's three rates
    with pytest.raises(SpecError, match=r"second\.arms names 'lorra'.*fullft"):
        compose(*arguments, "sweep.second.arms=[lorra]")


def test_a_failed_run_is_told_kept_apart_and_tried_again_only_on_request(
    compose, capsys, fake_trainer
):
    planted = Planted(3)
    trainer = fake_trainer(planted.nll, fail=lambda s: s.method.name == "lora" and s.lr == 5e-3)
    arguments = ("+sweep=lr_ratio", "scale=smoke", "exec.pack_size=1")
    assert act(compose(*arguments), trainer) == 1
    told = capsys.readouterr().err
    assert "planted failure" in told and "exec.retry=true" in told
    count = len(trainer.trained)
    assert act(compose(*arguments), trainer) == 1 and len(trainer.trained) == count
    trainer.fail = lambda s: False
    assert (
        act(compose(*arguments, "exec.retry=true"), trainer) == 0
        and len(trainer.trained) == count + 1
    )


def test_a_flipped_table_flips_the_verdict_and_the_report(compose, capsys, fake_trainer, tmp_path):
    import pandas as pd

    from analysis.__main__ import main

    _out, _verdicts = ask(compose, capsys, fake_trainer, Planted(10))
    report = tmp_path / "reports" / "lr_ratio-smoke"
    assert "**SUPPORTED**" in (report / "report.md").read_text()
    table = pd.read_parquet(report / "table.parquet")
    table.loc[table["method"] == "lora", "lr"] /= 5
    table.to_csv(tmp_path / "flipped.csv", index=False)
    assert (
        main(
            [
                "lr_ratio",
                "--reports-dir",
                str(tmp_path / "reports"),
                "--table",
                str(tmp_path / "flipped.csv"),
                "--out",
                str(tmp_path / "again"),
            ]
        )
        == 0
    )
    text = (tmp_path / "again" / "report.md").read_text()
    primary = next(line for line in text.splitlines() if line.startswith("| ratio (primary)"))
    assert "**REFUTED**" in primary


def test_a_sweep_is_extended_in_rounds_that_are_recorded_and_counted(
    compose, capsys, fake_trainer, tmp_path
):
    """An open claim, its suggested runs as round 2, and no fourth look."""
    planted = Planted(10, noise=0.02)
    lora = f"sweep.arms.lora.lr=[{','.join(f'{FULL * 10 * 2.0**k:.3g}' for k in range(-3, 4))}]"
    base = [
        "+sweep=lr_ratio",
        "scale=smoke",
        "scale.ranks=[4,8]",
        "format=json",
        "scale.fresh_seeds=[1,2,3]",
        "sweep.rounds=3",
        "sweep.arms.fullft.lr=[1.5e-4,3e-4,6e-4,1.2e-3,2.4e-3,4.8e-3,9.6e-3]",
        lora,
    ]
    trainer = fake_trainer(planted.nll)
    with pytest.raises(Exception, match="have not finished"):
        act(compose(*base, "action=extend"), trainer)
    assert act(compose(*base), trainer) == 0
    first = json.loads(capsys.readouterr().out)
    ratio = next(v for v in first["verdicts"] if v["claim"] == "ratio")
    assert ratio["outcome"] == "UNDECIDED" and "97.8%" in ratio["why"]
    before = len(trainer.trained)
    assert act(compose(*base, "action=extend"), trainer) == 0
    told = capsys.readouterr().out
    assert "round 2:" in told and "lr " in told
    assert len(trainer.trained) == before  # adding starts nothing
    with pytest.raises(Exception, match="have not finished"):
        act(compose(*base, "action=extend"), trainer)
    assert act(compose(*base), trainer) == 0
    second = json.loads(capsys.readouterr().out)
    added = len(trainer.trained) - before
    assert added == int(told.rsplit("round 2: ", 1)[1].split()[0]) > 0
    n = {v["claim"]: v["estimate"]["n"] for v in first["verdicts"]}
    assert all(
        v["estimate"]["n"] > n[v["claim"]] for v in second["verdicts"] if v["claim"] == "ratio"
    )
    assert act(compose(*base, "action=extend"), trainer) == 0 and act(compose(*base), trainer) == 0
    capsys.readouterr()
    with pytest.raises(Exception, match="optional stopping"):
        act(compose(*base, "action=extend"), trainer)


def test_rounds_are_not_extended_under_other_margins(compose, capsys, fake_trainer):
    planted = Planted(10, noise=0.02)
    base = [
        "+sweep=lr_ratio",
        "scale=smoke",
        "scale.ranks=[4]",
        "scale.fresh_seeds=[1,2]",
        "sweep.arms.fullft.lr=[3e-4,6e-4,1.2e-3,2.4e-3,4.8e-3]",
        "sweep.arms.lora.lr=[3e-3,6e-3,1.2e-2,2.4e-2,4.8e-2]",
    ]
    trainer = fake_trainer(planted.nll)
    for extra in ([], ["action=extend"], []):
        assert act(compose(*base, *extra), trainer) == 0
    with pytest.raises(Exception, match="claims, margins or rounds were changed"):
        act(compose(*base, "sweep.claims.ratio.margin=[5,30]", "action=extend"), trainer)


def test_an_optimum_beyond_the_edge_is_answered_by_rates_beyond_it(
    compose, capsys, fake_trainer, tmp_path
):
    from analysis.__main__ import main

    planted = Planted(3)
    ask(
        compose,
        capsys,
        fake_trainer,
        planted,
        extra=["sweep.arms.fullft.lr=[1e-5,2e-5,4e-5,8e-5,1.6e-4]"],
    )
    assert main(["suggest", "lr_ratio", "--reports-dir", str(tmp_path / "reports"), "--json"]) == 0
    wanted = [s for s in json.loads(capsys.readouterr().out) if s["method"] == "fullft"]
    assert [s["lr"] for s in wanted] == pytest.approx(
        [3.2e-4, 6.4e-4]
    ) and "beyond the edge" in wanted[0]["why"]

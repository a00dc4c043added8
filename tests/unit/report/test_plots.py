"""Figures: bounds as arrows, beginnings of runs named so, rewards upwards and on one scale."""

import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Annotation

from analysis.inference.estimate import AT_LEAST, Estimate
from analysis.optimum.fit import fit_all
from analysis.questions.base import Panel, Series
from analysis.report import plots
from analysis.runs.curves import at_step, lr_curves, title


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """drawn(draw, *given): the axes of the figure that draw(*given, path) saves."""

    def run(draw, *given):
        figures = []
        with monkeypatch.context() as patch:
            patch.setattr(plots.plt, "close", figures.append)
            draw(*given, tmp_path / "figure.png")
        return figures[0].axes

    return run


def test_a_bound_is_an_arrow_to_its_side_and_no_point(drawn):
    ends = [{"low": 0.9, "high": 1.1}, {"low": 2.0}, {"high": 3.0}, {"low": 1.0, "high": 4.0}]
    estimates = [Estimate(value, **e) for value, e in zip((1.0, None, None, None), ends)]
    estimates.append(Estimate(5.0, 4.5, 5.5, flags=(AT_LEAST,)))
    series = Series.of("rho", range(5), estimates)
    assert series.bounds == [0, 1, -1, 0, 1] and series.y == [1.0, 2.0, 3.0, None, 5.0]
    (ax,) = drawn(plots.panels, [Panel("t", "x", "y", [series])])
    found = [a for a in ax.get_children() if isinstance(a, Annotation)]
    ends = {(a.xy[0], a.xy[1]): a.xyann[1] for a in found}
    assert ends == {(1, 2.0): plots.ARROW, (2, 3.0): -plots.ARROW, (4, 5.0): plots.ARROW}
    points = np.array(ax.lines[0].get_ydata(), float)
    assert np.isfinite(points).tolist() == [True, False, False, False, False]


def runs():
    """Five rates and a curve of evaluations each."""
    common = {"model": "m", "dataset": "dialect(rule_shift=0)", "batch_size": 4, "steps": 16}
    common |= {"steps_done": 16, "schedule": "constant", "seed": 0, "status": "done"}
    rows = []
    for method, rank in (("fullft", None), ("lora", 4)):
        for lr in 1e-3 * 2.0 ** np.arange(-2, 3):
            off = 0.1 * np.log(lr / 1.1e-3) ** 2
            curve = [{"step": s, "test_nll": 3 - 0.2 * np.log2(s) + off} for s in (1, 2, 4, 8, 16)]
            rows.append({**common, "method": method, "rank": rank, "lr": lr, "nll_start": 5.0})
            rows[-1] |= {"test_nll": curve[-1]["test_nll"], "result": json.dumps({"curve": curve})}
    return pd.DataFrame(rows)


def test_a_figure_of_cut_runs_shows_them_and_says_of_what_they_are_the_beginning(drawn):
    table = runs()
    optima = fit_all(lr_curves(at_step(at_step(table, 8), 4)))
    (ax,) = drawn(plots.learning, table, optima)
    curves = [line.get_xdata() for line in ax.lines if len(line.get_xdata()) > 2]
    assert len(curves) == 10 and all(max(x) == 4 for x in curves)
    words = "m on dialect (no new rules), batch 4, "
    assert ax.get_title() == title(optima[0].curve) == f"{words}first 4 of 16 updates"


def test_rewards_are_drawn_as_rewards_upwards_and_on_one_scale(drawn):
    """A loss of -0.4 is a reward of 0.4; an optimum at an edge is an arrow, its legend a bound."""
    metric = {"name": "test_reward", "higher_is_better": True, "label": "held-out reward"}
    found = []
    for name, height in (("a", 0.4), ("b", 0.8)):
        table = runs().assign(dataset=name, objective="policy_gradient", metric="test_reward")
        table["test_nll"] = table["test_nll"] - table["test_nll"].min() - height
        kept = json.dumps({"metric": metric, "curve": [{"step": 1, "test_nll": -height}]})
        found.append(table.assign(nll_start=-0.1, result=kept))
    table = pd.concat(found, ignore_index=True)
    optima = fit_all(lr_curves(table))
    for given in ((plots.lr_against_nll, optima), (plots.learning, table, optima)):
        one, other = drawn(*given)
        assert one.yaxis_inverted() and one.get_ylim() == other.get_ylim()
        assert one.get_ylabel().startswith("held-out reward")
        assert one.yaxis.get_major_formatter()(-0.4) == "0.4"
    table = runs()
    table["test_nll"] = 3 - 0.1 * np.log(table["lr"] / 1e-4)  # falls up to the highest rate
    (ax,) = drawn(plots.lr_against_nll, fit_all(lr_curves(table)))
    arrows = [a.xyann for a in ax.get_children() if isinstance(a, Annotation)]
    assert arrows == [(plots.ARROW, 0)] * 2
    assert all("best > " in t.get_text() for t in ax.get_legend().get_texts())


def test_a_fitted_line_ends_before_the_first_rate_at_which_a_run_broke_down(drawn):
    """One run of three at the fourth rate of six: the best rates are beyond it, and have no line."""
    one = runs().query("method == 'lora'").drop_duplicates("lr").sort_values("lr")
    rates, losses = 1e-4 * 2.0 ** np.arange(6), np.array([3.0, 2.6, 2.3, 2.1, 2.0, 2.05])
    table = pd.concat([one.iloc[[0]]] * 18, ignore_index=True)
    table = table.assign(lr=rates.repeat(3), seed=[0, 1, 2] * 6, test_nll=losses.repeat(3))
    table["test_nll"] += 0.01 * table["seed"]
    table.loc[10, ["status", "test_nll"]] = ["diverged", None]
    (ax,) = drawn(plots.lr_against_nll, fit_all(lr_curves(table)))
    (fitted,) = [line for line in ax.lines if len(line.get_xdata()) == 200]
    assert max(fitted.get_xdata()) == pytest.approx(rates[2])
    lines = [line for line in ax.lines if line.get_markerfacecolor() == "none"]
    hollow = {round(x, 8) for line in lines for x in line.get_xdata()}
    assert hollow == set(np.round(rates[3:], 8))

"""Figures: one scale for each quantity, one legend, bounds as arrows, zeros as zeros."""

import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Annotation

from analysis.inference.estimate import AT_LEAST, Estimate
from analysis.optimum.fit import fit_all
from analysis.questions.base import Panel, Series
from analysis.report import plots
from analysis.runs.learning_curves import at_step
from analysis.runs.lr_curves import lr_curves, title


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """drawn(draw, *given): the figure that draw(*given, path) saves."""

    def run(draw, *given):
        figures = []
        with monkeypatch.context() as patch:
            patch.setattr(plots.plt, "close", figures.append)
            draw(*given, tmp_path / "figure.png")
        (figure,) = figures
        return figure

    return run


def panel(heights, name="rho", **look):
    series = [Series(label, [1, 2], [v, v]) for label, v in zip(("a", "b", "c", "d"), heights)]
    return Panel("t", "x", name, series, **look)


def test_panels_of_one_quantity_have_one_scale_and_one_legend(drawn):
    parts = [panel((0.1, 0.2), log_y=True), panel((0.5, 1.0), log_y=True), panel((9, 9), "nats")]
    figure = drawn(plots.panels, parts)
    one, two, other, _ = figure.axes
    assert one.get_ylim() == two.get_ylim() != other.get_ylim()
    assert one.get_ylim()[0] < 0.1 and one.get_ylim()[1] > 1.0
    assert len(figure.legends) == 1 and not any(ax.get_legend() for ax in figure.axes)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["a", "b"]
    figure = drawn(plots.panels, [panel((1, 2)), panel((1, 2, 3))])
    assert not figure.legends and all(ax.get_legend() for ax in figure.axes)


def test_a_bound_is_an_arrow_to_its_side_and_no_point(drawn):
    estimates = [
        Estimate(1.0, 0.9, 1.1),
        Estimate(None, low=2.0),
        Estimate(None, high=3.0),
        Estimate(None, low=1.0, high=4.0),
        Estimate(5.0, 4.5, 5.5, flags=(AT_LEAST,)),
    ]
    series = Series.of("rho", range(5), estimates)
    assert series.bounds == [0, 1, -1, 0, 1] and series.y == [1.0, 2.0, 3.0, None, 5.0]
    figure = drawn(plots.panels, [Panel("t", "x", "y", [series])])
    (ax,) = figure.axes
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
    (ax,) = drawn(plots.learning, table, optima).axes
    curves = [line.get_xdata() for line in ax.lines if len(line.get_xdata()) > 2]
    assert len(curves) == 10 and all(max(x) == 4 for x in curves)
    words = "m on dialect (no new rules), batch 4, "
    assert ax.get_title() == title(optima[0].curve) == f"{words}first 4 of 16 updates"
    assert {title(c) for c in lr_curves(table)} == {f"{words}16 updates"}


def test_rewards_are_drawn_as_rewards_upwards_and_on_one_scale(drawn):
    """A loss of -0.4 is a reward of 0.4; data sets of rewards share their axes, those of losses not."""
    metric = {"name": "test_reward", "higher_is_better": True, "label": "held-out reward"}
    found = []
    for name, height in (("a", 0.4), ("b", 0.8), ("c", None)):
        table = runs().assign(dataset=name, objective="policy_gradient" if height else None)
        if height:
            table["test_nll"] = table["test_nll"] - table["test_nll"].min() - height
            kept = json.dumps({"metric": metric, "curve": [{"step": 1, "test_nll": -height}]})
            table = table.assign(metric="test_reward", nll_start=-0.1, result=kept)
        found.append(table)
    table = pd.concat(found, ignore_index=True)
    optima = fit_all(lr_curves(table))
    heights, curves = (plots.lr_against_nll, optima), (plots.learning, table, optima)
    for draw, *given in (heights, curves):
        axes = drawn(draw, *given).axes
        of = {ax.get_title().split()[2].strip(","): ax for ax in axes if ax.get_title()}
        one, other, loss = (of[name] for name in "abc")
        assert one.yaxis_inverted() and other.yaxis_inverted() and not loss.yaxis_inverted()
        assert one.get_ylim() == other.get_ylim() != loss.get_ylim()
        assert one.get_ylabel().startswith("held-out reward") and "nats" in loss.get_ylabel()
        assert one.yaxis.get_major_formatter()(-0.4) == "0.4"
        assert "policy gradient" in one.get_title()


def test_a_fitted_line_ends_before_the_first_rate_at_which_a_run_broke_down(drawn):
    """One run of three at the fourth rate of six: the best rates are beyond it, and have no line.
    An optimum at an edge is an arrow, and its legend a bound."""
    table = runs()
    table["test_nll"] = 3 - 0.1 * np.log(table["lr"] / 1e-4)  # falls up to the highest rate
    (ax,) = drawn(plots.lr_against_nll, fit_all(lr_curves(table))).axes
    found = [a.xyann for a in ax.get_children() if isinstance(a, Annotation)]
    assert found == [(plots.ARROW, 0)] * 2
    assert all("best > " in t.get_text() for t in ax.get_legend().get_texts())
    one = runs().query("method == 'lora'").drop_duplicates("lr").sort_values("lr")
    rates, losses = 1e-4 * 2.0 ** np.arange(6), np.array([3.0, 2.6, 2.3, 2.1, 2.0, 2.05])
    table = pd.concat([one.iloc[[0]]] * 18, ignore_index=True)
    table = table.assign(lr=rates.repeat(3), seed=[0, 1, 2] * 6, test_nll=losses.repeat(3))
    table["test_nll"] += 0.01 * table["seed"]
    table.loc[10, ["status", "test_nll"]] = ["diverged", None]
    optima = fit_all(lr_curves(table))
    assert np.exp(optima[0].curve.unbroken) == pytest.approx(rates[:3])
    (ax,) = drawn(plots.lr_against_nll, optima).axes
    (fitted,) = [line for line in ax.lines if len(line.get_xdata()) == 200]
    assert max(fitted.get_xdata()) == pytest.approx(rates[2])
    lines = [line for line in ax.lines if line.get_markerfacecolor() == "none"]
    hollow = [x for line in lines for x in line.get_xdata()]
    assert set(np.round(hollow, 8)) == set(np.round(rates[3:], 8))

"""fit, ratio, drift, law and html on anyone's table."""

import json
import math

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis.tables.commands import KEPT
from tests.planted import planted, run, write


@pytest.fixture
def asked(tmp_path, capsys):
    """asked(table, *options): what fit prints about a table as JSON."""

    def values(table, *options):
        code, text, _ = run(capsys, "fit", write(tmp_path, table), *options, "--json")
        assert code == 0
        return json.loads(text)

    return values


def test_fit_prints_a_line_a_curve_and_writes_the_objects(tmp_path, capsys):
    path = write(tmp_path, planted().assign(dataset="d", batch_size=16, layers="mlp"))
    code, text, _ = run(capsys, "fit", path, "--out", tmp_path / "fits.json")
    rows = json.loads((tmp_path / "fits.json").read_text())
    keys = {"model", "dataset", "method", "rank", "layers", "batch_size", "n", "best_nll", "flags"}
    assert code == 0 and keys | {"best_lr", "low", "high", "band"} <= rows[0].keys()
    full = next(r for r in rows if r["rank"] is None)
    assert full["method"] == "fullft" and full["best_lr"] == pytest.approx(1.3e-4, rel=0.1)
    assert full["low"] < 1.3e-4 < full["high"]
    # a loss of 0.01 under a valley of curvature 0.1 is about sqrt(0.2) wide on each side
    width = math.log(full["band"][1] / full["band"][0])
    assert width == pytest.approx(2 * math.sqrt(0.2), rel=0.15)
    assert len(text.splitlines()) == 1 + len(rows) and text.startswith("model  ")


def test_ratio_and_drift_come_back(asked):
    assert all(r["low"] < 10 < r["high"] for r in asked(planted(), "--ratio")["ratios"])
    (row,) = asked(planted(), "--drift")
    assert row["low"] < 0 < row["high"] and row["ranks"] == [4, 16]
    # rank 1 is not pooled with higher ranks
    low = planted(ratio=2.5, ranks=(1,)).dropna(subset=["rank"])
    models = [pd.concat([planted(), low]).assign(model=name) for name in "mno"]
    found = asked(pd.concat(models), "--ratio")
    assert {r["rank"] for r in found["ratios"]} == {1, 4, 16} and found["pooled"]["groups"] == 3
    assert found["pooled"]["low"] < 10 < found["pooled"]["high"] < 12
    more = planted(ranks=(4,), seeds=(9,))  # a seed that only LoRA has shifts no gap
    more = pd.concat([planted((None, 4)), more.assign(test_nll=more["test_nll"] + 5)])
    assert abs(asked(more, "--ratio")["ratios"][0]["gap"]) < 0.01
    # layer sets share one full fine-tuning curve, which is not two witnesses
    one = planted().assign(alpha=32.0, scaling_by="rank", init_scale=1.0, eps=1e-8)
    found = asked(pd.concat([one.assign(layers=v) for v in ("attention", "mlp")]), "--ratio")
    variants = {r["group"].split("; ")[1] for r in found["ratios"]}
    assert variants == {"layers attention", "layers mlp"}  # not what all have, such as alpha
    assert len(found["ratios"]) == 4 and found["pooled"] is None


@pytest.mark.parametrize(
    ("table", "options", "word"),
    [
        ({}, ("--law",), "hidden_size"),
        ({"ranks": (4, 8)}, ("--ratio",), "no fullft run"),
        ({"ranks": (None,)}, ("--drift",), "no lora run"),
        ({}, ("--higher", "test_nl"), "Did you mean 'test_nll'?"),
        ({}, ("--out", "runs.csv/fits.json"), "runs.csv"),  # cannot be written
        ({}, ("--out", "runs.csv"), "is the table itself"),
    ],
)
def test_what_a_command_needs_is_named(tmp_path, capsys, monkeypatch, table, options, word):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "fit", write(tmp_path, planted(seeds=(0,), **table)), *options)
    assert code == 2 and word in err


@pytest.mark.parametrize(
    "argv",
    [
        *("fit FILE --write", "fit FILE --scale tiny", "html FILE --ratio", "html FILE --json"),
        *("study --within 1", "lr_ratio --map a=lr", "lr_ratio --higher acc", "lr_ratio --law"),
    ],
)
def test_an_option_of_another_command_is_refused(capsys, argv):
    with pytest.raises(SystemExit):
        run(capsys, *argv.split())
    assert "takes no --" in capsys.readouterr().err


def test_a_table_that_cannot_be_judged_leaves_the_report(tmp_path, capsys):
    for name, words in (("x.csv", "a,b\n1,2\n"), ("x.parquet", "no parquet")):
        (tmp_path / name).write_text(words)
        argv = ("lr_ratio", "--reports-dir", tmp_path, "--table", tmp_path / name, "--out")
        code, _, err = run(capsys, *argv, tmp_path / "out")
        assert code == 2 and "table" in err and not (tmp_path / "out").exists()


def test_law_speaks_of_widths(asked):
    def of_widths(table, *widths):
        return pd.concat([table.assign(model=f"org/Llama-{h}", hidden_size=h) for h in widths])

    found = asked(of_widths(planted(ratio=10).assign(alpha=32), 1024, 2048, 4096), "--law")
    assert {v["method"] for v in found["by_loss"]} == {"lora", "fullft"}
    assert found["ratio_law"]["p"]["low"] < 0 < found["ratio_law"]["p"]["high"]
    table = of_widths(planted(ranks=(4,), higher=True), 1024, 2048, 4096, 8192)
    (law,) = asked(table, "--law", "--higher", "test_nll")["by_loss"]
    assert law["regret_percent"] >= 0
    assert law["lr_at_2000"]["value"] == pytest.approx(1.3e-3, rel=0.2)


def test_an_optimum_of_a_metric_and_one_that_is_not_bracketed_which_is_null_with_a_bound(asked):
    table = planted(higher=True).rename(columns={"test_nll": "accuracy"})
    rows = asked(table, "--higher", "accuracy")
    assert all(0.78 < r["best_nll"] < 0.81 and r["metric"] == "accuracy" for r in rows)
    assert rows[0]["low"] < 1.3e-4 < rows[0]["high"]
    table = planted(ranks=(4,))
    (row,) = asked(table[table["lr"] < 1e-3])  # the optimum is at 1.3e-3
    assert "at_edge" in row["flags"]
    assert row["best_lr"] is row["high"] is None and row["low"] is not None
    (row,) = asked(planted(ranks=(4,), seeds=(0,)).iloc[:1])
    assert row["best_lr"] is row["low"] is row["band"] is None and "few_points" in row["flags"]


def test_names_are_data_on_the_page_and_never_markup(tmp_path, capsys):
    table = planted(seeds=(0,)).assign(model="</script><img src=x>")
    page = tmp_path / "<b>.html"
    assert run(capsys, "html", write(tmp_path, table), "--out", page)[0] == 0
    text = page.read_text()
    assert "<img src" not in text and "<b>" not in text and "\\u003cimg src=x" in text


def test_a_kept_answer_is_printed_and_not_written(tmp_path, capsys, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in (KEPT / "lr_ratio-tiny").iterdir()}
    code, text, err = run(capsys, "lr_ratio", "--reports-dir", tmp_path)
    assert code == 0 and "REFUTED: ratio" in text and "none of your own" in err
    assert "lr_ratio-tiny" in err  # the default scale, whichever file is newer
    assert {p: p.stat().st_mtime_ns for p in (KEPT / "lr_ratio-tiny").iterdir()} == before
    again = ("--table", KEPT / "lr_ratio-tiny" / "table.parquet", "--out", tmp_path / "again")
    assert run(capsys, "lr_ratio", "--reports-dir", tmp_path, *again)[0] == 0
    assert "**REFUTED**" in (tmp_path / "again" / "report.md").read_text()
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "again").iterdir()}
    monkeypatch.setattr("analysis.report.report.write_html", lambda *given: 1 / 0)  # a full disk
    with pytest.raises(ZeroDivisionError):
        run(capsys, "lr_ratio", "--reports-dir", tmp_path, *again)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "again").iterdir()} == written


@pytest.mark.parametrize("command", ["study", "lr_ratio"])
def test_a_folder_with_files_of_others_is_left_alone(tmp_path, capsys, command):
    (mine := tmp_path / "map.png").write_text("mine")
    code, _, err = run(capsys, command, "--reports-dir", tmp_path, "--out", tmp_path)
    assert code == 2 and "has files" in err and [*tmp_path.iterdir()] == [mine]


CELLS = ("", "nan", "inf", "-1", "0", "1e-4", "2e-4", "1e-3", "2.5", "done", "x")
COLUMNS = {
    **{"model": ("m", "n"), "rank": ("", "4", "16"), "seed": ("0", "1")},
    "lr": ("1e-4", "2e-4", "4e-4", "8e-4", *CELLS),
    **{"test_nll": ("1.0", "1.1", "1.3", *CELLS), "nll_start": ("2.0", "0.5", "")},
    **{"status": ("done", "diverged", ""), "hidden_size": ("64", "128", "")},
}
ROW = st.fixed_dictionaries({name: st.sampled_from(cells) for name, cells in COLUMNS.items()})


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(ROW, max_size=12))
def test_any_table_is_answered_or_refused_in_a_line(tmp_path, capsys, rows):
    path = write(tmp_path, pd.DataFrame(rows, columns=list(COLUMNS)))
    for flags in ((), ("--ratio",), ("--drift",), ("--law",)):
        code, _, err = run(capsys, "fit", path, *flags)
        lines = err.splitlines()
        assert any(v.startswith("analysis:") for v in lines) == (code == 2)
        assert code in (0, 2) and len(lines) <= 6

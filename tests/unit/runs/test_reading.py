"""Anyone's runs: what is read or refused, which share a curve, metrics of which more is better; fit, ratio,
drift, law and html on anyone's table."""

import dataclasses
import json
import math
import runpy

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis.optimum.fit import fit_all, pools
from analysis.questions.registry import analyse
from analysis.runs import table as kept
from analysis.runs.curves import by_run, full_names, learning_curves, lr_curves, same_rows, variants
from analysis.runs.table import CURVE_KEYS, NLL, Shown, TableError, as_losses, shown
from analysis.runs.table import read_any as read
from analysis.tables import commands
from analysis.tables.commands import KEPT
from lorasweep.methods.registry import METHODS
from lorasweep.spec.metric import METRICS
from lorasweep.spec.run import RunSpec
from lorasweep.spec.values import fields
from lorasweep.store.exported import table_row
from tests.planted import planted, run, table, write
from tests.world import ROOT, tiny_spec, write_json


def test_our_own_csv_export_fits_like_the_parquet(tmp_path):
    """Its optional columns (floor_nats, clip_norm, ...) are empty cells in the CSV."""
    kept = ROOT / "analysis/results/lr_ratio-small/table.parquet"
    pd.read_parquet(kept).to_csv(tmp_path / "table.csv", index=False)
    own = read(tmp_path / "table.csv")
    assert own.table["floor_nats"].isna().all()
    fits = [commands.fit(reading) for reading in (own, read(kept))]
    assert len(fits[0]) == 2 and fits[0] == fits[1]
    assert variants(lr_curves(own.table)[1:]) == [""]
    # a curve has several learning rates and seeds; test rows and train_version train nothing
    settings = {f.key for cls in (RunSpec, *METHODS.values()) for f in fields(cls)}
    known = {"lr", "seed", "method", "name", "test_rows", "train_version"}
    known |= {"config", "fields"}  # of PEFT: in method_fields
    assert settings - known <= {*CURVE_KEYS}


def test_curves_of_our_table_are_those_of_its_report_and_told_apart():
    kept = ROOT / "analysis/results/layers-tiny"
    known = json.loads((kept / "results.json").read_text())["curves"]
    rows = commands.fit(read(kept / "table.parquet"))
    assert len({str([v for k, v in r.items() if k in CURVE_KEYS]) for r in rows}) == len(rows)
    assert sorted(r["best_nll"] for r in rows) == pytest.approx(
        sorted(c["best_nll"] for c in known)
    )


THEIRS = {"lr": "learning_rate", "test_nll": "eval_loss"}
MIXED = planted(higher=True).rename(columns={"test_nll": "accuracy"})
MIXED["accuracy"] *= np.where(MIXED.index % 2, 1, 100)  # fractions, and percent


def broken(column, value, row=3):
    table = planted().astype(object)
    table.loc[row, column] = value
    return table


@pytest.mark.parametrize(
    ("table", "options", "words"),
    [
        (planted().drop(columns="model"), [], ["no column 'model'", "+columns."]),
        (planted().drop(columns="rank"), [], ["no column 'rank'"]),
        (planted().iloc[:0], [], ["no rows"]),
        *(
            (broken(column, value), [], ["row 4", f"column {column}"])
            for column, values in {
                "lr": ("fast", "", -1e-4, 30),
                "test_nll": ("2.1 nats", "", "nan", "inf", -0.5),
                **{"status": ("perhaps",), "rank": ("4.5", 0), "seed": ("",), "model": ("",)},
            }.items()
            for value in values
        ),
        (planted().assign(method="lora"), [], ["row 1", "column rank"]),
        (planted().assign(seed=np.inf), [], ["row 1", "column seed"]),
        (MIXED, ["higher=accuracy"], ["row 1, 3", "accuracy", "mixed units"]),
        *(
            (planted().rename(columns=THEIRS), pairs, [words])
            for pairs, words in (
                ([], "+columns.lr=learning_rate"),
                (["+columns.lr=learning_rate"], "+columns.test_nll=eval_loss"),
                (["+columns.lr=learning_rat"], "Did you mean 'learning_rate'?"),
                (["+columns.lrr=learning_rate"], "Did you mean 'lr'?"),
                (["+columns.lr=eval_loss", "+columns.rank=eval_loss"], "a column of its own"),
            )
        ),
        (None, [], ["no file"]),
        ("not parquet", [], ["cannot be read"]),
    ],
)
def test_bad_tables_are_refused_with_row_and_column(tmp_path, capsys, table, options, words):
    path = tmp_path / "x.parquet"
    if isinstance(table, str):
        path.write_text(table)
    elif table is not None:
        path = write(tmp_path, table)
    code, out, err = run(capsys, "fit", path, *options)
    assert code == 2 and not out and all(word in err for word in words), err


def test_a_table_that_cannot_be_written_is_left_as_it_was(tmp_path):
    table = planted()
    kept.write(table, path := tmp_path / "table.parquet")
    before = path.read_bytes()
    with pytest.raises(ValueError):
        kept.write(table.assign(model=[object()] * len(table)), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_other_ways_to_write_the_same_table(tmp_path, capsys):
    table = planted()
    words = table.assign(method=np.where(table["rank"].isna(), "Full", "LoRA")).fillna({"rank": 0})
    typed = table.astype({"rank": "Int64", "model": "category"})
    paths = [write(tmp_path, words, "words.csv"), write(tmp_path, typed, "typed.parquet")]
    paths.append(write(tmp_path, table.rename(columns=THEIRS), "theirs.csv"))
    look = {"encoding": "utf-8-sig", "lineterminator": "\r\n", "quoting": 1, "index": False}
    for name, separator in (("tabs.csv", "\t"), ("semicolons.csv", ";")):
        paths.append(tmp_path / name)
        table.to_csv(paths[-1], sep=separator, **look)
    paths.append(tmp_path / "commas.csv")
    head, *lines = table.to_csv(index=False).splitlines()
    paths[-1].write_text("\n".join([head, *(f"{line}," for line in lines)]))
    rows = table.astype(object).replace({np.nan: None})
    objects = [  # as W&B exports runs
        {"State": "finished", "summary": {"test_nll": row.pop("test_nll")}, "config": row}
        for row in rows.drop(columns="status").to_dict("records")
    ]
    paths.append(write_json(tmp_path / "export.json", [json.dumps(objects, default=float)]))
    paths.append(tmp_path / "foreign.json")
    foreign = {
        "metric": "loss",
        "block": "attn",
        "result": "ok",
        "dataset": [["a", "b"]] * len(rows),
    }
    rows.assign(**foreign).to_json(paths[-1], orient="records")
    for path in paths:
        mapped = [f"+columns.{k}={v}" for k, v in THEIRS.items()] if path.stem == "theirs" else []
        code, text, _ = run(capsys, "fit", path, "format=json", *mapped)
        assert code == 0 and [r["rank"] for r in json.loads(text)] == [None, 4, 16]
    assert run(capsys, "fit", paths[-1], f"out={tmp_path}/new/page.html")[0] == 0


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("column", ["weight_decay", "clip_norm", "dataset", "schedule"])
def test_runs_that_differ_in_a_column_of_a_curve_are_no_repeats(tmp_path, column, seeded):
    table = planted(seeds=(0,)).assign(steps=8)
    values = ("a", "b") if column in ("dataset", "schedule") else (0.0, 0.1)
    both = pd.concat([table.assign(**{column: v}) for v in values])
    both["test_nll"] += np.repeat([0.0, 0.1], len(table))
    reading = read(write(tmp_path, both if seeded else both.drop(columns="seed")))
    assert not reading.notes and set(reading.table["seed"]) == {0}
    curves = lr_curves(reading.table)
    names = {(c.group, name) for c, name in zip(curves, full_names(curves))}
    assert len(reading.table) == len(both) and len(curves) == len(names) == 2 * 3
    # repeats without a seed are seeds that share nothing
    reading = read(write(tmp_path, planted(seeds=(0, 1)).drop(columns="seed")))
    assert set(reading.table["seed"]) == {0, 1} and set(reading.table["block"]) == {0}
    (full, *_) = lr_curves(reading.table)
    assert len(set(full.block)) == 1 and len(full.x) == 14


def test_what_is_left_out_or_taken_otherwise_is_noted_with_its_rows(tmp_path, capsys):
    table = planted()
    again = pd.concat([table, table.iloc[[8]].assign(test_nll=2.5), table.iloc[[0]]])
    crashed = table.rename(columns={"status": "State"})  # W&B's name
    crashed.loc[5, "State"] = "crashed"
    for changed, words in (
        (again, ("row 9, 64", "taken as repeats", "repeat another row", "row 65")),
        (broken("test_nll", "", 2).drop(columns="status"), ("row 3", "column test_nll")),
        (crashed, ("1 run(s)", "row 6")),
        # settings of names that are not ours, in a curve and at one learning rate
        (
            table.assign(peft_alpha=np.where(table["seed"] == 0, 16, 128), note=table.index),
            (
                "not read: peft_alpha, note, which differ",
                "lorasweep fit FILE +columns.alpha=lora_alpha",
            ),
        ),
        (table.assign(block=table["seed"] * 7), ("not read: column block, which differ",)),
        (table.assign(hidden_size=64 + table["seed"]), ("not read: hidden_size, which differ",)),
        (table.drop(columns="seed"), ("63 rows are repeats without a column seed",)),
    ):
        code, _, err = run(capsys, "fit", write(tmp_path, changed))
        assert code == 0 and all(word in err for word in words), err


def test_a_setting_in_a_tables_index_is_read(tmp_path, capsys):
    table = planted(ranks=(4,))
    both = pd.concat([table.assign(alpha=a, test_nll=table["test_nll"] + a) for a in (1, 2)])
    both.set_index("alpha").to_parquet(tmp_path / "t.parquet")
    code, out, _ = run(capsys, "fit", tmp_path / "t.parquet", "format=json")
    assert code == 0 and len({row.get("alpha") for row in json.loads(out)} - {None}) == 2


def test_runs_of_different_or_unknown_bases_or_data_are_never_mixed():
    """Runs 0 to 6 of full fine-tuning and 7 to 13 of LoRA, on the same base and data."""
    a, b = "a" * 64, "b" * 64
    full = table(lambda lr, s: 2.0).assign(method="fullft", rank=np.nan)
    both = pd.concat([full, table(lambda lr, s: 2.0)], ignore_index=True)
    both = both.assign(run_id=[f"run{k}" for k in range(14)], base_sha256=a, data_sha256=a)
    assert len(lr_curves(both)) == 2
    lr_curves(both.assign(data_sha256=[a] * 7 + [b] * 7, model=["m"] * 7 + ["n"] * 7))
    lr_curves(both.drop(columns="data_sha256"))
    assert len(lr_curves(both.assign(packages=["it 1"] * 7 + ["it 2"] * 7))) == 2
    assert len(lr_curves(both.assign(method_fields=["x=1", "x=2"] * 7))) == 4
    for column, values, words in (
        ("base_sha256", [a, b] * 7, "cannot share a curve"),
        ("data_sha256", [*[a] * 9, b, *[a] * 4], r"a in 13 runs, b{8} in 1 runs; runs run9\)"),
        ("data_sha256", [*[a] * 3, None, None, *[a] * 9], r"2 of 14 runs \(runs run3, run4\)"),
        (
            "packages",
            ["it 1"] * 9 + ["it 2"] * 5,
            "'lora' .*it 2 in 5 runs, it 1 in 2 runs; .* code",
        ),
    ):
        with pytest.raises(TableError, match=words):
            lr_curves(both.assign(**{column: values}))


def test_a_curve_is_read_to_its_end_where_the_same_rows_were_evaluated_there():
    curve = [{"step": s, "test_nll": 3.0 - s / 4} for s in (0, 1, 2, 4)]
    same = [*curve[:3], {**curve[3], "test_nll_curve": 1.6}]
    for points, end in ((same, [(4, 1.6)]), (curve, [])):  # else the last loss is on more rows
        table = pd.DataFrame([{"result": json.dumps({"curve": points})}])
        assert same_rows(by_run(table)[0]) == [(1, 2.75), (2, 2.5), *end]
    assert same_rows(None) == []


def row(lr, value, metric=METRICS["policy_gradient"], seed=0, curve=None, state="done", **changes):
    spec = dataclasses.replace(tiny_spec(), lr=lr, seed=seed, **changes)
    curve = curve or [{"step": 0, metric.name: 0.1}, {"step": 4, metric.name: value}]
    result = {"run_id": spec.id, "state": state, metric.name: value, "curve": curve}
    return table_row(spec.plain(), {**result, **metric.stored()})


def test_the_best_rate_is_that_of_the_highest_reward():
    top = np.log(1.2e-3)
    rewards = [(lr, 0.8 - 0.05 * (np.log(lr) - top) ** 2) for lr in 1e-3 * 2.0 ** np.arange(-3, 4)]
    raw = pd.DataFrame([row(lr, r + 1e-3 * s, seed=s) for lr, r in rewards for s in range(3)])
    assert (raw["test_reward"] > 0).all() and raw["test_nll"].isna().all()
    losses = as_losses(raw)
    assert (losses["test_nll"] == -raw["test_reward"]).all()
    assert (losses["nll_start"] == -0.1).all()
    assert shown(raw) == shown(losses) == Shown("held-out reward", -1, "reward", "")
    curve = learning_curves(losses)
    assert curve["test_nll"].tolist()[:2] == [-0.1, -raw["test_reward"].iloc[0]]
    assert (as_losses(losses)["test_nll"] == losses["test_nll"]).all()  # a loss stays one
    (best,) = fit_all(lr_curves(losses))
    assert best.best_lr.low < np.exp(top) < best.best_lr.high
    assert best.best_lr.value == pytest.approx(np.exp(top), rel=0.1)


def test_the_same_data_learned_by_reward_and_by_cross_entropy_are_two_groups():
    """As the control of a bandit is: equal rates and seeds, and neither a run twice nor one curve."""
    sampled = {"objective": "policy_gradient", "group_size": 4, "max_new_tokens": 1}
    nlls = [row(lr, 1.0, METRICS["sft"]) for lr in (1e-3, 2e-3, 4e-3)]
    rewards = [row(lr, 0.5, **sampled) for lr in (1e-3, 2e-3, 4e-3)]
    curves = lr_curves(as_losses(pd.DataFrame([*rewards, *nlls])))
    assert sorted(c.y.mean() for c in curves) == [-0.5, 1.0]
    assert len({c.group for c in curves}) == 2 and {c.shown.sign for c in curves} == {1, -1}
    assert [len(pool) for pool in pools(curves)] == [1, 1]  # no noise in common
    assert any("policy gradient" in c.group for c in curves)
    # NLLs are left as they are, and without groups metrics are never mixed
    table, mixed = pd.DataFrame(nlls), pd.DataFrame([nlls[0], row(2e-3, 0.5)])
    assert as_losses(table) is table and shown(table) == NLL
    with pytest.raises(TableError, match=r"test_nll, test_reward.*Analyse them separately"):
        as_losses(mixed)
    with pytest.raises(TableError):
        analyse(mixed, {"analysis": "lr_ratio", "claims": {}})


def test_a_run_has_collapsed_by_its_own_best_reward():
    """0.5 is the limit: of the run's best reward on the same rows, and not of the base's."""
    rows, wanted = [], []
    for curve, last, state, collapsed in (
        ([0.1, 0.8, 0.41], None, "done", False),
        ([0.1, 0.8, 0.39], None, "done", True),  # although four times the base's reward
        ([0.1, 0.8, 0.39], 0.42, "done", False),  # on the rows of the others it kept more
        ([0.3, 0.2, 0.16], None, "done", False),
        ([0.1, 0.5, 0.45], None, "diverged", True),  # stopped in training
    ):
        points = [{"step": k, "test_reward": r} for k, r in enumerate(curve)]
        points[-1] |= {} if last is None else {"test_reward_curve": last}
        rows.append(row(1e-3 * (1 + len(rows)), curve[-1], curve=points, state=state))
        wanted.append(collapsed)
    losses = as_losses(pd.DataFrame(rows))
    (curve,) = lr_curves(losses)
    assert losses["collapsed"].tolist() == wanted
    assert np.isnan(curve.y).tolist() == curve.broke_down.tolist() == wanted


@pytest.fixture
def asked(tmp_path, capsys):
    """asked(table, *options): what fit prints about a table as JSON."""

    def values(table, *options):
        code, text, _ = run(capsys, "fit", write(tmp_path, table), *options, "format=json")
        assert code == 0
        return json.loads(text)

    return values


def test_fit_prints_a_line_a_curve_and_writes_the_objects(tmp_path, capsys):
    path = write(tmp_path, planted().assign(dataset="d", batch_size=16, layers="mlp"))
    code, text, _ = run(capsys, "fit", path, f"out={tmp_path}/fits.json")
    rows = json.loads((tmp_path / "fits.json").read_text())
    keys = {"model", "dataset", "method", "rank", "layers", "batch_size", "steps", "n", "best_nll"}
    assert code == 0 and keys | {"best_lr", "low", "high", "band"} <= rows[0].keys()
    full = next(r for r in rows if r["rank"] is None)
    assert full["method"] == "fullft" and full["best_lr"] == pytest.approx(1.3e-4, rel=0.1)
    assert full["low"] < 1.3e-4 < full["high"]
    # a loss of 0.01 under a valley of curvature 0.1 is about sqrt(0.2) wide on each side
    width = math.log(full["band"][1] / full["band"][0])
    assert width == pytest.approx(2 * math.sqrt(0.2), rel=0.15)
    assert len(text.splitlines()) == 1 + len(rows) and text.startswith("model  ")


def test_ratio_and_drift_come_back(asked):
    assert all(r["low"] < 10 < r["high"] for r in asked(planted(), "show=ratio")["ratios"])
    (row,) = asked(planted(), "show=drift")
    assert row["low"] < 0 < row["high"] and row["ranks"] == [4, 16]
    # rank 1 is not pooled with higher ranks
    low = planted(ratio=2.5, ranks=(1,)).dropna(subset=["rank"])
    models = [pd.concat([planted(), low]).assign(model=name) for name in "mno"]
    found = asked(pd.concat(models), "show=ratio")
    assert {r["rank"] for r in found["ratios"]} == {1, 4, 16} and found["pooled"]["groups"] == 3
    assert found["pooled"]["low"] < 10 < found["pooled"]["high"] < 12
    more = planted(ranks=(4,), seeds=(9,))  # a seed that only LoRA has shifts no gap
    more = pd.concat([planted((None, 4)), more.assign(test_nll=more["test_nll"] + 5)])
    assert abs(asked(more, "show=ratio")["ratios"][0]["gap"]) < 0.01
    # layer sets share one full fine-tuning curve, which is not two witnesses
    one = planted().assign(alpha=32.0, scaling_by="rank", init_scale=1.0, eps=1e-8)
    found = asked(pd.concat([one.assign(layers=v) for v in ("attention", "mlp")]), "show=ratio")
    variants = {r["group"].split("; ")[1] for r in found["ratios"]}
    assert variants == {"layers attention", "layers mlp"}  # not what all have, such as alpha
    assert len(found["ratios"]) == 4 and found["pooled"] is None


@pytest.mark.parametrize(
    ("table", "options", "word"),
    [
        ({"ranks": (4, 8)}, ("show=ratio",), "no fullft run"),
        ({"ranks": (None,)}, ("show=drift",), "no lora run"),
        ({}, ("higher=test_nl",), "Did you mean 'test_nll'?"),
        ({}, ("out=runs.csv/fits.json",), "runs.csv"),  # cannot be written
        ({}, ("out=runs.csv",), "runs.csv has other content"),
    ],
)
def test_what_a_command_needs_is_named(tmp_path, capsys, monkeypatch, table, options, word):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "fit", write(tmp_path, planted(seeds=(0,), **table)), *options)
    assert code == 2 and word in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("fit FILE scale=small name=lr_ratio", "name is only for action=answer"),
        ("answer study within=1", "within is only for action=fit"),
        ("answer lr_ratio higher=acc", "higher is only for action=fit"),
        ("fit FILE out=page.html show=ratio", "leave show= out"),
        ("answer lr_ratio table=FILE", "out=DIR says where to write"),
        ("answer study table=FILE out=DIR", "judged by one question"),
        ("fit FILE within=0", "a number above 0"),
        ("answer", "answer needs more"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(capsys, argv, words):
    code, _, err = run(capsys, *argv.split())
    assert code == 2 and words in err


def test_the_command_of_older_releases_names_the_two_that_took_its_place():
    with pytest.raises(SystemExit, match=r"lorasweep answer .*lorasweep fit FILE"):
        runpy.run_module("analysis", run_name="__main__")


def test_a_table_that_cannot_be_judged_leaves_the_report(tmp_path, capsys):
    for name, words in (("x.csv", "a,b\n1,2\n"), ("x.parquet", "no parquet")):
        (tmp_path / name).write_text(words)
        argv = ("answer", "lr_ratio", f"table={tmp_path / name}", f"out={tmp_path}/out")
        code, _, err = run(capsys, *argv)
        assert code == 2 and "table" in err and not (tmp_path / "out").exists()


def test_an_optimum_of_a_metric_and_one_that_is_not_bracketed_which_is_null_with_a_bound(asked):
    table = planted(higher=True).rename(columns={"test_nll": "accuracy"})
    rows = asked(table, "higher=accuracy")
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
    assert run(capsys, "fit", write(tmp_path, table), f"out='{page}'")[0] == 0
    text = page.read_text()
    assert "<img src" not in text and "<b>" not in text and "\\u003cimg src=x" in text


def test_a_kept_answer_is_printed_and_not_written(tmp_path, capsys, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in (KEPT / "lr_ratio-tiny").iterdir()}
    ask = ("answer", "lr_ratio", f"exec.reports_dir={tmp_path}")
    code, text, err = run(capsys, *ask)
    assert code == 0 and "(ratio, primary): 4.19 [3.4," in text and "none of your own" in err
    assert "lr_ratio-tiny" in err  # the default scale, whichever file is newer
    assert {p: p.stat().st_mtime_ns for p in (KEPT / "lr_ratio-tiny").iterdir()} == before
    again = (f"table={KEPT}/lr_ratio-tiny/table.parquet", f"out={tmp_path}/again")
    assert run(capsys, *ask, *again)[0] == 0
    assert "**REFUTED**" in (tmp_path / "again" / "report.md").read_text()
    assert run(capsys, *ask, *again)[0] == 2  # it has files now
    again = (again[0], f"out={tmp_path}/new")
    monkeypatch.setattr("analysis.report.report.write_html", lambda *given: 1 / 0)  # a full disk
    with pytest.raises(ZeroDivisionError):
        run(capsys, *ask, *again)
    assert not [*(tmp_path / "new").iterdir()]


@pytest.mark.parametrize("name", ["study", "lr_ratio"])
def test_a_folder_with_files_of_others_is_left_alone(tmp_path, capsys, name):
    (mine := tmp_path / "map.png").write_text("mine")
    code, _, err = run(capsys, "answer", name, f"out={tmp_path}")
    assert code == 2 and "has files" in err and [*tmp_path.iterdir()] == [mine]


def test_a_file_is_replaced_only_if_we_wrote_it_and_nobody_changed_it(tmp_path, capsys):
    table = write(tmp_path, planted())
    page, notes, fits = (tmp_path / name for name in ("runs.html", "notes.txt", "fits.json"))
    for path in (page, notes):
        path.write_text("my notes")
    for path in (page, notes):
        code, _, err = run(capsys, "fit", table, f"out={path}")
        assert code == 2 and "has other content" in err and "out=FILE" in err
    assert page.read_text() == notes.read_text() == "my notes"
    page.unlink()
    for _ in range(2):  # again, and where it was moved to
        assert run(capsys, "fit", table, f"out={page}")[0] == 0
        assert run(capsys, "fit", table, f"out={fits}")[0] == 0
    moved = page.rename(tmp_path / "moved.html")
    assert run(capsys, "fit", table, "within=0.02", f"out={moved}")[0] == 0
    changed = moved.read_text().replace("<body>", "<body>my notes")
    moved.write_text(changed)
    assert run(capsys, "fit", table, f"out={moved}")[0] == 2 and moved.read_text() == changed
    moved.unlink()
    moved.symlink_to(page)
    assert run(capsys, "fit", table, f"out={moved}")[0] == 2


@pytest.mark.parametrize(
    "columns",
    [
        {"layers": [["q_proj", "v_proj"]] * 63, "notes": [np.array(["a", "b"])] * 63},
        *({"weights_sha256": [f"{k:064x}" for k in range(63)], **more} for more in ({}, {"trainer": "t"})),
        *({name: 5} for name in ("cut_from_steps", "steps", "base_sha256", "trainer_versions")),
        *({name: "x"} for name in ("result", "spec", "objective", "curve", "packages", "block")),
    ],
)  # fmt: skip
def test_columns_that_others_name_as_we_do_end_in_no_traceback(tmp_path, capsys, columns):
    path = write(tmp_path, planted().assign(**columns), "x.parquet")
    for more in ((), ("show=ratio",), ("show=drift",), (f"out={tmp_path}/page.html",)):
        assert run(capsys, "fit", path, *more)[0] == 0


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
    for flags in ((), ("show=ratio",), ("show=drift",)):
        code, _, err = run(capsys, "fit", path, *flags)
        lines = err.splitlines()
        assert any(v.startswith("lorasweep:") for v in lines) == (code == 2)
        assert code in (0, 2) and len(lines) <= 6

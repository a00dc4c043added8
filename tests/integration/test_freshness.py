"""What is kept is what today's code makes of the kept tables: verdicts, numbers, pages, figures, notebooks.
Words are compared exactly, numbers to a tolerance: the last digits differ between processors."""

import ast
import json
import math
import re
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from analysis.inference.rows import csv_of
from analysis.questions.registry import analyse
from analysis.report import notebook, report
from analysis.report.plots import INPUTS
from analysis.report.study import answers, page
from analysis.report.text import text_hash
from lorasweep.work.answer import KEPT
from tests import planted
from tests.world import ROOT

SLOW = re.compile(r"_(s1|128)$|^(batch_size|regime)-tiny$")
ANSWERS = [
    pytest.param(folder, marks=pytest.mark.full if SLOW.search(folder.name) else (), id=folder.name)
    for folder in planted.ANSWERS
]
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")

pytestmark = pytest.mark.xdist_group("freshness")


def _unit(number):
    """The value of one in the last printed digit."""
    digits, _, exponent = number.partition("e")
    return 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))


def differing_text(a, b):
    """The first place where texts differ by more than one in the last digit of both; '' if none."""
    for x, y in zip(a.splitlines(), b.splitlines()):
        numbers = list(zip(NUMBER.findall(x), NUMBER.findall(y)))
        near = all(
            abs(float(m.replace(",", "")) - float(n.replace(",", "")))
            <= 1.01 * max(_unit(m), _unit(n))
            for m, n in numbers
            if m != n
        )
        if NUMBER.sub("#", x) != NUMBER.sub("#", y) or not near:
            return f"{x}\n{y}"
    return "" if a.count("\n") == b.count("\n") else "one has more lines"


def differing(a, b, where=""):
    """Paths at which two plain values differ: other words, or numbers beyond the tolerance."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for k in a for d in differing(a[k], b[k], f"{where}.{k}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for k, (x, y) in enumerate(zip(a, b)) for d in differing(x, y, f"{where}[{k}]")]
    if isinstance(a, float | int) and isinstance(b, float | int):
        same = math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-12) or (a != a and b != b)
    elif isinstance(a, str) and isinstance(b, str):
        same = not differing_text(a, b)
    else:
        same = a == b
    return [] if same else [f"{where}: {a} is not {b}"]


@pytest.mark.parametrize("folder", ANSWERS)
def test_kept_answers_reports_and_figures_are_what_their_tables_say_today(folder):
    table, question = planted.kept_answer(folder)
    analysis = analyse(table, question, KEPT)
    today = json.loads(json.dumps(report.results_of(analysis, question, table)))
    results = (folder / "results.json").read_text()
    assert differing(today, json.loads(results)) == []
    today = report.render(analysis, question, table)
    assert not differing_text(today, (folder / "report.md").read_text())
    wanted = {s.figure for s in analysis.sections if s.panels}
    wanted |= {"lr_nll.png"} if analysis.optima else set()
    linked = set(re.findall(r"\]\((\w+\.png)\)", (folder / "report.md").read_text()))
    inputs = report.inputs_hash(table, results)
    assert wanted <= linked
    assert {p.name: _inputs(p) for p in folder.glob("*.png")} == dict.fromkeys(linked, inputs)


def test_the_table_of_all_rows_is_of_the_kept_answers():
    """The adviser reads it."""
    today = csv_of(page.rows_of(answers.read_answers([KEPT])))
    assert not differing_text(today, (KEPT / page.TABLE).read_text())


def _inputs(path):
    with Image.open(path) as image:
        return image.info.get(INPUTS)


@pytest.mark.parametrize(
    ("name", "numbers"), [("calibration", "calibration"), ("bench", "bench"), ("bench", "rewards")]
)
def test_figures_of_the_validation_were_drawn_from_its_numbers(name, numbers):
    inputs = text_hash((KEPT / name / f"{numbers}.json").read_text())
    apart = {KEPT / "bench" / "rewards.png"}
    figures = apart if numbers == "rewards" else set((KEPT / name).glob("*.png")) - apart
    assert figures and {_inputs(p) for p in figures} == {inputs}


def test_figures_of_the_page_over_all_answers_were_drawn_from_the_kept_answers():
    paths = (*KEPT.glob("*.md"), *(KEPT / page.QUESTIONS).glob("*.md"))
    linked = {Path(t).name for p in paths for t in re.findall(r"\]\(([^)]+)\)", p.read_text())}
    wanted = linked & set(page.FIGURES)
    kept_ones = {p.name for p in KEPT.glob("*.png")} - {"interactive.png"}
    assert wanted == kept_ones
    inputs = page.inputs_hash(answers.read_answers([KEPT]))
    assert {_inputs(KEPT / name) for name in wanted} == {inputs}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "analysis/notebooks").glob("*.ipynb")), ids=lambda p: p.stem
)
def test_it_is_thin_and_runs_and_shows_something_in_every_cell_that_should(
    path, tmp_path, monkeypatch
):
    """IPython in this process shows values as a notebook does, and starts no kernel."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    monkeypatch.chdir(tmp_path)
    shell = InteractiveShell.instance()
    shell.reset()
    for cell in (c for c in nbformat.read(path, 4).cells if c.cell_type == "code"):
        assert cell.outputs == [] and cell.execution_count is None
        nodes = list(ast.walk(ast.parse(cell.source)))
        mathematics = ast.BinOp | ast.For | ast.While | ast.FunctionDef | ast.comprehension
        assert not any(isinstance(n, mathematics) for n in nodes)
        imports = [n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
        assert {a.name for n in imports for a in n.names} <= {"notebook"}
        with capture_output() as out:
            done = shell.run_cell(cell.source)
        done.raise_error()
        is_shown = done.result is not None or bool(out.outputs)
        assert is_shown == ("= " not in cell.source.splitlines()[-1]) and out.stderr == ""
    InteractiveShell.clear_instance()
    with pytest.raises(KeyError, match="tiny128 on dialect_shift"):  # a folder may be a text
        notebook.section(notebook.answer(str(notebook.kept("lr_ratio-tiny"))), "ratios")

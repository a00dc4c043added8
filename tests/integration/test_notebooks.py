"""Each notebook runs from kept results, holds no mathematics, and is kept without outputs."""

import ast

import nbformat
import pytest

from analysis.report import notebook
from tests.world import ROOT

NOTEBOOKS = sorted((ROOT / "analysis" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_is_thin_and_kept_without_outputs(path):
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type != "code":
            continue
        assert cell.outputs == [] and cell.execution_count is None
        nodes = list(ast.walk(ast.parse(cell.source)))
        mathematics = ast.BinOp | ast.For | ast.While | ast.FunctionDef | ast.comprehension
        assert not any(isinstance(n, mathematics) for n in nodes)
        imports = [n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
        assert {a.name for n in imports for a in n.names} <= {"notebook"}


@pytest.fixture(scope="module")
def shell():
    """IPython in this process: it shows values as a notebook does, and starts no kernel."""
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    yield shell
    InteractiveShell.clear_instance()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_runs_and_shows_something_in_every_cell_that_should(path, shell, tmp_path, monkeypatch):
    from IPython.utils.capture import capture_output

    monkeypatch.chdir(tmp_path)
    shell.reset()
    codes = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]
    for source in codes:
        with capture_output() as out:
            done = shell.run_cell(source)
        done.raise_error()
        is_shown = done.result is not None or bool(out.outputs)
        assert is_shown == ("= " not in source.splitlines()[-1])
        assert out.stderr == ""


def test_a_folder_may_be_a_text_and_a_wrong_section_is_named():
    found = notebook.answer(str(notebook.kept("lr_ratio-tiny")))
    with pytest.raises(KeyError, match="tiny128 on dialect_shift"):
        notebook.section(found, "ratios")

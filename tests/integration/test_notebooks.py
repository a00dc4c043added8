"""Each notebook runs from kept results, holds no mathematics, and is kept without outputs."""

import ast

import nbformat
import pytest

from analysis.report import notebook
from tests.world import ROOT

NOTEBOOKS = sorted((ROOT / "analysis" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
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

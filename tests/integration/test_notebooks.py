"""Each notebook runs from kept results, trains nothing, holds no mathematics, and is kept without
outputs."""

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOKS = sorted((ROOT / "analysis" / "notebooks").glob("*.ipynb"))


def test_the_four_are_there():
    assert {p.stem for p in NOTEBOOKS} == {"lr_ratio", "rank_curves", "batch_size", "study"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_is_thin_and_kept_without_outputs(path):
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type != "code":
            continue
        assert cell.outputs == [] and cell.execution_count is None
        nodes = list(ast.walk(ast.parse(cell.source)))
        assert not any(
            isinstance(n, ast.BinOp | ast.For | ast.While | ast.FunctionDef | ast.comprehension)
            for n in nodes
        )
        imported = [
            a.name for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names
        ]
        assert set(imported) <= {"notebook"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_runs_and_shows_something_in_every_cell_that_should(path, tmp_path):
    notebook = nbformat.read(path, 4)
    NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    shown = [
        c for c in notebook.cells if c.cell_type == "code" and "= " not in c.source.splitlines()[-1]
    ]
    assert shown and all(c.outputs for c in shown)
    assert not [
        o
        for c in notebook.cells
        if c.cell_type == "code"
        for o in c.outputs
        if o.output_type == "stream"
    ]

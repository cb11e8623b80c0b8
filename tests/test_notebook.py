"""docs/segment.ipynb runs from a clean state, and its pictures appear."""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


def test_the_notebook_runs(tmp_path: Path, monkeypatch) -> None:
    notebook = nbformat.read(ROOT / "docs" / "segment.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # kept out of git: they change with every run
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    table = outputs[-1].data["text/plain"]
    assert "overlap" in table and "nan" not in table.lower()

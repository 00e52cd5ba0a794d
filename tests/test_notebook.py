"""The notebook of the documentation, executed."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"


def shown(notebook):
    """Kinds of what each cell of code shows, without progress bars; text of a display that is none of ours."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[sorted(o.get("data", {})) for o in cell.outputs if o.get("name") != "stderr"] for cell in cells]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own machinery
def test_it_runs_and_shows_what_is_committed(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    committed = nbformat.read(NOTEBOOK, as_version=4)
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(fresh, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert shown(fresh) == shown(committed)
    table = fresh.cells[3].outputs[-1].data
    assert "\x1b" not in table["text/plain"]
    assert all(name in table["text/html"] for name in ("W-PGD (ReDLR)", "knapsack"))

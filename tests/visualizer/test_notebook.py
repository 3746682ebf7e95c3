"""Executes the notebook of the visualizer: its cells run, print the same, and draw the same number of figures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from command_tools import ROOT

NOTEBOOK = ROOT / "docs" / "guide" / "visualizer.ipynb"
FIGURE = "application/vnd.plotly.v1+json"


def outcome(cells: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """The outputs of the cells: printed lines, and for a figure its title and the names of its curves."""
    found: list[tuple[str, Any]] = []
    for one in (output for cell in cells for output in cell.get("outputs", [])):
        if one["output_type"] == "stream" and one["name"] == "stdout":
            found.append(("printed", "".join(one["text"])))
        elif FIGURE in one.get("data", {}):
            figure = one["data"][FIGURE]
            found.append((figure["layout"]["title"]["text"], sorted({trace["name"] for trace in figure["data"]})))
    return found


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = (pytest.importorskip(name) for name in ("nbformat", "nbclient"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", "")))))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    shown = outcome(json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"])
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert outcome(notebook.cells) == shown
    assert [title for title, _ in shown] == ["printed", "Loss", "Loss over compute", "printed"]
    assert shown[1][1][-2:] == ["narrow", "wide"]

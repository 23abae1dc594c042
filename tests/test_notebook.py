"""The notebook runs from top to bottom, with fewer steps and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "finetune.ipynb"
FEWER = {"STEPS = 260": "STEPS = 2", "PICTURES = 600": "PICTURES = 16", "VALID = 40": "VALID = 4"}


@pytest.mark.usefixtures("one_device")
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    for long, short in FEWER.items():
        assert long in code[0]
        code[0] = code[0].replace(long, short)
    names: dict = {}
    for number, cell in enumerate(code):
        exec(compile(cell, f"{NOTEBOOK.name}, code {number}", "exec"), names)
    assert list(names["losses"]) == [1, 2]
    assert set(names["answers"]) == {"base", "tuned"}
    assert (tmp_path / "runs" / "notebook" / "report.html").is_file()
    assert "mask AP50" in capsys.readouterr().out
    assert all(not c["outputs"] for c in cells if c["cell_type"] == "code"), (
        "stored without outputs"
    )

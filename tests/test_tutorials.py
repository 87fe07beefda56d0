"""The notebooks of docs/tutorials run, and are kept with outputs and pictures of moderate size."""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
nbformat = pytest.importorskip("nbformat", reason="notebooks are run by nbclient: pip install '.[docs]'")


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def test_the_index_lists_every_notebook() -> None:
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) == 5
    assert all(f"]({path.name})" in index for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_with_their_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    found = outputs(notebook)
    assert found and not [output for output in found if output.output_type == "error"]
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    pictures = [output.data["image/png"] for output in found if "image/png" in output.get("data", {})]
    assert all(len(base64.b64decode(picture)) < 150_000 for picture in pictures)
    text = path.read_text(encoding="utf-8")
    assert "/tmp/" not in text and str(Path.home()) not in text, "a path of the machine in the outputs"


@pytest.mark.docs
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("nbclient")
    # `!ifdefense` is the one of this interpreter, and the package that of this checkout.
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent.parent), prepend=os.pathsep)
    monkeypatch.delenv("IFDEFENSE_DATA", raising=False)
    notebook = nbformat.read(path, as_version=4)
    kept = [output.output_type for output in outputs(notebook)]
    resources = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    assert kept[-1] == outputs(notebook)[-1].output_type

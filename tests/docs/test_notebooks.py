"""The notebooks in examples/ run on the embedded model from first to last cell; they are kept without outputs."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def test_there_are_four() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["calibrate", "compare", "own_method", "tour"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_kept(path: Path) -> None:
    assert path.stat().st_size < 20_000
    for cell in cells(path):
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    why = "needs Jupyter's kernel: `make docs` has an environment with it"
    nbformat = pytest.importorskip("nbformat", reason=why)
    nbclient = pytest.importorskip("nbclient", reason=why)
    pytest.importorskip("ipykernel", reason=why)
    notebook = nbformat.read(path, as_version=4)
    start, worked = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    there = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=there).execute()
    said = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    worked = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - worked
    print(f"{path.name}: {time.monotonic() - start:.0f} s, {worked:.0f} of them at work; {len(said)} outputs")
    assert len(said) >= 4
    assert not [out for out in said if out.output_type == "error"]
    warned = "".join(out.text for out in said if out.get("name") == "stderr").splitlines()
    assert not [line for line in warned if "evengaze" in line and "site-packages" not in line]  # no warnings of ours
    if path.stem in ("tour", "own_method", "calibrate"):
        assert any("image/png" in out.get("data", {}) for out in said)

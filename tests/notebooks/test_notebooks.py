"""Every notebook runs from its first cell to its last, and is committed with its pictures and without machine paths."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

ROOT = Path(__file__).parents[2]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST_BYTES = 400 * 1024
MACHINE_PATH = re.compile(rf"/(?:home|root|tmp|usr|Users)/|\\Users|site-packages|{re.escape(str(ROOT))}")

each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def this_python():
    """A kernel of the interpreter that runs the tests, whatever kernels the machine's user has registered."""
    return AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))


def test_there_are_notebooks():
    assert PATHS


@each_notebook
def test_runs(path, tmp_path):
    notebook = read(path)
    client = nbclient.NotebookClient(
        notebook, km=this_python(), timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    warnings = [
        output.text for cell in code_cells(notebook) for output in cell.outputs if output.get("name") == "stderr"
    ]
    assert warnings == []
    assert list(tmp_path.iterdir()) == []


@each_notebook
def test_is_committed_as_it_ran(path):
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output.output_type for cell in cells for output in cell.outputs]
    assert "display_data" in kinds
    assert "error" not in kinds


@each_notebook
def test_is_small_and_names_no_machine(path):
    notebook = read(path)
    assert path.stat().st_size < LARGEST_BYTES
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            # A picture's base64 may spell anything.
            output.get("data", {}).pop("image/png", None)
    assert MACHINE_PATH.findall(nbformat.writes(notebook)) == []

"""Execute the notebooks and write them back, outputs included, from their `.py` halves.

    python -m tests.tools.render                # all six, in order
    python -m tests.tools.render 04             # those whose name starts with 04

Each notebook stores a hash of its sources, so that a test can tell when its outputs are stale. Metadata that changes
from run to run (times, versions, widget state) is dropped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def source_hash(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 over every cell's kind, source and tags."""
    cells = [(cell.cell_type, cell.source, sorted(cell.metadata.get("tags", []))) for cell in notebook.cells]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def tidy(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Join what was printed piece by piece, and keep of a progress bar what a terminal would show at the end."""
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            output.text = "\n".join(line.rstrip("\r").split("\r")[-1].rstrip() for line in output.text.split("\n"))
    return [output for output in kept if output.output_type != "stream" or output.text.strip()]


def render(script: Path) -> None:
    """Execute one notebook in its own folder, as JupyterLab would, and write the `.ipynb`."""
    notebook = jupytext.read(script)
    NotebookClient(
        notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(script.parent)}}
    ).execute()
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            cell.outputs = tidy(cell.outputs)
        cell.id = f"cell-{number:02d}"
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
    notebook.metadata = {
        "kernelspec": dict(notebook.metadata.kernelspec),
        "language_info": {"name": "python"},
        "llmcore": {"source_hash": source_hash(notebook)},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    target = script.with_suffix(".ipynb")
    temporary = target.with_suffix(".tmp")
    nbformat.write(notebook, temporary)
    os.replace(temporary, target)


def save_training_curves() -> None:
    """The README's picture: the one that notebook 4 leaves when training is over."""
    notebook = nbformat.read(NOTEBOOKS / "04_scifi_train.ipynb", as_version=4)
    cell = next(cell for cell in notebook.cells if "dashboard.run(second)" in cell.source)
    picture = next(output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {}))
    (NOTEBOOKS / "images").mkdir(exist_ok=True)
    (NOTEBOOKS / "images" / "training.png").write_bytes(base64.b64decode(picture))


if __name__ == "__main__":
    os.environ["LLM_WORKBOOK_WATCHED"] = "0"
    wanted = tuple(sys.argv[1:]) or ("",)
    for path in sorted(NOTEBOOKS.glob("*.py")):
        if path.name.startswith(wanted):
            started = time.time()
            render(path)
            size = path.with_suffix(".ipynb").stat().st_size
            print(f"{path.stem}: {time.time() - started:.0f} s, {size / 1000:.0f} kB", flush=True)
            if path.stem == "04_scifi_train":
                save_training_curves()

"""`make demo`: notebooks 1 to 5 by papermill at their default parameters, then what came of them."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import nbformat
import papermill

from llmcore.files import PROJECT_ROOT, display_path
from llmcore.runs import read_metrics

EXECUTED = PROJECT_ROOT / "outputs" / "demo"


def printed(notebook: Path, containing: str) -> str:
    """What the cell whose source holds some words has printed."""
    cells = nbformat.read(notebook, as_version=4).cells
    outputs = next(cell.outputs for cell in cells if cell.cell_type == "code" and containing in cell.source)
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def main() -> None:
    """Run the notebooks in order, with their progress on the terminal, and sum up."""
    EXECUTED.mkdir(parents=True, exist_ok=True)
    started = time.time()
    notebooks = sorted((PROJECT_ROOT / "notebooks").glob("0[1-5]_*.ipynb"))
    for number, notebook in enumerate(notebooks, start=1):
        print(f"\n=== {number} of {len(notebooks)}: {notebook.stem}", flush=True)
        papermill.execute_notebook(
            notebook,
            EXECUTED / notebook.name,
            cwd=notebook.parent,
            engine_name="llmcore",
            log_output=True,
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
            autosave_cell_every=30,
        )
    print(f"\n=== done in {(time.time() - started) / 60:.1f} minutes\n")
    toy, story = EXECUTED / "03_toyreverse.ipynb", EXECUTED / "04_scifi_train.ipynb"
    print("Reversing strings:", printed(toy, "exact match on").strip().replace("\n", "; "))
    run_dir = PROJECT_ROOT / printed(story, 'print("checkpoint:"').split("checkpoint:")[1].split()[0]
    last = [event for event in read_metrics(run_dir.parent) if "val_loss" in event][-1]
    print(
        f"Language model:    validation loss {last['val_loss']:.3f} nats per token, "
        f"perplexity {last['val_perplexity']:.1f}, {last['val_bits_per_byte']:.3f} bits per byte "
        f"after {last['step']:,} steps\n"
    )
    print(printed(EXECUTED / "05_generate.ipynb", "in stream(").strip() + "\n")
    print("Executed notebooks:", *(display_path(EXECUTED / notebook.name) for notebook in notebooks), sep="\n  ")


if __name__ == "__main__":
    main()
